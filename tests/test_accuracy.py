"""A step is its paper's to a few ulp, also after 2^31 of them.

What is bound is the arithmetic of a step. So each step is taken again from the state that ours was in, in 80 bits, and
each number that comes out of it (parameter, state, what is carried to the next step) is compared. It may be off by a
few ulp of its scale, eps times

    |x| + max(|change of x|, the sum over inputs of |input * d(change of x) / d(input)|)

where inputs are the gradient, the parameter, state and what is carried. Where no terms cancel, the sum is about the
change itself. Where they do (a gradient and its decay, an average of gradients of both signs, a centered second
moment), it is what an error of one ulp in each input makes of them, which no order of operations avoids.

The derivatives are differences over 8 ulp. So a sign that rounding can change (Lion, Signum, Yogi) has a scale that
allows for it, as has the kink of a maximum. The sums over a leaf of LARS and LAMB have positive terms, and need
nothing else; that of Prodigy, and no other, has terms of both signs, and each of its inputs is moved to where they
add up.
"""

from dataclasses import replace

import numpy as np
import pytest

import lookstep as ls
from cases import CASES, every_case, every_dtype
from configurations import random_rule

WIDE = np.longdouble
MOST = {"float64": 6, "float32": 4}
"""Ulp. In float64, a scalar is off by an ulp or two more; in float32, it is rounded once."""
RULES = {type(case.rule).__name__: case for case in CASES.values()}
"""A case for each class of rules."""
CONFIGURATIONS = -(-600 // len(RULES))
"""For each class."""
CHECKED = {*range(1, 9), 16, 32, 64, 128, 256}
"""Steps of a run that are compared."""
HEAVY = [
    ls.RAdam(lr=0.5, betas=(0.99, 0.9999)),
    ls.NAdam(lr=0.5, betas=(0.99, 0.999), momentum_decay=1.0),
    ls.NAdam(lr=0.5, betas=(0.999, 0.9999), momentum_decay=0.3),
    ls.ScheduleFreeSGD(lr=0.5, momentum=0.99),
    ls.ScheduleFreeAdamW(lr=0.5, betas=(0.999, 0.9)),
]
"""Rules with scalars that are small differences late in a run, which as the paper writes them would lose digits."""
COUNTS = [2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**31 + 1, 2**53 + 1]
CARRY = {
    ls.NAdam: ("mu_product",),
    ls.ScheduleFreeSGD: ("weight_sum", "lr_max"),
    ls.ScheduleFreeAdamW: ("weight_sum", "lr_max"),
    ls.Prodigy: ("d", "d_max", "d_numerator"),
}
WEIGHTS = ("average", "p0", "z")
"""State that is the parameter at first."""

pytestmark = pytest.mark.skipif(
    np.finfo(WIDE).eps > 2**-10 * np.finfo(float).eps, reason="long double is hardly wider than float64 here"
)


def case_of(rule):
    return replace(RULES[type(rule).__name__], rule=rule)


def numbers(case, p, opt):
    """All that a step moves, in 80 bits."""
    found = {"p": p.astype(WIDE), **{name: array.astype(WIDE) for name, array in opt.state[""].items()}}
    if opt.steps == 0:
        found |= {name: found["p"] for name in WEIGHTS if name in found}
    if names := CARRY.get(type(case.rule)):
        state = opt.state_dict()
        carried = state["carry"] if isinstance(case.rule, ls.Prodigy) else state["leaves"][""]["carry"]
        found |= {name: WIDE(x) for name, x in zip(names, carried, strict=False)}
    return found


def changes(oracle, before, g, t):
    """What the oracle's step does to each number."""
    state = {name: x for name, x in before.items() if name != "p"} if t > 1 else {}
    state["p"] = oracle(before["p"], g, state, t)
    return {name: state[name] - before[name] for name in before if name in state}


def off(case, before, g, t, after):
    """How far each number is off, in ulp of its scale: the largest of all."""
    oracle, eps = case.oracle_in(WIDE), np.finfo(g.dtype).eps
    g = g.astype(WIDE)
    exact = changes(oracle, before, g, t)
    felt = dict.fromkeys(exact, 0)
    up = 1 + 8 * WIDE(eps)
    to_add_up = np.copysign(8 * WIDE(eps), g * (before["p0"] - before["p"])) if "p0" in before else up - 1
    moved = [changes(oracle, before, g * (1 + to_add_up), t)]
    moved += [changes(oracle, before | {x: before[x] * up}, g, t) for x in before if t > 1 or x == "p"]
    for other in moved:
        felt = {name: felt[name] + np.abs(other[name] - x) / (up - 1) for name, x in exact.items()}
    found = {}
    for name, x in exact.items():
        error = np.abs(after[name] - before[name] - x)
        scale = np.abs(before[name]) + np.maximum(np.abs(x), felt[name])
        # What is carried is float64, but for Prodigy's, which is made of sums over the leaf.
        ulp = np.finfo(float).eps if np.ndim(x) == 0 and "p0" not in before else eps
        assert (error[scale == 0] == 0).all()
        found[name] = np.max(error / np.where(scale == 0, 1, scale)) / ulp
    return found


def drawn(rng, dtype, sizes):
    """Numbers of mixed size, some exactly zero."""
    numbers = 10.0 ** rng.integers(*sizes, 64) * rng.standard_normal(64)
    return np.where(rng.random(64) < 0.2, 0, numbers).astype(dtype)


class Run:
    """A rule at work, and what its steps were off by."""

    def __init__(self, case, dtype, rng):
        self.case = case
        self.weights = [drawn(rng, dtype, (-6, 1)) for _ in range(7)]
        self.grads = [drawn(rng, dtype, (-3, 3)) for _ in range(16)]
        self.p = self.weights[0].copy()
        self.opt = ls.Optimizer(self.p, case.rule)
        self.most = MOST[dtype]

    def step(self):
        """Takes a step, not compared; weights are written anew before it, or their size would soon hide it."""
        self.p[...] = self.weights[self.opt.steps % 7]
        g = self.grads[self.opt.steps % 16]
        self.opt.step(g)
        return g

    def compared_step(self):
        t = self.opt.steps + 1
        self.p[...] = self.weights[self.opt.steps % 7]
        before = numbers(self.case, self.p, self.opt)
        g = self.step()
        ulps = off(self.case, before, g, t, numbers(self.case, self.p, self.opt))
        worse = {name: float(x) for name, x in ulps.items() if not x <= self.most}
        assert not worse, f"step {t} of {self.case.rule}"

    def steps(self, compared):
        for t in range(1, max(compared) + 1):
            self.compared_step() if t in compared else self.step()


@every_dtype
@pytest.mark.parametrize("name", RULES)
def test_a_step_is_exact_to_a_few_ulp_over_random_configurations(name, dtype):
    for seed in range(CONFIGURATIONS):
        rng = np.random.default_rng(seed)
        rule = random_rule(type(RULES[name].rule), rng)
        Run(case_of(rule), dtype, rng).steps(CHECKED)


@every_dtype
@pytest.mark.parametrize("rule", HEAVY, ids=lambda rule: type(rule).__name__)
def test_a_step_is_exact_to_a_few_ulp_late_in_a_run(rule, dtype):
    Run(case_of(rule), dtype, np.random.default_rng(0)).steps({64, 100, 150, 200, 256, 512, 1000, 3000})


def counted(opt, steps):
    """Sets how many steps an optimizer over one array has taken."""
    state = opt.state_dict()
    state["steps"] = state["leaves"][""]["steps"] = steps
    opt.load_state_dict(state)


@every_dtype
@every_case
def test_a_step_is_exact_to_a_few_ulp_after_any_number_of_steps(case, dtype):
    run = Run(case, dtype, np.random.default_rng(0))
    run.steps({1, 2, 3})
    for t in COUNTS:
        counted(run.opt, t - 1)
        run.compared_step()
        assert run.opt.steps == t


@pytest.mark.parametrize("steps", COUNTS)
def test_counters_are_exact_integers(steps, tmp_path):
    seen = []
    schedule = ls.Lookahead(ls.Adam(lr=lambda step: seen.append(step) or 0.1), sync_period=2)
    p, q = np.ones(3), np.ones(3)
    opt = ls.Optimizer(p, schedule, nonfinite="skip")
    state = opt.state_dict()
    state["steps"] = state["leaves"][""]["steps"] = state["skipped"] = steps - 1
    state["cycles"] = [[1, steps - 1]]
    opt.load_state_dict(state)
    seen.clear()
    opt.step(np.ones(3))
    opt.step(np.full(3, np.nan))
    assert (opt.steps, opt.skipped, opt.syncs) == (steps, steps, steps)
    assert set(seen) <= {steps - 1, steps}
    assert steps - 1 in seen
    opt.rule = ls.Lookahead(ls.Adam(lr=0.1), sync_period=2)
    opt.save(tmp_path / "state")
    for other in (opt, ls.Optimizer.load(tmp_path / "state", q)):
        state = other.state_dict()
        counters = [state["steps"], state["skipped"], state["leaves"][""]["steps"], *state["cycles"][0]]
        assert counters == [steps, steps, steps, 0, steps]
        assert set(map(type, counters)) == {int}
