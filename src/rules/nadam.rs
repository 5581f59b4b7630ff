//! `NAdam` (Dozat, 2016), <https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ>, with the paper's momentum schedule.
//! Where the denominator is zero, the gradient's square is, and the update is zero.

use crate::rule::{complement, finite, rule, select, sqrt};

rule!(
    NAdam,
    hyper(
        lr,
        b1,
        b2,
        eps,
        weight_decay,
        momentum_decay,
        decoupled_weight_decay
    ),
    state(m, v),
    carry(mu_product),
    |t| scalars(
        a1 = 1.0 - b1,
        a2 = 1.0 - b2,
        coupled = weight_decay * (1.0 - decoupled_weight_decay),
        keep = 1.0 - lr * weight_decay * decoupled_weight_decay,
        lag = warmth(b1, momentum_decay, t),
        mu = b1 - lag,
        mu_next = b1 - warmth(b1, momentum_decay, t + 1.0),
        mu_product = if t > 1.0 { mu_product * mu } else { mu },
        size_g = lr * ((1.0 - b1) + lag) / (1.0 - mu_product),
        size_m = lr * mu_next / (1.0 - mu_product * mu_next),
        root = 1.0 / complement(b2, t).sqrt(),
    ),
    |p, g| {
        let d = select(g + coupled * p, g, coupled == 0.0);
        m = b1 * m + a1 * d;
        v = finite(b2 * v + a2 * (d * d));
        let z = sqrt(v) * root + eps;
        p = keep * p - select((size_g * d + size_m * m) / z, 0.0, z == 0.0);
    },
);

/// How far the paper's mu of step `t` is from `b1`: half of it at first. From `libm`, as [`complement`].
fn warmth(b1: f64, momentum_decay: f64, t: f64) -> f64 {
    b1 * 0.5 * libm::pow(0.96, t * momentum_decay)
}
