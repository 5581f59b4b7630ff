//! `AdamW` (Loshchilov & Hutter, 2019, Algorithm 2), <https://arxiv.org/abs/1711.05101>, with torch's decay, `lr` times
//! `weight_decay`.
//! Where the denominator is zero, `eps` and the gradient's square are, and the update is zero. That `eps` is asked for
//! first takes the question out of the loop where it is not zero: 12 % in cache.

use crate::rule::{complement, finite, max, rule, select, sqrt};

rule!(
    AdamW,
    hyper(lr, b1, b2, eps, weight_decay),
    state(m, v),
    |t| scalars(
        a1 = 1.0 - b1,
        a2 = 1.0 - b2,
        keep = 1.0 - lr * weight_decay,
        size = lr / complement(b1, t),
        root = 1.0 / complement(b2, t).sqrt(),
    ),
    |p, g| {
        m = b1 * m + a1 * g;
        v = finite(b2 * v + a2 * (g * g));
        let z = sqrt(v) * root + eps;
        p = keep * p - select(size * m / z, 0.0, eps == 0.0 && z == 0.0);
    },
);

rule!(
    AdamWAmsgrad,
    hyper(lr, b1, b2, eps, weight_decay),
    state(m, v, v_max),
    |t| scalars(
        a1 = 1.0 - b1,
        a2 = 1.0 - b2,
        keep = 1.0 - lr * weight_decay,
        size = lr / complement(b1, t),
        root = 1.0 / complement(b2, t).sqrt(),
    ),
    |p, g| {
        m = b1 * m + a1 * g;
        v = finite(b2 * v + a2 * (g * g));
        v_max = max(v_max, v);
        let z = sqrt(v_max) * root + eps;
        p = keep * p - select(size * m / z, 0.0, eps == 0.0 && z == 0.0);
    },
);
