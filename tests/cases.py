"""The one table of rules: a rule with its oracle, and with torch's optimizer where torch has it.

A new rule is one row, or one for each of its kernels, and gets every test.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest

import lookstep as ls
import reference


@dataclass(frozen=True)
class Case:
    """A rule, the function of `reference.py` that it is held to, and the name of its class in torch.optim."""

    rule: Any
    reference: Callable[..., Any]
    torch: str

    @property
    def hyper(self) -> dict[str, Any]:
        return {field.name: getattr(self.rule, field.name) for field in fields(self.rule)}

    @property
    def oracle(self) -> Callable[..., Any]:
        """`oracle(p, g, state, t) -> p`, in float64."""
        hyper = self.hyper
        sign = -1 if hyper.pop("maximize") else 1
        return lambda p, g, state, t: self.reference(p, sign * g, state, t, **hyper)


CASES = {
    "sgd": Case(ls.SGD(lr=0.1), reference.sgd, "SGD"),
    "sgd-decay": Case(ls.SGD(lr=0.1, weight_decay=0.3), reference.sgd, "SGD"),
    "sgd-momentum": Case(ls.SGD(lr=0.1, momentum=0.9), reference.sgd, "SGD"),
    "sgd-dampening": Case(ls.SGD(lr=0.1, momentum=0.8, dampening=0.3, weight_decay=0.1), reference.sgd, "SGD"),
    "sgd-nesterov": Case(ls.SGD(lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True), reference.sgd, "SGD"),
    "adam": Case(ls.Adam(lr=0.1), reference.adam, "Adam"),
    "adam-decay": Case(ls.Adam(lr=0.1, betas=(0.8, 0.99), eps=1e-3, weight_decay=0.3), reference.adam, "Adam"),
    "adam-amsgrad": Case(ls.Adam(lr=0.1, betas=(0.9, 0.5), weight_decay=0.1, amsgrad=True), reference.adam, "Adam"),
    "adamw": Case(ls.AdamW(lr=0.1), reference.adamw, "AdamW"),
    "adamw-amsgrad": Case(ls.AdamW(lr=0.1, betas=(0.9, 0.5), eps=1e-4, amsgrad=True), reference.adamw, "AdamW"),
    "radam": Case(ls.RAdam(lr=0.1), reference.radam, "RAdam"),
    "radam-decay": Case(ls.RAdam(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3), reference.radam, "RAdam"),
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])
