//! LAMB (You et al., 2019, Algorithm 2), <https://arxiv.org/abs/1904.00962>, with the paper's bias corrections, which
//! later versions of the authors' code leave out, and without bounds on the norm of the weights: `phi` is the identity.
//! Where the weights or the updates of a leaf are all zero, which the paper leaves open, the trust is 1, as in their
//! code.
//! Where the denominator is zero, the gradient's square is, and the update is the decay alone.

use crate::rule::{complement, finite, rule, select, sqrt, wide};

rule!(
    Lamb,
    hyper(lr, b1, b2, eps, weight_decay),
    state(m, v),
    |t| scalars(
        a1 = 1.0 - b1,
        a2 = 1.0 - b2,
        whole = 1.0 / complement(b1, t),
        root = 1.0 / complement(b2, t).sqrt(),
        rate = if pp == 0.0 || uu == 0.0 { lr } else { lr * (pp.sqrt() / uu.sqrt()) },
    ),
    measure Leaf(pp, uu) |p, g| {
        m = b1 * m + a1 * g;
        v = finite(b2 * v + a2 * (g * g));
        let z = sqrt(v) * root + eps;
        let r = select(whole * m / z, 0.0, z == 0.0);
        let d = select(r + weight_decay * p, r, weight_decay == 0.0);
        pp = wide(p) * wide(p);
        uu = wide(d) * wide(d);
    },
    |p, g| {
        let z = sqrt(v) * root + eps;
        let r = select(whole * m / z, 0.0, z == 0.0);
        let d = select(r + weight_decay * p, r, weight_decay == 0.0);
        p = p - rate * d;
    },
);
