//! Schedule-Free SGD and `AdamW` (Defazio et al., 2024, Algorithm 1), <https://arxiv.org/abs/2405.15682>: `p` is the
//! paper's `y`, where gradients are taken; `x`, which is evaluated, follows from it and `z`.
//! From the authors' code: `y` moves by increments, so that weights that were moved from outside count; averages are
//! weighted by the largest rate so far and by `t^r`; decay acts at `y`, as L2 in SGD, decoupled in `AdamW`.
//! Where the denominator is zero, the gradient's square is, and the update is zero.

use crate::rule::{complement, finite, rule, select, sqrt};

rule!(
    ScheduleFreeSgd,
    hyper(lr, momentum, weight_decay, warmup_steps, r, weight_lr_power),
    state(),
    weights(z),
    carry(weight_sum, lr_max),
    |t| scalars(
        first = if t > 1.0 { 0.0 } else { 1.0 },
        rate = warm(lr, warmup_steps, t),
        lr_max = lr_max.max(rate),
        weight = weight(r, weight_lr_power, lr_max, t),
        weight_sum = weight_sum + weight,
        c = share(weight, weight_sum),
        slip = rate * ((1.0 - momentum) + momentum * c),
        beyond = 1.0 - 1.0 / momentum,
    ),
    |p, g| {
        z = select(z, p, first > 0.0);
        let d = select(g + weight_decay * p, g, weight_decay == 0.0);
        p = p + select(c * (z - p), 0.0, z == p) - slip * d;
        z = z - rate * d;
    },
    evaluate |p| p + select(beyond * (z - p), 0.0, z == p),
);

rule!(
    ScheduleFreeAdamW,
    hyper(lr, b1, b2, eps, weight_decay, warmup_steps, r, weight_lr_power),
    state(v),
    weights(z),
    carry(weight_sum, lr_max),
    |t| scalars(
        a2 = 1.0 - b2,
        root = 1.0 / complement(b2, t).sqrt(),
        first = if t > 1.0 { 0.0 } else { 1.0 },
        rate = warm(lr, warmup_steps, t),
        lr_max = lr_max.max(rate),
        weight = weight(r, weight_lr_power, lr_max, t),
        weight_sum = weight_sum + weight,
        c = share(weight, weight_sum),
        slip = rate * ((1.0 - b1) + b1 * c),
        beyond = 1.0 - 1.0 / b1,
    ),
    |p, g| {
        z = select(z, p, first > 0.0);
        v = finite(b2 * v + a2 * (g * g));
        let n = sqrt(v) * root + eps;
        let u = select(g / n, 0.0, n == 0.0);
        let d = select(u + weight_decay * p, u, weight_decay == 0.0);
        p = p + select(c * (z - p), 0.0, z == p) - slip * d;
        z = z - rate * d;
    },
    evaluate |p| p + select(beyond * (z - p), 0.0, z == p),
);

/// The rate of step `t`: it grows from `lr / warmup_steps`.
fn warm(lr: f64, warmup_steps: f64, t: f64) -> f64 {
    if t < warmup_steps {
        lr * (t / warmup_steps)
    } else {
        lr
    }
}

/// What step `t` weighs in the average.
fn weight(r: f64, weight_lr_power: f64, lr_max: f64, t: f64) -> f64 {
    libm::pow(t, r) * libm::pow(lr_max, weight_lr_power)
}

/// The part of the average that a step of this weight makes up.
fn share(weight: f64, weight_sum: f64) -> f64 {
    if weight_sum == 0.0 {
        0.0
    } else {
        weight / weight_sum
    }
}
