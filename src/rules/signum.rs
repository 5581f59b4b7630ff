//! signSGD and Signum (Bernstein et al., 2018, Algorithms 1 and 2), <https://arxiv.org/abs/1802.04434>; the weight
//! decay, which is decoupled, is that of the authors' next paper, <https://arxiv.org/abs/1810.05291>.
//! An infinite gradient has a sign as well: `0.0 * m` makes it a NaN, where it would pass for a step like any other.

use crate::rule::{rule, sign};

rule!(
    SignSgd,
    hyper(lr, weight_decay),
    state(),
    |t| scalars(keep = 1.0 - lr * weight_decay),
    |p, g| {
        p = keep * p - lr * (sign(g) + 0.0 * g);
    },
);

rule!(
    Signum,
    hyper(lr, momentum, weight_decay),
    state(m),
    |t| scalars(fresh = 1.0 - momentum, keep = 1.0 - lr * weight_decay),
    |p, g| {
        m = momentum * m + fresh * g;
        p = keep * p - lr * (sign(m) + 0.0 * m);
    },
);
