//! Lion (Chen et al., 2023, Algorithm 2), <https://arxiv.org/abs/2302.06675>; the authors' code is the same.

use crate::rule::{direction, rule};

rule!(
    Lion,
    hyper(lr, b1, b2, weight_decay),
    state(m),
    |t| scalars(a1 = 1.0 - b1, a2 = 1.0 - b2, keep = 1.0 - lr * weight_decay),
    |p, g| {
        let c = b1 * m + a1 * g;
        m = b2 * m + a2 * g;
        p = keep * p - lr * direction(c);
    },
);
