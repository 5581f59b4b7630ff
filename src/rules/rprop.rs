//! Rprop (Riedmiller & Braun, 1993), <https://doi.org/10.1109/ICNN.1993.298623>, in the form without backtracking (Igel &
//! Hüsken, 2003), <https://doi.org/10.1016/S0925-2312(01)00700-7>: where the sign changes, the step is skipped.
//! Of the last gradient only its sign matters, and only that is kept: a product of two small gradients would be zero.

use crate::rule::{max, min, rule, select, sign};

rule!(
    Rprop,
    hyper(lr, eta1, eta2, step_size1, step_size2),
    state(s, u),
    |t| scalars(first = if t > 1.0 { 0.0 } else { 1.0 }),
    |p, g| {
        let c = sign(g) * s;
        let eta = select(select(1.0, eta1, c < 0.0), eta2, c > 0.0);
        u = min(max(select(u, lr, first > 0.0) * eta, step_size1), step_size2);
        s = select(sign(g), 0.0, c < 0.0);
        p = p - s * u;
    },
);
