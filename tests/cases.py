"""The one table of rules: a rule with its oracle, and with torch's optimizer and optax's where they have it.

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
    """A rule, the function of `reference.py` that it is held to, and its peers."""

    rule: Any
    reference: Callable[..., Any]
    torch: str | None = None
    """The name of its class in torch.optim."""
    optax: Callable[[Any], Any] | None = None
    """Makes optax's transformation, of the module."""
    authors: tuple[str, str] | None = None
    """The package with its authors' code, on torch, and the class there."""
    whole: bool = False
    """Whether an element's step depends on its whole leaf, so that what is not finite reaches all of it."""

    @property
    def hyper(self) -> dict[str, Any]:
        return {field.name: getattr(self.rule, field.name) for field in fields(self.rule)}

    @property
    def oracle(self) -> Callable[..., Any]:
        """`oracle(p, g, state, t) -> p`, in float64."""
        return self.oracle_in(float)

    def oracle_in(self, number: Callable[[float], Any]) -> Callable[..., Any]:
        """`oracle(p, g, state, t) -> p` with hyper-parameters of a wider type."""

        def of_type(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(of_type, value))
            return number(value) if isinstance(value, float) else value

        hyper = {name: of_type(value) for name, value in self.hyper.items()}
        sign = -1 if hyper.pop("maximize") else 1
        return lambda p, g, state, t: self.reference(p, sign * g, state, t, **hyper)


def yogi_of_optax(optax: Any) -> Any:
    """Yogi of optax with `m` from zero on, where optax starts it at the second moment's initial value."""
    import jax

    inner = optax.yogi(0.1, b1=0.8, b2=0.9, eps=1e-2)

    def init(params: Any) -> Any:
        first, *rest = inner.init(params)
        return (first._replace(mu=jax.numpy.zeros_like(params)), *rest)

    return optax.GradientTransformation(init, inner.update)


def adabelief_of_optax(optax: Any) -> Any:
    """AdaBelief of optax with decoupled decay, which it leaves to be chained."""
    return optax.chain(
        optax.scale_by_belief(b1=0.8, b2=0.9, eps=1e-3, eps_root=1e-3),
        optax.add_decayed_weights(0.3),
        optax.scale_by_learning_rate(0.1),
    )


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
    "lion": Case(
        ls.Lion(lr=0.1),
        reference.lion,
        optax=lambda optax: optax.lion(0.1, weight_decay=0.0),
    ),
    "lion-decay": Case(
        ls.Lion(lr=0.1, betas=(0.8, 0.7), weight_decay=0.3),
        reference.lion,
        optax=lambda optax: optax.lion(0.1, b1=0.8, b2=0.7, weight_decay=0.3),
    ),
    "signsgd": Case(
        ls.Signum(lr=0.1, momentum=0.0),
        reference.signum,
        optax=lambda optax: optax.sign_sgd(0.1),
    ),
    "signum": Case(
        ls.Signum(lr=0.1),
        reference.signum,
        optax=lambda optax: optax.signum(0.1),
    ),
    "signum-decay": Case(ls.Signum(lr=0.1, momentum=0.7, weight_decay=0.3), reference.signum),
    "adabelief": Case(
        ls.AdaBelief(lr=0.1),
        reference.adabelief,
        optax=lambda optax: optax.adabelief(0.1),
    ),
    "adabelief-decay": Case(
        ls.AdaBelief(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3),
        reference.adabelief,
        optax=adabelief_of_optax,
    ),
    "yogi": Case(
        ls.Yogi(lr=0.1, betas=(0.8, 0.9), eps=1e-2),
        reference.yogi,
        optax=yogi_of_optax,
    ),
    "yogi-decay": Case(ls.Yogi(lr=0.1, weight_decay=0.3, initial_accumulator_value=0.1), reference.yogi),
    # optax's Adan is another: it takes 1 - b2 where the paper, whose betas are 1 minus these, has what is b2 here.
    "adan": Case(ls.Adan(lr=0.1), reference.adan),
    "adan-decay": Case(ls.Adan(lr=0.1, betas=(0.9, 0.8, 0.7), eps=1e-3, weight_decay=0.3), reference.adan),
    "adan-decay-first": Case(
        ls.Adan(lr=0.1, betas=(0.9, 0.8, 0.7), eps=1e-3, weight_decay=0.3, no_prox=True),
        reference.adan,
    ),
    "schedule-free-sgd": Case(
        ls.ScheduleFreeSGD(lr=0.1),
        reference.schedule_free_sgd,
        authors=("schedulefree", "SGDScheduleFree"),
        optax=lambda optax: optax.contrib.schedule_free_sgd(0.1),
    ),
    "schedule-free-sgd-decay": Case(
        ls.ScheduleFreeSGD(lr=0.1, momentum=0.7, weight_decay=0.3, warmup_steps=10, r=1.5, weight_lr_power=1.0),
        reference.schedule_free_sgd,
        authors=("schedulefree", "SGDScheduleFree"),
    ),
    "schedule-free-adamw": Case(
        ls.ScheduleFreeAdamW(lr=0.1, eps=1e-6),
        reference.schedule_free_adamw,
        authors=("schedulefree", "AdamWScheduleFree"),
        optax=lambda optax: optax.contrib.schedule_free_adamw(0.1, eps=1e-6),
    ),
    "schedule-free-adamw-decay": Case(
        ls.ScheduleFreeAdamW(lr=0.1, betas=(0.8, 0.9), weight_decay=0.3, warmup_steps=10, r=0.5),
        reference.schedule_free_adamw,
        authors=("schedulefree", "AdamWScheduleFree"),
    ),
    "lars": Case(
        ls.LARS(lr=10.0),
        reference.lars,
        optax=lambda optax: optax.lars(10.0),
        whole=True,
    ),
    "lars-decay": Case(
        ls.LARS(lr=1.0, momentum=0.7, weight_decay=0.3, trust_coefficient=0.1), reference.lars, whole=True
    ),
    "lamb": Case(
        ls.LAMB(lr=0.1, weight_decay=0.0),
        reference.lamb,
        optax=lambda optax: optax.lamb(0.1),
        whole=True,
    ),
    "lamb-decay": Case(
        ls.LAMB(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3),
        reference.lamb,
        optax=lambda optax: optax.lamb(0.1, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.3),
        whole=True,
    ),
    "prodigy": Case(ls.Prodigy(d0=1e-2), reference.prodigy, authors=("prodigyopt", "Prodigy")),
    "prodigy-decay": Case(
        ls.Prodigy(betas=(0.8, 0.9), beta3=0.7, eps=1e-6, weight_decay=0.3, d0=1e-2, use_bias_correction=True),
        reference.prodigy,
        authors=("prodigyopt", "Prodigy"),
        optax=lambda optax: optax.contrib.prodigy(
            1.0, (0.8, 0.9), beta3=0.7, eps=1e-6, weight_decay=0.3, estim_lr0=1e-2
        ),
    ),
    "prodigy-decay-growth": Case(
        ls.Prodigy(lr=0.5, weight_decay=0.3, d0=1e-2, d_coef=2.0, growth_rate=1.1, safeguard_warmup=True),
        reference.prodigy,
        authors=("prodigyopt", "Prodigy"),
    ),
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])
