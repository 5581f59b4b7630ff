//! SGD with momentum (Sutskever et al., 2013), <https://proceedings.mlr.press/v28/sutskever13.html>, in torch's form.

use crate::rule::{rule, select};

rule!(
    Sgd,
    hyper(lr, weight_decay),
    state(),
    |t| scalars(),
    |p, g| {
        let d = select(g + weight_decay * p, g, weight_decay == 0.0);
        p = p - lr * d;
    },
);

rule!(
    SgdMomentum,
    hyper(lr, momentum, dampening, weight_decay),
    state(m),
    |t| scalars(fresh = if t > 1.0 { 1.0 - dampening } else { 1.0 }),
    |p, g| {
        let d = select(g + weight_decay * p, g, weight_decay == 0.0);
        m = momentum * m + fresh * d;
        p = p - lr * m;
    },
);

rule!(
    SgdNesterov,
    hyper(lr, momentum, weight_decay),
    state(m),
    |t| scalars(),
    |p, g| {
        let d = select(g + weight_decay * p, g, weight_decay == 0.0);
        m = momentum * m + d;
        p = p - lr * (d + momentum * m);
    },
);
