//! Averaged SGD (Polyak & Juditsky, 1992), <https://doi.org/10.1137/0330046>, with the learning rates of Xu (2011),
//! <https://arxiv.org/abs/1107.2490>, in torch's form: the average starts after step `t0`, and is the weights until then.

use crate::rule::{rule, select};

rule!(
    Asgd,
    hyper(lr, lambd, alpha, t0, weight_decay),
    state(),
    weights(average),
    |t| scalars(
        eta = lr / libm::pow(1.0 + lambd * lr * (t - 1.0), alpha),
        keep = 1.0 - lambd * eta,
        mu = 1.0 / (t - 1.0 - t0).max(1.0),
    ),
    |p, g| {
        let d = select(g + weight_decay * p, g, weight_decay == 0.0);
        p = keep * p - eta * d;
        average = select(p, average + mu * (p - average), mu < 1.0);
    },
    evaluate |p| average,
);
