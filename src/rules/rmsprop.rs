//! `RMSprop` (Tieleman & Hinton, 2012, Lecture 6e),
//! <https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf>; centered: Graves (2013),
//! <https://arxiv.org/abs/1308.0850>. A variance that rounding makes negative counts as zero; where the square of
//! a gradient saturates, the gradient that is averaged does, too, or the variance would be far from one.
//! Where the denominator is zero, the gradient's square or variance is, and the update is zero.

use crate::rule::{finite, max, rule, select, sign, sqrt};

rule!(
    RMSprop,
    hyper(lr, alpha, eps, weight_decay),
    state(v),
    |t| scalars(rest = 1.0 - alpha),
    |p, g| {
        let d = select(g + weight_decay * p, g, weight_decay == 0.0);
        v = finite(alpha * v + rest * (d * d));
        let z = sqrt(v) + eps;
        p = p - lr * select(d / z, 0.0, z == 0.0);
    },
);

rule!(
    RMSpropMomentum,
    hyper(lr, alpha, eps, weight_decay, momentum),
    state(v, b),
    |t| scalars(rest = 1.0 - alpha),
    |p, g| {
        let d = select(g + weight_decay * p, g, weight_decay == 0.0);
        v = finite(alpha * v + rest * (d * d));
        let z = sqrt(v) + eps;
        b = momentum * b + select(d / z, 0.0, z == 0.0);
        p = p - lr * b;
    },
);

rule!(
    RMSpropCentered,
    hyper(lr, alpha, eps, weight_decay),
    state(m, v),
    |t| scalars(rest = 1.0 - alpha),
    |p, g| {
        let d = select(g + weight_decay * p, g, weight_decay == 0.0);
        let q = finite(d * d);
        m = alpha * m + rest * select(d, sign(d) * sqrt(q), q < d * d);
        v = finite(alpha * v + rest * q);
        let z = sqrt(max(0.0, v - m * m)) + eps;
        p = p - lr * select(d / z, 0.0, z == 0.0);
    },
);

rule!(
    RMSpropCenteredMomentum,
    hyper(lr, alpha, eps, weight_decay, momentum),
    state(m, v, b),
    |t| scalars(rest = 1.0 - alpha),
    |p, g| {
        let d = select(g + weight_decay * p, g, weight_decay == 0.0);
        let q = finite(d * d);
        m = alpha * m + rest * select(d, sign(d) * sqrt(q), q < d * d);
        v = finite(alpha * v + rest * q);
        let z = sqrt(max(0.0, v - m * m)) + eps;
        b = momentum * b + select(d / z, 0.0, z == 0.0);
        p = p - lr * b;
    },
);
