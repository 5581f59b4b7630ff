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
/// With `x = -ln b2` it is `rho_inf - 2 t / (exp(t x) - 1)`, which early on is a small difference of large numbers. It is
/// also `t - 2 (E(t x) - E(x)) / x`, where `E(x) = x / (1 - exp(-x)) - 1 - x / 2` is small then. About `t x = 2`, each
/// takes away a third of what it takes it from.
fn rho(b2: f64, t: f64) -> f64 {
    let x = -libm::log(b2);
    if t * x < 2.0 {
        t - 2.0 * (beyond(t * x) - beyond(x)) / x
    } else {
        rho_inf(b2) - 2.0 * t / libm::expm1(t * x)
    }
}

/// `E`, which is `x / 2 coth(x / 2) - 1`, by the continued fraction of that, to the last digit up to two.
fn beyond(x: f64) -> f64 {
    let y = x * x / 4.0;
    let odd = [19.0, 17.0, 15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0];
    odd.into_iter().fold(0.0, |tail, n| y / (n + tail))
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
