//! LARS (You, Gitman & Ginsburg, 2017, Algorithm 1), <https://arxiv.org/abs/1708.03888>. The paper's momentum `v` is
//! `m` here.
//! Where the weights or the gradients of a leaf are all zero, which the paper leaves open, the trust is 1, as in the
//! authors' code.

use crate::rule::{rule, select, wide};

rule!(
    Lars,
    hyper(lr, momentum, weight_decay, trust_coefficient),
    state(m),
    |t| scalars(rate = lr * trust(trust_coefficient, weight_decay, pp.sqrt(), gg.sqrt())),
    measure Leaf(pp, gg) |p, g| {
        pp = wide(p) * wide(p);
        gg = wide(g) * wide(g);
    },
    |p, g| {
        let d = select(g + weight_decay * p, g, weight_decay == 0.0);
        m = momentum * m + rate * d;
        p = p - m;
    },
);

/// The local rate of a leaf whose weights have norm `p`, and whose gradients have norm `g`.
fn trust(coefficient: f64, weight_decay: f64, p: f64, g: f64) -> f64 {
    if p == 0.0 || g == 0.0 {
        1.0
    } else {
        coefficient * p / (g + weight_decay * p)
    }
}
