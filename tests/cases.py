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
    "adam-decoupled": Case(ls.Adam(lr=0.1, weight_decay=0.2, decoupled_weight_decay=True), reference.adam, "Adam"),
    "adam-decoupled-amsgrad": Case(
        ls.Adam(lr=0.1, betas=(0.8, 0.5), weight_decay=0.2, amsgrad=True, decoupled_weight_decay=True),
        reference.adam,
        "Adam",
    ),
    "adamw": Case(ls.AdamW(lr=0.1), reference.adamw, "AdamW"),
    "adamw-amsgrad": Case(ls.AdamW(lr=0.1, betas=(0.9, 0.5), eps=1e-4, amsgrad=True), reference.adamw, "AdamW"),
    "radam": Case(ls.RAdam(lr=0.1), reference.radam, "RAdam"),
    "radam-decay": Case(ls.RAdam(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3), reference.radam, "RAdam"),
    "radam-decoupled": Case(
        ls.RAdam(lr=0.1, betas=(0.8, 0.9), weight_decay=0.3, decoupled_weight_decay=True), reference.radam, "RAdam"
    ),
    "nadam": Case(ls.NAdam(lr=0.1), reference.nadam, "NAdam"),
    "nadam-decay": Case(
        ls.NAdam(lr=0.1, betas=(0.8, 0.99), eps=1e-3, weight_decay=0.3, momentum_decay=0.1), reference.nadam, "NAdam"
    ),
    "nadam-decoupled": Case(ls.NAdam(lr=0.1, weight_decay=0.3, decoupled_weight_decay=True), reference.nadam, "NAdam"),
    "adamax": Case(ls.Adamax(lr=0.1), reference.adamax, "Adamax"),
    "adamax-decay": Case(ls.Adamax(lr=0.1, betas=(0.8, 0.7), eps=1e-3, weight_decay=0.3), reference.adamax, "Adamax"),
    "adagrad": Case(ls.Adagrad(lr=0.3), reference.adagrad, "Adagrad"),
    "adagrad-initial": Case(ls.Adagrad(lr=0.3, initial_accumulator_value=0.5), reference.adagrad, "Adagrad"),
    "adagrad-decay": Case(ls.Adagrad(lr=0.3, lr_decay=0.1, weight_decay=0.3, eps=1e-3), reference.adagrad, "Adagrad"),
    "adadelta": Case(ls.Adadelta(), reference.adadelta, "Adadelta"),
    "adadelta-decay": Case(ls.Adadelta(lr=0.5, rho=0.8, eps=1e-2, weight_decay=0.3), reference.adadelta, "Adadelta"),
    "rmsprop": Case(ls.RMSprop(lr=0.1), reference.rmsprop, "RMSprop"),
    "rmsprop-decay": Case(ls.RMSprop(lr=0.1, alpha=0.8, eps=1e-3, weight_decay=0.3), reference.rmsprop, "RMSprop"),
    "rmsprop-momentum": Case(ls.RMSprop(lr=0.1, momentum=0.9), reference.rmsprop, "RMSprop"),
    "rmsprop-centered": Case(ls.RMSprop(lr=0.1, centered=True), reference.rmsprop, "RMSprop"),
    "rmsprop-centered-momentum": Case(
        ls.RMSprop(lr=0.1, alpha=0.8, momentum=0.5, centered=True), reference.rmsprop, "RMSprop"
    ),
    "rprop": Case(ls.Rprop(lr=0.1), reference.rprop, "Rprop"),
    "rprop-clipped": Case(ls.Rprop(lr=0.1, etas=(0.3, 1.7), step_sizes=(0.01, 0.3)), reference.rprop, "Rprop"),
    "asgd": Case(ls.ASGD(lr=0.1), reference.asgd, "ASGD"),
    "asgd-average": Case(ls.ASGD(lr=0.1, lambd=0.1, alpha=0.5, t0=10.0), reference.asgd, "ASGD"),
    "asgd-decay": Case(ls.ASGD(lr=0.1, lambd=0.1, weight_decay=0.3, t0=0.0), reference.asgd, "ASGD"),
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])
