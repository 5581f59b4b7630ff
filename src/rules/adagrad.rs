//! Adagrad (Duchi, Hazan & Singer, 2011), <https://jmlr.org/papers/v12/duchi11a.html>, with torch's decay of `lr`.
//! Where the denominator is zero, so is every gradient so far, and the update is zero.

use crate::rule::{finite, rule, select, sqrt};

rule!(
    Adagrad,
    hyper(lr, lr_decay, weight_decay, initial_accumulator_value, eps),
    state(v),
    |t| scalars(
        first = if t > 1.0 { 0.0 } else { 1.0 },
        size = lr / (1.0 + (t - 1.0) * lr_decay),
    ),
    |p, g| {
        let d = select(g + weight_decay * p, g, weight_decay == 0.0);
        v = finite(select(v, initial_accumulator_value, first > 0.0) + d * d);
        let z = sqrt(v) + eps;
        p = p - select(size * d / z, 0.0, z == 0.0);
    },
);
