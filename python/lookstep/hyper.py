"""Hyper-parameters: what each must be, by name, in one place for all rules."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np


def unwrapped(value: Any) -> Any:
    """The scalar in an array without axes."""
    return value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value


def real(name: str, value: Any) -> float:
    """A real number, as a plain float."""
    value = unwrapped(value)
    if not isinstance(value, Real) or isinstance(value, bool | np.bool):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__} {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def finite(name: str, value: Any) -> float:
    """A finite number."""
    number = real(name, value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return number


def above_zero(name: str, value: Any) -> float:
    """A finite number > 0."""
    number = real(name, value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be finite and > 0, got {value!r}")
    return number


def at_least_zero(name: str, value: Any) -> float:
    """A finite number >= 0."""
    number = real(name, value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}")
    return number


def below_one(name: str, value: Any) -> float:
    """A number in [0, 1)."""
    number = real(name, value)
    if not 0 <= number < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")
    return number


def up_to_one(name: str, value: Any) -> float:
    """A number in [0, 1]."""
    number = real(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")
    return number


def within_one(name: str, value: Any) -> float:
    """A number in (0, 1)."""
    number = real(name, value)
    if not 0 < number < 1:
        raise ValueError(f"{name} must be in (0, 1), got {value!r}")
    return number


def at_least_one(name: str, value: Any) -> float:
    """A number >= 1, infinity included."""
    number = real(name, value)
    if not number >= 1:
        raise ValueError(f"{name} must be >= 1, got {value!r}")
    return number


def below_one_or_none(name: str, value: Any) -> float | None:
    """A number in [0, 1), or None for what follows from the others."""
    return None if value is None else below_one(name, value)


def each(*checks: Callable[[str, Any], float]) -> Callable[[str, Any], tuple[float, ...]]:
    """A check of as many numbers as there are checks."""

    def check(name: str, value: Any) -> tuple[float, ...]:
        if not isinstance(value, Sequence | np.ndarray) or np.ndim(value) == 0:
            raise TypeError(f"{name} must be {len(checks)} real numbers, got {type(value).__name__} {value!r}")
        values = tuple(value)
        if len(values) != len(checks):
            raise ValueError(f"{name} must have {len(checks)} values, got {len(values)}")
        return tuple(check(f"{name}[{i}]", value) for i, (check, value) in enumerate(zip(checks, values, strict=True)))

    return check


def pair_around_one(name: str, value: Any) -> tuple[float, ...]:
    """A number in (0, 1) and one over 1."""
    low, high = each(at_least_zero, at_least_zero)(name, value)
    if not 0 < low < 1 < high:
        raise ValueError(f"{name} must be a number in (0, 1) and one over 1, got {value!r}")
    return low, high


def pair_in_order(name: str, value: Any) -> tuple[float, ...]:
    """Two numbers >= 0, the smaller one first."""
    low, high = each(at_least_zero, at_least_zero)(name, value)
    if low > high:
        raise ValueError(f"{name} must be the smallest and the largest, got {value!r}")
    return low, high


def positive_integer(name: str, value: Any) -> int:
    """An integer >= 1, as a plain int."""
    value = unwrapped(value)
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer >= 1, got {type(value).__name__} {value!r}")
    if not 1 <= int(value) < 2**63:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return int(value)


def count(name: str, value: Any) -> int:
    """An integer >= 0, as a plain int."""
    if type(value) is int and value >= 0:  # Schedules are called with one at every step.
        return value
    value = unwrapped(value)
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer >= 0, got {type(value).__name__} {value!r}")
    if int(value) < 0:
        raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
    return int(value)


def some_steps(name: str, value: Any) -> int:
    """An integer >= 0 that is no larger than steps can be counted."""
    number = count(name, value)
    if number >= 2**63:
        raise ValueError(f"{name} must be an integer >= 0 and < 2**63, got {value!r}")
    return number


def flag(name: str, value: Any) -> bool:
    """True or False, as a plain bool."""
    if not isinstance(value, bool | np.bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__} {value!r}")
    return bool(value)


Check: TypeAlias = Callable[[str, Any], Any]
"""Takes a hyper-parameter's name and value; gives the plain Python value that it stands for, or raises."""

Scheduled: TypeAlias = float | Callable[[int], float]
"""A number, or what gives one for each step: a `Schedule`, or any function of the number of steps taken so far."""


def at_step(name: str, value: Any, step: int, check: Check | None = None) -> float:
    """What a hyper-parameter that may follow a schedule is at a step, counted from 0.

    Raises:
        TypeError, ValueError: if it is not what it must be, naming the step.
    """
    check = check or CHECKS[name]
    if not is_scheduled(value):
        number: float = check(name, value)
        return number
    now = value(step)
    try:
        number = check(name, now)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error} at step {step}, from {value!r}") from None
    return number


def is_scheduled(value: Any) -> bool:
    """Whether a value is a function of the step."""
    return callable(value) and not isinstance(value, type)


def _scheduled(name: str, value: Any) -> Scheduled:
    """A number, or a function of the step, of which the first value is checked."""
    first = at_step(name, value, 0)
    scheduled: Scheduled = value if is_scheduled(value) else first
    return scheduled


CHECKS: dict[str, Check] = {
    "lr": at_least_zero,
    "betas": each(below_one, below_one),
    "eps": at_least_zero,
    "weight_decay": at_least_zero,
    "momentum": below_one,
    "dampening": at_least_zero,
    "nesterov": flag,
    "amsgrad": flag,
    "decoupled_weight_decay": flag,
    "momentum_decay": at_least_zero,
    "lr_decay": at_least_zero,
    "initial_accumulator_value": at_least_zero,
    "rho": up_to_one,
    "alpha": up_to_one,
    "centered": flag,
    "etas": pair_around_one,
    "step_sizes": pair_in_order,
    "lambd": at_least_zero,
    "t0": at_least_zero,
    "no_prox": flag,
    "trust_coefficient": at_least_zero,
    "warmup_steps": some_steps,
    "r": at_least_zero,
    "weight_lr_power": at_least_zero,
    "beta3": below_one_or_none,
    "d0": above_zero,
    "d_coef": at_least_zero,
    "growth_rate": at_least_one,
    "use_bias_correction": flag,
    "safeguard_warmup": flag,
    "maximize": flag,
    "sync_period": positive_integer,
    "slow_step": up_to_one,
}
"""What each hyper-parameter must be, by name: the one place for all rules."""

SCHEDULED = ("lr", "weight_decay", "momentum", "slow_step")
"""What may follow a schedule."""


_ELSEWHERE = {
    "learning_rate": "lr",
    "optimizer": "inner",
    "base_optimizer": "inner",
    "fast_optimizer": "inner",
    "inner_optimizer": "inner",
    "k": "sync_period",
    "la_steps": "sync_period",
    "alpha": "slow_step",
    "la_alpha": "slow_step",
    "slow_step_size": "slow_step",
    "reset_state": "inner_state",
    "pullback_momentum": "inner_state",
}
"""What other libraries call it, for hints."""


def unexpected(what: str, name: str, known: Sequence[str]) -> str:
    """What to say of a keyword that is none of the known ones."""
    close = [here for here in [_ELSEWHERE.get(name)] if here in known] or get_close_matches(name, known, 1)
    if not close and _ELSEWHERE.get(name) == "inner" and "optimizer" in known:
        close = ["optimizer"]
    hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(known)}"
    return f"{what} got an unexpected keyword {name!r} ({hint})"


@dataclass(frozen=True)
class Checked:
    """Hyper-parameters that are checked by name, and refused by name where there are no such."""

    _checks: ClassVar[Mapping[str, Check]] = {}

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuses unknown keywords before dataclass does, with the known ones."""
        known = [field.name for field in fields(cls)]
        for name in kwargs:
            if name not in known:
                raise TypeError(unexpected(cls.__name__, name, known))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Checks every hyper-parameter, and makes each the plain Python number that it stands for."""
        for field in fields(self):
            if check := self._checks.get(field.name):
                object.__setattr__(self, field.name, check(field.name, getattr(self, field.name)))


@dataclass(frozen=True)
class Rule(Checked):
    """What every rule has in common.

    Args:
        lr: learning rate, >= 0.
        betas: decay rates of the averages of the gradient and of its square, each in [0, 1).
        eps: added to the denominator, >= 0. Where the denominator is zero all the same, the update is zero.
        weight_decay: >= 0. An L2 penalty that is added to the gradient, but for rules that say that it is decoupled.
        decoupled_weight_decay: shrink the parameter by `lr * weight_decay` instead, as `AdamW` does.
        momentum: decay rate of the momentum buffer, in [0, 1).
        maximize: climb: take the negative gradient in place of the gradient.

    Raises:
        TypeError: if a hyper-parameter is of another type, or unknown.
        ValueError: if it is out of range.
    """

    _checks: ClassVar[Mapping[str, Check]] = CHECKS | {name: _scheduled for name in SCHEDULED}
