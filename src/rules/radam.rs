//! `RAdam` (Liu et al., 2020, Algorithm 2), <https://arxiv.org/abs/1908.03265>, in torch's form: the step is adaptive
//! once rho is over 5 (the paper: 4).
//! Where the denominator is zero, the gradient's square is, and the update is zero.

use crate::rule::{complement, finite, rule, select, sqrt};

rule!(
    RAdam,
    hyper(lr, b1, b2, eps, weight_decay, decoupled_weight_decay),
    state(m, v),
    |t| scalars(
        a1 = 1.0 - b1,
        a2 = 1.0 - b2,
        coupled = weight_decay * (1.0 - decoupled_weight_decay),
        keep = 1.0 - lr * weight_decay * decoupled_weight_decay,
        adaptive = if rho(b2, t) > 5.0 { 1.0 } else { 0.0 },
        size = lr * rectified(b2, t) / complement(b1, t),
    ),
    |p, g| {
        let d = select(g + coupled * p, g, coupled == 0.0);
        m = b1 * m + a1 * d;
        v = finite(b2 * v + a2 * (d * d));
        let z = select(1.0, sqrt(v) + eps, adaptive > 0.0);
        p = keep * p - select(size * m / z, 0.0, z == 0.0);
    },
);

/// The paper's rho: the length of the simple average that the second moment stands for, at most `rho_inf`.
///
/// It is `rho_inf - 2 t (1 - c) / c` with `c = 1 - b2^t`, which early on is a small difference of large numbers. With
/// `x = -ln b2` it is also `t - 2 (E(t x) - E(x)) / x`, where `E(x) = x / (1 - exp(-x)) - 1 - x / 2` is small then.
fn rho(b2: f64, t: f64) -> f64 {
    let x = -libm::log(b2);
    if t * x < 0.25 {
        t - 2.0 * (bernoulli(t * x) - bernoulli(x)) / x
    } else {
        let c = complement(b2, t);
        rho_inf(b2) - 2.0 * t * (1.0 - c) / c
    }
}

/// `E` by its series in Bernoulli numbers, to the last digit below one quarter.
fn bernoulli(x: f64) -> f64 {
    let y = x * x;
    y * (1.0 / 12.0
        - y * (1.0 / 720.0 - y * (1.0 / 30_240.0 - y * (1.0 / 1_209_600.0 - y / 47_900_160.0))))
}

fn rho_inf(b2: f64) -> f64 {
    2.0 / (1.0 - b2) - 1.0
}

/// The paper's rectifier `r`, with the bias correction of `v`; 1 where the step is not adaptive.
fn rectified(b2: f64, t: f64) -> f64 {
    let (rho, inf) = (rho(b2, t), rho_inf(b2));
    if rho > 5.0 {
        let squared = (rho - 4.0) * (rho - 2.0) * inf / ((inf - 4.0) * (inf - 2.0) * rho);
        (squared * complement(b2, t)).sqrt()
    } else {
        1.0
    }
}
