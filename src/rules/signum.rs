//! signSGD and Signum (Bernstein et al., 2018, Algorithms 1 and 2), <https://arxiv.org/abs/1802.04434>; the weight
//! decay, which is decoupled, is that of the authors' next paper, <https://arxiv.org/abs/1810.05291>.

use crate::rule::{direction, rule};

rule!(
    SignSgd,
    hyper(lr, weight_decay),
    state(),
    |t| scalars(keep = 1.0 - lr * weight_decay),
    |p, g| {
        p = keep * p - lr * direction(g);
    },
);

rule!(
    Signum,
    hyper(lr, momentum, weight_decay),
    state(m),
    |t| scalars(fresh = 1.0 - momentum, keep = 1.0 - lr * weight_decay),
    |p, g| {
        m = momentum * m + fresh * g;
        p = keep * p - lr * direction(m);
    },
);
