"""Every rule does what its paper says, in float32 and float64, and what torch does where torch has it."""

from dataclasses import fields, replace

import numpy as np
import pytest

import lookstep as ls
from cases import CASES, every_case, every_dtype
from configurations import random_rule, random_shapes
from lookstep import _core
from reference import lookahead

STEPS = 50
CLASSES = list({type(case.rule): case for case in CASES.values() if case.torch}.values())
"""A case for each class of rules that torch has."""


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    default = torch.get_default_dtype()
    # torch keeps what NAdam and ASGD carry from step to step in its default dtype, whatever the parameters have.
    torch.set_default_dtype(torch.float64)
    yield torch
    torch.set_default_dtype(default)


def gradients(shape, rng=None, smallest=-3):
    """Gradients of mixed size, some exactly zero."""
    rng = rng or np.random.default_rng(0)
    sizes = 10.0 ** rng.integers(smallest, 3, shape)
    return [np.asarray(sizes * rng.standard_normal(shape) * (rng.random(shape) > 0.2)) for _ in range(STEPS)]


def rounding(path, dtype):
    """How far rounding can carry weights from `path`, by each of its steps.

    Each step rounds the weights, twice by half an ulp, and an update whose averages have gathered a few ulp a step.
    """
    steps = np.arange(1, len(path) + 1)[:, None]
    return np.finfo(dtype).eps * steps * (np.maximum.accumulate(np.abs(path)) + 4 * updates(path))


def updates(path):
    """The length of `path`, by each of its steps."""
    return np.abs(np.diff(path, axis=0, prepend=path[:1])).cumsum(axis=0)


def with_peer(peer):
    cases = {name: case for name, case in CASES.items() if getattr(case, peer)}
    return {"argvalues": cases.values(), "ids": cases.keys()}


def scalars_of_torch(path, rule):
    """How far torch's scalars can carry weights from `path`.

    torch forms c = 1 - b^t as a difference, which loses 1 / c ulp, at most 1 / (1 - b). RAdam's rho - 4, which is
    about 1 when adaptive steps begin (t >= 6), is a difference of 2 t / c from another such number, and loses
    2 t / c^2 ulp of it, at most 1 / (3 (1 - b2)^2).
    """
    betas = getattr(rule, "betas", (0, 0))
    lost = 1 / (1 - max(betas))
    if isinstance(rule, ls.RAdam):
        lost += 1 / (3 * (1 - betas[1]) ** 2)
    return np.finfo(float).eps * lost * updates(path)


@every_dtype
@every_case
def test_rule_follows_its_paper(case, dtype):
    start = np.random.default_rng(1).standard_normal(300).astype(dtype)
    grads = [g.astype(dtype) for g in gradients(300)]
    exact = [np.float64(start)]
    exact += lookahead(case.oracle, exact[0], lambda p, i: np.float64(grads[i]), STEPS)
    p = start.copy()
    path = [start]
    opt = ls.Optimizer(p, case.rule)
    for g in grads:
        opt.step(g)
        path.append(p.copy())
    error = np.abs(path - np.array(exact))
    assert (error <= rounding(exact, dtype)).all()
    assert p.dtype == dtype


def agrees_with_torch(torch, rule, peer, start, grads):
    """Steps both over the arrays of `start`."""
    p = [array.copy() for array in start]
    q = [torch.tensor(array, requires_grad=True) for array in start]
    hyper = {field.name: getattr(rule, field.name) for field in fields(rule)}
    ours, theirs = ls.Optimizer(p, rule), getattr(torch.optim, peer)(q, **hyper)
    paths = [], []
    for gs in zip(*grads, strict=True):
        ours.step(list(gs))
        for tensor, g in zip(q, gs, strict=True):
            tensor.grad = torch.tensor(g)
        theirs.step()
        for path, arrays in zip(paths, (p, [tensor.detach().numpy() for tensor in q]), strict=True):
            path.append(np.concatenate([array.ravel() for array in arrays]))
    begin = np.concatenate([array.ravel() for array in start])
    ours, theirs = (np.array([begin, *path]) for path in paths)
    assert (np.abs(ours - theirs) <= rounding(theirs, "float64") + scalars_of_torch(theirs, rule)).all()


@pytest.mark.parametrize("case", **with_peer("torch"))
def test_rule_agrees_with_torch(case, torch):
    start = np.random.default_rng(1).standard_normal(300)
    agrees_with_torch(torch, case.rule, case.torch, [start], [gradients(300)])


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("case", CLASSES, ids=lambda case: type(case.rule).__name__)
def test_rule_agrees_with_torch_over_random_configurations(case, seed, torch):
    rng = np.random.default_rng(seed)
    start = [np.asarray(rng.standard_normal(shape)) for shape in random_shapes(rng)]
    # Decay brings a weight that is off by e back by lr * weight_decay * e over the size of gradients. Over 2 e, errors
    # would grow from step to step, and no bound would hold. So gradients are not small here.
    grads = [gradients(array.shape, rng, smallest=0) for array in start]
    agrees_with_torch(torch, random_rule(type(case.rule), rng), case.torch, start, grads)


@every_case
def test_to_maximize_is_to_negate_the_gradient(case):
    p, q = np.ones(5), np.ones(5)
    down, up = ls.Optimizer(p, case.rule), ls.Optimizer(q, replace(case.rule, maximize=True))
    for g in gradients(5):
        down.step(-g)
        up.step(g)
        assert p.tobytes() == q.tobytes()


@pytest.mark.parametrize("case", **with_peer("optax"))
def test_rule_agrees_with_optax(case):
    """In float64, over 50 steps.

    What optax computes otherwise than the rule is 1 - b^t, as a difference of powers: it loses 1 / (1 - b) ulp, and the
    update as much of itself.
    """
    jax = pytest.importorskip("jax", reason="jax is not installed")
    optax = pytest.importorskip("optax", reason="optax is not installed")
    lost = 1 / (1 - max(getattr(case.rule, "betas", (0,))))
    with jax.enable_x64(True):
        start = np.random.default_rng(1).standard_normal(300)
        peer = case.optax(optax)
        q = jax.numpy.asarray(start)
        state = peer.init(q)
        update = jax.jit(peer.update)
        p = start.copy()
        opt = ls.Optimizer(p, case.rule)
        path = [start]
        for g in gradients(300):
            opt.step(g)
            change, state = update(jax.numpy.asarray(g), state, q)
            q = q + change
            path.append(np.asarray(q))
            moved = np.abs(np.diff(path, axis=0)).sum(axis=0)
            error = np.abs(p - path[-1])
            assert (error <= rounding(path, "float64")[-1] + np.finfo(float).eps * lost * moved).all(), error.max()


@pytest.mark.parametrize("case", **with_peer("authors"))
def test_rule_agrees_with_its_authors_code(case, torch):
    """On the same gradients, in float64; what torch has to do with 1 - b^t, their code has too."""
    package, name = case.authors
    authors = pytest.importorskip(package, reason=f"{package} is not installed")
    start = np.random.default_rng(1).standard_normal(300)
    q = torch.tensor(start, requires_grad=True)
    hyper = {name: value for name, value in case.hyper.items() if name != "maximize"}
    peer = getattr(authors, name)([q], **hyper)
    if hasattr(peer, "train"):
        peer.train()
    p = start.copy()
    opt = ls.Optimizer(p, case.rule)
    path = [start]
    for g in gradients(300):
        opt.step(g)
        q.grad = torch.tensor(g)
        peer.step()
        path.append(q.detach().numpy().copy())
        assert (np.abs(p - path[-1]) <= (rounding(path, "float64") + scalars_of_torch(path, case.rule))[-1]).all()


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


def undecayed(rule):
    return replace(rule, weight_decay=0.0) if hasattr(rule, "weight_decay") else rule


@every_dtype
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if hasattr(case.rule, "eps")])
def test_zero_over_zero_is_no_update(name, dtype):
    rule = replace(undecayed(CASES[name].rule), eps=0.0)
    p = np.array([2.0, -1.0], dtype)
    opt = ls.Optimizer(p, rule)
    for _ in range(8):
        opt.step(np.array([0.0, 1.0], dtype))
    assert p[0] == 2
    # Adadelta's numerator has eps, too: without it, there is no first step.
    assert p[1] == -1 if isinstance(rule, ls.Adadelta) else p[1] < -1


# The steps until a parameter must move at every further one. Where there is no momentum, that is when a second moment
# of 1e38 has decayed. AMSGrad, Adagrad and Yogi are left out: not to forget the largest gradient is what they are for.
PATIENCE = {
    "adam": 1,
    "adam-decay": 1,
    "adamw": 1,
    "radam": 1,
    "radam-decay": 1,
    "nadam": 1,
    "nadam-decay": 1,
    "adamax": 1,
    "adadelta-decay": 400,
    "rmsprop-decay": 400,
    "rmsprop-momentum": 1,
    "rmsprop-centered-momentum": 400,
    "adabelief": 1,
    "adabelief-decay": 1,
    "adan": 1,
    "adan-decay": 1,
    "schedule-free-adamw": 1,
    "schedule-free-adamw-decay": 1,
    "lamb": 1,
    "lamb-decay": 1,
}


@pytest.mark.parametrize(("name", "patience"), PATIENCE.items())
def test_one_huge_gradient_does_not_freeze_a_parameter(name, patience):
    p = np.zeros(1, "f4")
    opt = ls.Optimizer(p, CASES[name].rule)
    for i in range(15 + patience + 15):
        before = p.copy()
        opt.step(np.full(1, 1e20 if i == 15 else 1, "f4"))
        assert np.isfinite(p)
        assert all(np.isfinite(array) for name, array in opt.state[""].items() if name[0] in "uv")
        assert 15 <= i < 15 + patience or p != before


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "decay" not in name and not case.whole])
def test_an_infinite_weight_stays_where_no_decay_reads_it(name):
    p = np.array([-np.inf, 1.0])
    opt = ls.Optimizer(p, undecayed(CASES[name].rule))
    for _ in range(8):
        opt.step(np.array([0.0, 1.0]))
    assert p[0] == -np.inf
    assert p[1] < 1


@every_case
def test_denormal_state_is_stored_as_zero(case):
    p = np.ones(1, "f4")
    opt = ls.Optimizer(p, undecayed(case.rule))
    opt.step(np.array([1e-37], "f4"))
    for _ in range(60):
        opt.step(np.zeros(1, "f4"))
        for array in opt.state[""].values():
            assert array == 0 or abs(array) >= np.finfo("f4").tiny


@every_dtype
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("asgd")])
def test_asgd_averages_weights_from_t0(name, dtype):
    p = np.random.default_rng(1).standard_normal(300).astype(dtype)
    opt = ls.Optimizer(p, CASES[name].rule)
    state, path = {}, [p.astype(float)]
    for t, g in enumerate(gradients(300), 1):
        opt.step(g.astype(dtype))
        path.append(CASES[name].oracle(path[-1], np.float64(g.astype(dtype)), state, t))
        # An average of weights is off by as much as they are, and by a rounding a step of its own.
        assert (np.abs(opt.state[""]["average"] - state["average"]) <= 2 * rounding(path, dtype)[-1]).all()
    with opt.slow_weights() as evaluated:
        assert evaluated.tobytes() == opt.state[""]["average"].tobytes()


def test_adam_with_decoupled_decay_is_adamw():
    hyper = {"lr": 0.1, "weight_decay": 0.2, "amsgrad": True}
    p, q = np.ones(5), np.ones(5)
    one, other = ls.Optimizer(p, ls.Adam(**hyper, decoupled_weight_decay=True)), ls.Optimizer(q, ls.AdamW(**hyper))
    for g in gradients(5):
        one.step(g)
        other.step(g)
        assert p.tobytes() == q.tobytes()


@every_dtype
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_a_variance_that_rounds_below_zero_is_zero(alpha, dtype):
    """With a gradient that never changes, the variance vanishes; in torch, the parameter becomes NaN here and there."""
    p = np.zeros(1000, dtype)
    opt = ls.Optimizer(p, ls.RMSprop(alpha=alpha, centered=True))
    g = np.random.default_rng(0).standard_normal(1000).astype(dtype)
    for _ in range(500):
        opt.step(g)
        assert np.isfinite(p).all()


def test_rprop_sees_the_sign_of_the_smallest_gradient():
    p = np.zeros(2)
    opt = ls.Optimizer(p, ls.Rprop(lr=1.0))
    for sign in (1, 1, -1, -1):
        opt.step(sign * np.array([5e-324, 1.0]))
    # By 1, by 1.2, not at all, and back by 0.6.
    np.testing.assert_allclose(p, [-1.6, -1.6], rtol=1e-15)


@every_case
def test_a_gradient_that_is_not_finite_propagates(case):
    p = np.ones(3)
    opt = ls.Optimizer(p, case.rule)
    opt.step(np.array([np.nan, 1.0, 1.0]))
    assert np.isnan(p[0])
    assert (np.isnan if case.whole else np.isfinite)(p[1:]).all()


@pytest.mark.parametrize("name", ["lion", "signsgd", "signum"])
def test_an_infinite_gradient_does_not_pass_for_its_sign(name):
    p = np.ones(2)
    opt = ls.Optimizer(p, CASES[name].rule)
    opt.step(np.array([np.inf, 1.0]))
    assert np.isnan(p[0])
    assert p[1] == 0.9


@every_dtype
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("schedule-free")])
def test_slow_weights_of_schedule_free_are_its_average(name, dtype):
    case = CASES[name]
    beta = case.hyper.get("momentum") or case.hyper["betas"][0]
    start = np.random.default_rng(1).standard_normal(300).astype(dtype)
    y, state = np.float64(start), {}
    ys, zs = [y], [y]
    p = start.copy()
    opt = ls.Optimizer(p, case.rule)
    for i, g in enumerate(gradients(300)):
        y = case.oracle(y, np.float64(g.astype(dtype)), state, i + 1)
        ys.append(y)
        zs.append(state["z"])
        opt.step(g.astype(dtype))
        before = p.copy()
        with opt.slow_weights() as average:
            # x is (y - (1 - beta) z) / beta, and as far off as that makes it.
            off = (rounding(ys, dtype) + (1 - beta) * rounding(zs, dtype))[-1] / beta
            assert (np.abs(average - state["x"]) <= off).all()
        assert p.tobytes() == before.tobytes()


@pytest.mark.parametrize("name", ["lars-decay", "lamb-decay"])
def test_a_norm_is_of_one_leaf(name):
    start = np.random.default_rng(1).standard_normal(300)
    both = [start[:100].copy(), 10 * start[100:]]
    alone = [p.copy() for p in both]
    opt = ls.Optimizer(both, CASES[name].rule)
    opts = [ls.Optimizer(p, CASES[name].rule) for p in alone]
    for g in gradients(300):
        opt.step([g[:100], g[100:]])
        opts[0].step(g[:100])
        opts[1].step(g[100:])
    assert [p.tobytes() for p in both] == [p.tobytes() for p in alone]


@every_dtype
@pytest.mark.parametrize("rule", [ls.LARS(lr=0.5, momentum=0.0), ls.LAMB(lr=0.5, weight_decay=0.0)])
def test_trust_is_one_where_a_norm_is_zero(rule, dtype):
    p = {"weights": np.zeros(2, dtype), "gradient": np.array([2, -1], dtype)}
    opt = ls.Optimizer(p, rule)
    opt.step({"weights": np.array([1, -1], dtype), "gradient": np.zeros(2, dtype)})
    np.testing.assert_allclose(p["weights"], [-0.5, 0.5], rtol=1e-5)
    assert p["gradient"].tolist() == [2, -1]


@every_dtype
@pytest.mark.parametrize("name", ["prodigy-decay", "prodigy-decay-growth"])
def test_prodigy_has_one_estimate_for_all_leaves(name, dtype):
    """Gradients that agree on where to go, so that the estimate grows, which those of the other tests hardly let it."""
    rng = np.random.default_rng(1)
    start = rng.standard_normal(300).astype(dtype)
    drift = 100 * rng.standard_normal(300)
    grads = [(g + drift).astype(dtype) for g in gradients(300)]
    state = {}
    path = [np.float64(start)]
    leaves = [start[:100].copy(), start[100:].copy()]
    opt = ls.Optimizer(leaves, CASES[name].rule)
    for i, g in enumerate(grads):
        path.append(CASES[name].oracle(path[-1], np.float64(g), state, i + 1))
        opt.step([g[:100], g[100:]])
        assert (np.abs(np.concatenate(leaves) - path[-1]) <= rounding(path, dtype)[-1]).all()
    assert state["d"] > 10 * CASES[name].rule.d0


def test_prodigy_stands_still_until_there_is_a_gradient():
    p = np.ones(3)
    opt = ls.Optimizer(p, ls.Prodigy(weight_decay=0.5))
    opt.step(np.zeros(3))
    assert p.tolist() == [1, 1, 1]
    opt.step(np.ones(3))
    assert (p < 1).all()
