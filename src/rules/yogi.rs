//! Yogi (Zaheer et al., 2018, Algorithm 2),
//! <https://papers.nips.cc/paper/8186-adaptive-methods-for-nonconvex-optimization>.
//! As in the authors' code, and not in the paper: Adam's bias corrections, and `v` starts at 1e-6. As in the paper, and
//! not in the code: `m` starts at zero, so that no gradient is no step. Decay, which neither has, is Adam's.
//! Where the denominator is zero, the gradient's square is, and the update is zero.

use crate::rule::{complement, finite, rule, select, sign, sqrt};

rule!(
    Yogi,
    hyper(lr, b1, b2, eps, weight_decay, initial_accumulator_value),
    state(m, v),
    |t| scalars(
        a1 = 1.0 - b1,
        a2 = 1.0 - b2,
        first = if t > 1.0 { 0.0 } else { 1.0 },
        size = lr / complement(b1, t),
        root = 1.0 / complement(b2, t).sqrt(),
    ),
    |p, g| {
        let d = select(g + weight_decay * p, g, weight_decay == 0.0);
        let square = d * d;
        m = b1 * m + a1 * d;
        v = select(v, initial_accumulator_value, first > 0.0);
        v = finite(v - a2 * (sign(v - square) * square));
        let z = sqrt(v) * root + eps;
        p = p - select(size * m / z, 0.0, z == 0.0);
    },
);
