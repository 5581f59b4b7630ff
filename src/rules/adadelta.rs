//! Adadelta (Zeiler, 2012, Algorithm 1), <https://arxiv.org/abs/1212.5701>, with torch's `lr`.
//! Where the denominator is zero, the gradient's square is, and the update is zero.

use crate::rule::{finite, rule, select, sqrt};

rule!(
    Adadelta,
    hyper(lr, rho, eps, weight_decay),
    state(v, u),
    |t| scalars(rest = 1.0 - rho),
    |p, g| {
        let d = select(g + weight_decay * p, g, weight_decay == 0.0);
        v = finite(rho * v + rest * (d * d));
        let z = sqrt(v + eps);
        let x = select(sqrt(u + eps) / z * d, 0.0, z == 0.0);
        u = finite(rho * u + rest * (x * x));
        p = p - lr * x;
    },
);
