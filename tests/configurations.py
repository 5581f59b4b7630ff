"""Random hyper-parameters, by name: what every rule is compared with its peers over."""

import math
from dataclasses import fields


def power(low, high):
    """A number between two, as likely in one decade as in another."""
    return lambda rng: low * (high / low) ** rng.random()


def between(low, high):
    return lambda rng: rng.uniform(low, high)


def or_else(value, draw):
    """This value once in three times: many a rule does another thing then."""
    return lambda rng: value if rng.random() < 1 / 3 else draw(rng)


def or_zero(draw):
    return or_else(0.0, draw)


def flag(rng):
    return bool(rng.integers(2))


# Where gradients are noise, an average over too few of them can be all of one size: a centered second moment is then a
# small difference, and nothing that two programs could agree on. So alpha is not small. Nor is eps zero: torch's 0/0.
DRAWS = {
    "lr": power(1e-3, 0.5),
    "betas": lambda rng, n: (*rng.uniform(0, 0.99, n - 1).tolist(), 1 - power(3e-4, 0.5)(rng)),
    "eps": power(1e-10, 1e-2),
    "weight_decay": or_zero(power(1e-3, 0.5)),
    "momentum": or_zero(between(0.1, 0.99)),
    "dampening": or_zero(between(0, 0.9)),
    "momentum_decay": or_zero(power(1e-3, 1)),
    "lr_decay": or_zero(power(1e-3, 1)),
    "initial_accumulator_value": or_zero(power(1e-3, 10)),
    "rho": between(0.5, 0.999),
    "alpha": between(0.8, 0.999),
    "etas": lambda rng: (rng.uniform(0.1, 0.9), rng.uniform(1.05, 2)),
    "step_sizes": lambda rng: (power(1e-6, 1e-2)(rng), power(1e-1, 50)(rng)),
    "lambd": or_zero(power(1e-4, 0.3)),
    "t0": lambda rng: float(rng.integers(60)),
    "trust_coefficient": power(1e-3, 1),
    "warmup_steps": lambda rng: int(rng.integers(60)),
    "r": or_zero(between(0.1, 2)),
    "weight_lr_power": or_zero(between(0.5, 3)),
    "beta3": or_else(None, between(0, 0.999)),
    "d0": power(1e-6, 1e-1),
    "d_coef": power(0.1, 10),
    "growth_rate": or_else(math.inf, between(1, 2)),
}


def draw_of(field):
    """Draws a hyper-parameter."""
    if isinstance(field.default, bool):
        return flag
    if field.name == "betas":
        return lambda rng: DRAWS["betas"](rng, len(field.default))
    return DRAWS[field.name]


def random_rule(rule, rng):
    """One of class `rule`."""
    draws = {field.name: draw_of(field) for field in fields(rule)}
    while True:
        try:
            return rule(**{name: draw(rng) for name, draw in draws.items()})
        except ValueError:  # One hyper-parameter needs another: nesterov does.
            continue


def random_shapes(rng):
    """Shapes of up to three axes, an empty one among them."""
    return [(), (1,), (0, 3), *(tuple(rng.integers(1, most, axes)) for axes, most in ((1, 80), (2, 12), (3, 6)))]
