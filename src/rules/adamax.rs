//! Adamax (Kingma & Ba, 2015, Algorithm 2), <https://arxiv.org/abs/1412.6980>, with torch's `eps` beside the gradient.
//! Where the infinity norm is zero, so is the average of gradients, and the update is zero.

use crate::rule::{abs, complement, max, rule, select};

rule!(
    Adamax,
    hyper(lr, b1, b2, eps, weight_decay),
    state(m, u),
    |t| scalars(a1 = 1.0 - b1, size = lr / complement(b1, t)),
    |p, g| {
        let d = select(g + weight_decay * p, g, weight_decay == 0.0);
        m = b1 * m + a1 * d;
        u = max(b2 * u, abs(d) + eps);
        p = p - select(size * m / u, 0.0, u == 0.0);
    },
);
