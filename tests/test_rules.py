"""Every rule does what its paper says, in float32 and float64, and what torch does where torch has it."""

from dataclasses import fields, replace

import numpy as np
import pytest

import lookstep as ls
from cases import CASES, every_case, every_dtype
from lookstep import _core
from reference import lookahead

STEPS = 40


def gradients(shape, seed=0):
    """Gradients of mixed size, some exactly zero."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.integers(-3, 3, shape)
    return [sizes * rng.standard_normal(shape) * (rng.random(shape) > 0.2) for _ in range(STEPS)]


def rounding(trajectory, dtype):
    """How far rounding can carry `trajectory`.

    Each step rounds the weights, twice by half an ulp, and an update whose averages have gathered a few ulp a step.
    """
    path = np.array(trajectory)
    updates = np.abs(np.diff(path, axis=0)).sum(axis=0)
    return np.finfo(dtype).eps * len(path) * (np.abs(path).max(axis=0) + 4 * updates)


def scalars_of_torch(trajectory, rule):
    """How far torch's scalars can carry `trajectory`.

    torch forms c = 1 - b2^t as a difference, which loses 1 / c ulp, at most 1 / (1 - b2). RAdam's rho - 4, which is
    about 1 when adaptive steps begin (t >= 6), is a difference of 2 t / c from another such number, and loses
    2 t / c^2 ulp of it, at most 1 / (3 (1 - b2)^2).
    """
    b2 = getattr(rule, "betas", (0, 0))[1]
    lost = 1 / (3 * (1 - b2) ** 2) if isinstance(rule, ls.RAdam) else 1 / (1 - b2)
    return np.finfo(float).eps * lost * np.abs(np.diff(trajectory, axis=0)).sum(axis=0)


@every_dtype
@every_case
def test_rule_follows_its_paper(case, dtype):
    start = np.random.default_rng(1).standard_normal(300).astype(dtype)
    grads = [g.astype(dtype) for g in gradients(300)]
    path = [np.float64(start)]
    path += lookahead(case.oracle, path[0], lambda p, i: np.float64(grads[i]), STEPS)
    p = start.copy()
    opt = ls.Optimizer(p, case.rule)
    for i, g in enumerate(grads):
        opt.step(g)
        error = np.abs(p - path[i + 1])
        assert (error <= rounding(path[: i + 2], dtype)).all(), f"step {i + 1}: {error.max():.3g}"
    assert p.dtype == dtype


@every_case
def test_rule_agrees_with_torch(case):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    start = np.random.default_rng(1).standard_normal(300)
    q = torch.tensor(start, requires_grad=True)
    peer = getattr(torch.optim, case.torch)([q], **case.hyper)
    p = start.copy()
    opt = ls.Optimizer(p, case.rule)
    path = [start]
    for g in gradients(300):
        opt.step(g)
        q.grad = torch.tensor(g)
        peer.step()
        path.append(q.detach().numpy().copy())
        assert (np.abs(p - path[-1]) <= rounding(path, "float64") + scalars_of_torch(path, case.rule)).all()


@every_case
def test_rule_declares_what_its_kernel_reads(case):
    hyper, state = _core.kernels()[case.rule._kernel]
    assert set(hyper) <= set(case.rule._hyper())
    opt = ls.Optimizer(np.zeros(2), case.rule)
    assert list(opt.state[""]) == state


@pytest.mark.parametrize("rule", {type(case.rule) for case in CASES.values()}, ids=lambda rule: rule.__name__)
def test_every_hyper_parameter_reaches_a_kernel(rule):
    kernels = _core.kernels()
    read = {name for kernel in rule._kernels for name in kernels[kernel][0]}
    flags = {field.name for field in fields(rule) if isinstance(getattr(rule(), field.name), bool)} - {"maximize"}
    assert read | flags == set(rule()._hyper())


def test_every_kernel_is_in_the_table():
    assert {case.rule._kernel for case in CASES.values()} == set(_core.kernels())


@every_dtype
@pytest.mark.parametrize("name", ["adam", "adam-amsgrad", "adamw", "adamw-amsgrad", "radam"])
def test_zero_over_zero_is_no_update(name, dtype):
    rule = replace(CASES[name].rule, eps=0.0, weight_decay=0.0)
    p = np.array([2.0, -1.0], dtype)
    opt = ls.Optimizer(p, rule)
    for _ in range(8):
        opt.step(np.array([0.0, 1.0], dtype))
    assert p[0] == 2
    assert p[1] < -1


@pytest.mark.parametrize("name", ["adam", "adam-decay", "adamw", "radam", "radam-decay"])
def test_one_huge_gradient_does_not_freeze_a_parameter(name):
    """AMSGrad is left out: never to forget the largest gradient is what it is for."""
    p = np.zeros(1, "f4")
    opt = ls.Optimizer(p, CASES[name].rule)
    for i in range(30):
        before = p.copy()
        opt.step(np.full(1, 1e20 if i == 15 else 1, "f4"))
        assert np.isfinite(p)
        assert np.isfinite(opt.state[""]["v"])
        assert i == 15 or p != before


@pytest.mark.parametrize("name", [name for name in CASES if "decay" not in name])
def test_an_infinite_weight_stays_where_no_decay_reads_it(name):
    p = np.array([-np.inf, 1.0])
    opt = ls.Optimizer(p, replace(CASES[name].rule, weight_decay=0.0))
    for _ in range(8):
        opt.step(np.array([0.0, 1.0]))
    assert p[0] == -np.inf
    assert p[1] < 1


@every_case
def test_denormal_state_is_stored_as_zero(case):
    p = np.ones(1, "f4")
    opt = ls.Optimizer(p, replace(case.rule, weight_decay=0.0))
    opt.step(np.array([1e-37], "f4"))
    for _ in range(60):
        opt.step(np.zeros(1, "f4"))
        for array in opt.state[""].values():
            assert array == 0 or abs(array) >= np.finfo("f4").tiny


@every_case
def test_a_gradient_that_is_not_finite_propagates(case):
    p = np.ones(3)
    opt = ls.Optimizer(p, case.rule)
    opt.step(np.array([np.nan, 1.0, 1.0]))
    assert np.isnan(p[0])
    assert np.isfinite(p[1:]).all()
