//! Prodigy (Mishchenko & Defazio, 2023, the version for Adam), <https://arxiv.org/abs/2306.06101>, over all leaves at
//! once; the paper's `r` is `d_numerator`.
//! From the authors' code: `eps` is scaled by the new `d` (the paper: the old), decay is decoupled and at the old `d`,
//! and nothing moves until there was a gradient. Such a step counts in the bias correction here and not there; with
//! `lr` zero, averages go on here and stand still there.
//! Where the denominator is zero, the gradient's square is, and the update is the decay alone.

use crate::rule::{abs, complement, finite, rule, select, sqrt, wide};

rule!(
    Prodigy,
    hyper(
        lr, b1, b2, beta3, eps, weight_decay, d0, d_coef, growth_rate, use_bias_correction, safeguard_warmup
    ),
    state(m, v, s),
    weights(p0),
    carry(d, d_max, d_numerator),
    |t| scalars(
        first = if t > 1.0 { 0.0 } else { 1.0 },
        before = if d == 0.0 { d0 } else { d },
        bias = if use_bias_correction > 0.0 { complement(b2, t).sqrt() / complement(b1, t) } else { 1.0 },
        rate = before * lr * bias,
        a1 = before * (1.0 - b1),
        a2 = before * before * (1.0 - b2),
        a3 = before / d0 * (if safeguard_warmup > 0.0 { before } else { rate }),
        seen = if norm == 0.0 { 0.0 } else { 1.0 },
        weight = before / d0 * rate,
        numerator = beta3 * d_numerator + along,
        hat = if seen > 0.0 { d_coef * numerator / norm } else { 0.0 },
        d_max = (if d_max == 0.0 { d0 } else { d_max }).max(hat),
        grown = growth_rate * (if before > d0 { before } else { before.max(hat) }),
        d = if seen > 0.0 { d_max.min(grown) } else { before },
        d_numerator = if seen > 0.0 { numerator } else { d_numerator },
        step = seen * rate,
        keep = 1.0 - step * weight_decay,
        floor = d * eps,
    ),
    measure All(along, norm) |p, g| {
        p0 = select(p0, p, first > 0.0);
        m = b1 * m + a1 * g;
        v = finite(b2 * v + a2 * (g * g));
        s = beta3 * s + a3 * g;
        along = select(wide(weight) * (wide(g) * wide(p0 - p)), 0.0, p0 == p);
        norm = wide(abs(s));
    },
    |p, g| {
        let z = sqrt(v) + floor;
        p = keep * p - select(step * m / z, 0.0, z == 0.0);
    },
);
