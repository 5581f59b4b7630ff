//! Adam (Kingma & Ba, 2015, Algorithm 1), <https://arxiv.org/abs/1412.6980>; `AMSGrad` (Reddi, Kale & Kumar, 2018),
//! <https://arxiv.org/abs/1904.09237>.
//! Where the denominator is zero, the gradient's square is, and the update is zero.

use crate::rule::{complement, finite, max, rule, select, sqrt};

rule!(
    Adam,
    hyper(lr, b1, b2, eps, weight_decay),
    state(m, v),
    |t| scalars(
        a1 = 1.0 - b1,
        a2 = 1.0 - b2,
        size = lr / complement(b1, t),
        root = 1.0 / complement(b2, t).sqrt(),
    ),
    |p, g| {
        let d = select(g + weight_decay * p, g, weight_decay == 0.0);
        m = b1 * m + a1 * d;
        v = finite(b2 * v + a2 * (d * d));
        let z = sqrt(v) * root + eps;
        p = p - select(size * m / z, 0.0, z == 0.0);
    },
);

rule!(
    AdamAmsgrad,
    hyper(lr, b1, b2, eps, weight_decay),
    state(m, v, v_max),
    |t| scalars(
        a1 = 1.0 - b1,
        a2 = 1.0 - b2,
        size = lr / complement(b1, t),
        root = 1.0 / complement(b2, t).sqrt(),
    ),
    |p, g| {
        let d = select(g + weight_decay * p, g, weight_decay == 0.0);
        m = b1 * m + a1 * d;
        v = finite(b2 * v + a2 * (d * d));
        v_max = max(v_max, v);
        let z = sqrt(v_max) * root + eps;
        p = p - select(size * m / z, 0.0, z == 0.0);
    },
);
