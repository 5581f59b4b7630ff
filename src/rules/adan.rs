//! Adan (Xie et al., 2022, Algorithm 1), <https://arxiv.org/abs/2208.06677>, with the decays of the authors' code: 1
//! minus the paper's. The paper's `v` and `n` are `d` and `v` here, where `v` is never negative.
//! From the code: the averages start at zero and are corrected (the paper: they start at the first gradient), the root
//! is taken before `eps` is added (the paper: after), and the choice of decays, `no_prox`.
//! Where the denominator is zero, the gradients are, and the update is zero.

use crate::rule::{complement, finite, rule, select, sqrt};

rule!(
    Adan,
    hyper(lr, b1, b2, b3, eps, weight_decay, no_prox),
    state(m, d, v, g_prev),
    |t| scalars(
        a1 = 1.0 - b1,
        a2 = 1.0 - b2,
        a3 = 1.0 - b3,
        first = if t > 1.0 { 0.0 } else { 1.0 },
        prox = 1.0 / (1.0 + lr * weight_decay),
        keep = if no_prox > 0.0 { 1.0 - lr * weight_decay } else { prox },
        rate = if no_prox > 0.0 { lr } else { lr * prox },
        size = rate / complement(b1, t),
        size_d = rate * b2 / complement(b2, t),
        root = 1.0 / complement(b3, t).sqrt(),
    ),
    |p, g| {
        let change = select(g - g_prev, 0.0, first > 0.0);
        let ahead = g + b2 * change;
        m = b1 * m + a1 * g;
        d = b2 * d + a2 * change;
        v = finite(b3 * v + a3 * (ahead * ahead));
        g_prev = g;
        let z = sqrt(v) * root + eps;
        p = keep * p - select((size * m + size_d * d) / z, 0.0, z == 0.0);
    },
);
