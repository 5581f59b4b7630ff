//! `AdaBelief` (Zhuang et al., 2020, Algorithm 2), <https://arxiv.org/abs/2010.07468>: `eps` is added inside the
//! running average, each step anew, and once more to its root. The paper's `s` is `v` here.
//! From the authors' code: `eps` 1e-16 (the paper: 1e-8) and decoupled decay; not from it: `RAdam`'s rectification.
//! Where the denominator is zero, the update is zero.

use crate::rule::{complement, finite, rule, select, sqrt};

rule!(
    AdaBelief,
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
        // The gradient less its new average, without the digits that these have in common where b1 is small.
        let surprise = b1 * (g - m);
        m = b1 * m + a1 * g;
        // Compilers of shaders do not add `eps` to another part of the sum first where that part is made finite.
        v = finite(finite(b2 * v + a2 * (surprise * surprise)) + eps);
        let z = sqrt(v) * root + eps;
        p = keep * p - select(size * m / z, 0.0, eps == 0.0 && z == 0.0);
    },
);
