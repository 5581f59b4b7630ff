"""Lookahead and its inner optimizers, for people who train with plain arrays.

Fast weights are moved by any inner optimizer for `sync_period` steps; then slow weights move a fraction `slow_step`
toward them (Zhang, Lucas, Hinton & Ba, 2019, https://arxiv.org/abs/1907.08610). The step and the sync are one compiled
pass over the user's own NumPy arrays.
"""

from typing import TYPE_CHECKING, Any

from . import schedules
from ._core import __version__
from .lookahead import HeavyBall, Lookahead, Nesterov, OptimalSlowStep
from .optimizer import Optimizer
from .rules import (
    ASGD,
    LAMB,
    LARS,
    SGD,
    AdaBelief,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Adan,
    Lion,
    NAdam,
    Prodigy,
    RAdam,
    RMSprop,
    Rprop,
    ScheduleFreeAdamW,
    ScheduleFreeSGD,
    Signum,
    Yogi,
)

if TYPE_CHECKING:
    from . import gpu as gpu
    from . import keras as keras
    from . import optax as optax
    from . import thinc as thinc
    from . import torch as torch

__all__ = [
    "ASGD",
    "LAMB",
    "LARS",
    "SGD",
    "AdaBelief",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Adan",
    "HeavyBall",
    "Lion",
    "Lookahead",
    "NAdam",
    "Nesterov",
    "OptimalSlowStep",
    "Optimizer",
    "Prodigy",
    "RAdam",
    "RMSprop",
    "Rprop",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
    "Signum",
    "Yogi",
    "__version__",
    "schedules",
]


_FRAMEWORKS = ("gpu", "keras", "optax", "thinc", "torch")


def __getattr__(name: str) -> Any:
    """Imports what needs a framework when it is first used."""
    if name in _FRAMEWORKS:
        from importlib import import_module

        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
