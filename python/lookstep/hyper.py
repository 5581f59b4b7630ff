"""Hyper-parameters: what each must be, by name, in one place for all rules."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Self

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


def _pairbelow_one(name: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, Sequence | np.ndarray) or np.ndim(value) == 0:
        raise TypeError(f"{name} must be 2 real numbers, got {type(value).__name__} {value!r}")
    values = tuple(value)
    if len(values) != 2:
        raise ValueError(f"{name} must have 2 values, got {len(values)}")
    return tuple(below_one(f"{name}[{i}]", value) for i, value in enumerate(values))


def positive_integer(name: str, value: Any) -> int:
    """An integer >= 1, as a plain int."""
    value = unwrapped(value)
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer >= 1, got {type(value).__name__} {value!r}")
    if not 1 <= int(value) < 2**63:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return int(value)


def flag(name: str, value: Any) -> bool:
    """True or False, as a plain bool."""
    if not isinstance(value, bool | np.bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__} {value!r}")
    return bool(value)


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "lr": at_least_zero,
    "betas": _pairbelow_one,
    "eps": at_least_zero,
    "weight_decay": at_least_zero,
    "momentum": below_one,
    "dampening": at_least_zero,
    "nesterov": flag,
    "amsgrad": flag,
    "sync_period": positive_integer,
    "slow_step": up_to_one,
}
"""What each hyper-parameter must be, by name: the one place for all rules."""


@dataclass(frozen=True)
class Rule:
    """What every rule has in common.

    Args:
        lr: learning rate, >= 0.
        betas: decay rates of the averages of the gradient and of its square, each in [0, 1).
        eps: added to the denominator, >= 0. Where the denominator is zero all the same, the update is zero.
        weight_decay: >= 0. Decoupled from the gradient in `AdamW` alone: elsewhere it is an L2 penalty.
        momentum: decay rate of the momentum buffer, in [0, 1).

    Raises:
        TypeError: if a hyper-parameter is of another type, or unknown.
        ValueError: if it is out of range.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuses unknown keywords before dataclass does, with the known ones."""
        known = [field.name for field in fields(cls)]
        for name in kwargs:
            if name not in known:
                from difflib import get_close_matches

                close = get_close_matches(name, known, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(known)}"
                raise TypeError(f"{cls.__name__} got an unexpected keyword {name!r} ({hint})")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Checks every hyper-parameter, and makes each the plain Python number that it stands for."""
        for field in fields(self):
            if check := CHECKS.get(field.name):
                object.__setattr__(self, field.name, check(field.name, getattr(self, field.name)))
