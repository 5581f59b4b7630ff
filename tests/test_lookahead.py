"""Lookahead is the paper's: its trajectories, its identities, its statistics."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import lookstep as ls
from cases import CASES, every_case, every_dtype
from lookstep.schedules import Linear
from reference import lookahead, nested


def ones(p, i):
    return np.ones_like(p)


def train(p, rule, gradient, steps):
    """The fast weights after each step."""
    opt = ls.Optimizer(p, rule)
    path = []
    for i in range(steps):
        opt.step(gradient(p, i))
        path.append(p.copy())
    return np.array(path)


def test_the_first_cycle_is_a_whole_cycle():
    # 10, then three steps of -1 to 7, and half of the way back: 8.5; and so on.
    path = train(np.array([10.0]), ls.Lookahead(ls.SGD(lr=1.0), sync_period=3, slow_step=0.5), ones, 9)
    assert path.ravel().tolist() == [9, 8, 8.5, 7.5, 6.5, 7, 6, 5, 5.5]


def test_gradient_descent_on_a_quadratic():
    # phi is multiplied by 1 - alpha + alpha * (1 - lr)^k a cycle.
    path = train(np.array([1.0]), ls.Lookahead(ls.SGD(lr=0.1)), lambda p, i: p.copy(), 10)
    assert path[4, 0] == pytest.approx(0.795245, rel=1e-15)
    assert path[9, 0] == pytest.approx(0.632414610025, rel=1e-14)


@pytest.mark.parametrize(
    ("rule", "curvature", "golden"),
    [
        (
            ls.Lookahead(ls.SGD(lr=0.1, momentum=0.9)),
            (1, 0.1),
            {
                5: (0.48542, -1.8716340259),
                6: (0.206514, -1.782263574261),
                10: (-0.0591872708, -1.6128402008172809),
            },
        ),
        (
            ls.Lookahead(ls.SGD(lr=0.1, momentum=0.9), inner_state="reset"),
            (1, 0.1),
            {
                5: (0.48542, -1.8716340259),
                6: (0.436878, -1.852917685641),
                10: (0.2356325764, -1.7515069634533207),
            },
        ),
        (
            ls.Lookahead(ls.SGD(lr=0.1, momentum=0.9), inner_state="pullback"),
            (1, 0.1),
            {
                5: (0.48542, -1.8716340259),
                6: (0.321696, -1.817590629951),
                10: (0.0882226528, -1.6821735821353005),
            },
        ),
        (
            ls.Lookahead(ls.Adam(lr=0.1)),
            (1, 0.1),
            {
                5: (0.75398183096361049, -1.7514779029782575),
                10: (0.51955606288234346, -1.5070516598611319),
            },
        ),
        (
            ls.RAdam(lr=0.01),
            (1, 10),
            {
                5: (0.9505417064932420, -1.1047283902037959),
                6: (0.9502843255858699, -1.1044840685771882),
                10: (0.9486460339491539, -1.1029641852945455),
            },
        ),
    ],
    ids=["keep", "reset", "pullback", "adam", "radam-alone"],
)
def test_golden_trajectory(rule, curvature, golden):
    path = train(np.array([1.0, -2.0]), rule, lambda p, i: curvature * p, 10)
    for t, theta in golden.items():
        np.testing.assert_allclose(path[t - 1], theta, rtol=1e-14)


@pytest.mark.parametrize(
    ("inner_state", "after_syncs"),
    [
        ("keep", [2.71, 4.68559, 6.12579, 7.1757]),
        ("reset", [0, 0, 0, 0]),
        ("pullback", [1.355, 2.5264, 3.53907, 4.41453]),
    ],
)
def test_momentum_after_a_sync(inner_state, after_syncs):
    rule = ls.Lookahead(ls.SGD(lr=1.0, momentum=0.9), sync_period=3, inner_state=inner_state)
    opt = ls.Optimizer(np.zeros(1), rule)
    momentum = []
    for _ in range(12):
        opt.step(np.ones(1))
        momentum.append(opt.state[""]["m"][0])
    # The numbers are given to 6 digits.
    np.testing.assert_allclose(momentum[2::3], after_syncs, rtol=2e-6)


@every_dtype
@every_case
@pytest.mark.parametrize("sync_period", [1, 2, 5])
def test_slow_step_one_is_the_inner_optimizer_bit_for_bit(case, dtype, sync_period):
    start = np.random.default_rng(0).standard_normal(70).astype(dtype)

    def gradient(p, i):
        return np.sin(p + i).astype(dtype)

    plain = train(start.copy(), case.rule, gradient, 12)
    wrapped = train(start.copy(), ls.Lookahead(case.rule, sync_period, 1.0), gradient, 12)
    assert plain.tobytes() == wrapped.tobytes()


@every_dtype
@every_case
@pytest.mark.parametrize(("sync_period", "slow_step"), [(1, 0.5), (3, 0.5), (5, 0.2), (4, 0.8), (2, 0.0)])
def test_lookahead_follows_the_paper_around_every_rule(case, dtype, sync_period, slow_step):
    start = np.random.default_rng(0).standard_normal(70).astype(dtype)
    grads = np.random.default_rng(1).standard_normal((11, 70)).astype(dtype)
    cycle = {"sync_period": sync_period, "slow_step": slow_step}
    path = train(start.copy(), ls.Lookahead(case.rule, **cycle), lambda p, i: grads[i], 11)
    exact = list(lookahead(case.oracle, np.float64(start), lambda p, i: np.float64(grads[i]), 11, **cycle))
    scale = np.abs(exact).max(axis=0) + np.abs(np.diff(exact, axis=0)).sum(axis=0)
    assert (np.abs(path - exact) <= 4 * 11 * np.finfo(dtype).eps * scale).all()


def test_a_period_of_one_around_sgd_is_sgd_at_a_smaller_rate():
    wrapped = train(np.array([3.0]), ls.Lookahead(ls.SGD(lr=0.5), 1, 0.25), lambda p, i: p.copy(), 20)
    plain = train(np.array([3.0]), ls.SGD(lr=0.125), lambda p, i: p.copy(), 20)
    np.testing.assert_allclose(wrapped, plain, rtol=20 * np.finfo("f8").eps)


def test_slow_weights_are_an_average_of_the_ends_of_cycles():
    rng = np.random.default_rng(0)
    a, k, cycles = 0.3, 4, 9
    p = rng.standard_normal(5)
    phi0, ends = p.copy(), []
    opt = ls.Optimizer(p, ls.Lookahead(ls.SGD(lr=0.1), k, a))
    for _ in range(cycles):
        for i in range(k):
            g = rng.standard_normal(5)
            if i == k - 1:
                ends.append(p - 0.1 * g)
            opt.step(g)
    average = (1 - a) ** cycles * phi0 + a * sum((1 - a) ** (cycles - j) * end for j, end in enumerate(ends, 1))
    np.testing.assert_allclose(p, average, rtol=1e-13, atol=1e-14)


@every_dtype
@pytest.mark.parametrize("slow_step", [0.0, 0.1, 0.5, 0.7, 1.0])
def test_after_a_sync_slow_is_fast_bit_for_bit(dtype, slow_step):
    p = np.random.default_rng(0).standard_normal(100).astype(dtype)
    opt = ls.Optimizer(p, ls.Lookahead(ls.Adam(lr=0.1), 3, slow_step))
    for i in range(1, 10):
        opt.step(np.cos(p * i).astype(dtype))
        assert (opt.slow.tobytes() == p.tobytes()) == (i % 3 == 0)


def test_slow_step_zero_returns_to_slow_weights_also_from_nowhere():
    p = np.array([1.0, 2.0])
    opt = ls.Optimizer(p, ls.Lookahead(ls.SGD(lr=1.0), 2, 0.0))
    for _ in range(2):
        opt.step(np.array([np.inf, np.nan]))
    assert p.tolist() == [1, 2]


def test_weights_loaded_after_the_optimizer_was_built_are_the_slow_weights():
    p = np.zeros(1)
    opt = ls.Optimizer(p, ls.Lookahead(ls.SGD(lr=1.0), sync_period=3))
    p[:] = 10
    for _ in range(3):
        opt.step(np.ones(1))
    assert p == 8.5
    p[:] = 20
    for _ in range(3):
        opt.step(np.ones(1))
    assert p == 18.5


def test_a_leaf_without_a_gradient_takes_part_in_the_sync():
    params = {"a": np.array([10.0]), "b": np.array([10.0])}
    opt = ls.Optimizer(params, ls.Lookahead(ls.SGD(lr=1.0), sync_period=3))
    for _ in range(2):
        opt.step({"a": np.ones(1), "b": np.ones(1)})
    opt.step({"a": np.ones(1), "b": None})
    assert (params["a"], params["b"]) == (8.5, 9.0)
    # And in the start of a cycle: the next one brings b from 9 to 7, and back to 8.
    opt.step({"a": np.ones(1), "b": None})
    for _ in range(2):
        opt.step({"a": np.ones(1), "b": np.ones(1)})
    assert (params["a"], params["b"]) == (7.0, 8.0)


@pytest.mark.parametrize("sync_period", [1, 2])
@pytest.mark.parametrize("slow_step", [0.0, 0.5, 1.0])
def test_without_any_gradient_nothing_moves_but_the_cycle(sync_period, slow_step):
    p = np.array([10.0])
    opt = ls.Optimizer(p, ls.Lookahead(ls.Adam(), sync_period, slow_step))
    for _ in range(4):
        opt.step(None)
    assert p == 10
    assert (opt.steps, opt.syncs) == (4, 4 // sync_period)


def test_a_rule_counts_the_steps_of_each_leaf():
    """After a step that it sat out, a leaf's bias correction is that of its own step count."""
    a, b = np.zeros(1), np.zeros(1)
    opt = ls.Optimizer([a, b], ls.Adam(lr=0.1, betas=(0.5, 0.9)))
    opt.step([np.ones(1), None])
    opt.step([np.ones(1), np.ones(1)])
    alone = np.zeros(1)
    ls.Optimizer(alone, ls.Adam(lr=0.1, betas=(0.5, 0.9))).step(np.ones(1))
    assert b == alone


def test_two_players_that_sync_together_converge():
    """Min over x, max over y of xy by simultaneous gradient steps, which diverge alone."""
    eta, k, a = 0.1, 5, 0.5
    x, y = np.array([1.0]), np.array([1.0])
    players = [ls.Optimizer(z, ls.Lookahead(ls.SGD(lr=eta), 10**9, a)) for z in (x, y)]
    for _ in range(100):
        for _ in range(k):
            gradients = y.copy(), -x
            for player, g in zip(players, gradients, strict=True):
                player.step(g)
        for player in players:
            player.sync()
    assert np.hypot(x, y) == pytest.approx(0.2147266799, rel=1e-9)
    assert [player.syncs for player in players] == [100, 100]


@pytest.mark.parametrize(
    ("k", "lr", "v_sgd", "v_la"),
    [(5, 0.1, 0.0526316, 0.0233144), (10, 0.1, 0.0526316, 0.0211973), (5, 1.5, 3, 0.978947)],
)
def test_variance_on_the_noisy_quadratic(k, lr, v_sgd, v_la):
    chains = 40_000
    rng = np.random.default_rng(0)
    # Cycles until the start is forgotten to a part in 10^4: a cycle contracts the mean by 1 - (1 - q^k) / 2.
    cycles = 1 + int(np.log(1e-4) / np.log(1 - 0.5 * (1 - (1 - lr) ** k)))
    for rule, variance in ((ls.SGD(lr=lr), v_sgd), (ls.Lookahead(ls.SGD(lr=lr), k, 0.5), v_la)):
        x = np.zeros(chains)
        opt = ls.Optimizer(x, rule)
        for _ in range(cycles * k):
            opt.step(x - rng.standard_normal(chains))
        # The sample variance of n normal numbers is off by sqrt(2 / n) of it: three of that.
        assert x.var() == pytest.approx(variance, rel=3 * np.sqrt(2 / chains))


def test_leaves_of_both_dtypes_share_one_cycle():
    params = [np.full(3, 10, dtype) for dtype in ("f4", "f8")]
    opt = ls.Optimizer(params, ls.Lookahead(ls.SGD(lr=1.0), sync_period=3))
    for _ in range(3):
        opt.step([np.ones_like(p) for p in params])
    assert [p.tolist() for p in params] == [[8.5] * 3] * 2
    assert opt.syncs == 1


# The paper's Lookahead, and what is around it here: what becomes of the state, momentum of the sync, more levels; the
# innermost level first.
LEVELS = {
    "reset": [{"sync_period": 3, "slow_step": 0.5, "inner_state": "reset"}],
    "reset-every-step": [{"sync_period": 1, "slow_step": 0.7, "inner_state": "reset"}],
    "pullback": [{"sync_period": 3, "slow_step": 0.3, "inner_state": "pullback"}],
    "pullback-every-step": [{"sync_period": 1, "slow_step": 0.6, "inner_state": "pullback"}],
    "heavy-ball": [{"sync_period": 2, "slow_step": 0.7, "outer": (0.6, "heavy ball")}],
    "nesterov": [{"sync_period": 3, "slow_step": 0.7, "outer": (0.9, "nesterov"), "inner_state": "reset"}],
    "over-the-end": [{"sync_period": 2, "slow_step": 1.5, "outer": (0.3, "nesterov"), "inner_state": "pullback"}],
    "two": [{"sync_period": 3, "slow_step": 0.5}, {"sync_period": 2, "slow_step": 0.5}],
    "two-pulled-back": [
        {"sync_period": 2, "slow_step": 0.6, "inner_state": "pullback"},
        {"sync_period": 2, "slow_step": 0.4, "inner_state": "pullback"},
    ],
    "three": [
        {"sync_period": 2, "slow_step": 0.5},
        {"sync_period": 2, "slow_step": 0.8},
        {"sync_period": 2, "slow_step": 0.3},
    ],
    "three-of-all-kinds": [
        {"sync_period": 2, "slow_step": 0.7, "inner_state": "pullback", "outer": (0.5, "heavy ball")},
        {"sync_period": 1, "slow_step": 1.2, "inner_state": "pullback", "outer": (0.4, "nesterov")},
        {"sync_period": 3, "slow_step": 0.5, "inner_state": "reset"},
    ],
}
OUTER = {"heavy ball": ls.HeavyBall, "nesterov": ls.Nesterov}
every_level = pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS.keys())


def wrapped(rule, levels):
    for level in levels:
        momentum, kind = level.get("outer", (None, None))
        rule = ls.Lookahead(rule, **level | ({"outer": OUTER[kind](momentum)} if kind else {}))
    return rule


@every_case
@every_level
def test_every_form_of_lookahead_around_every_rule(levels, case):
    if getattr(case.rule, "centered", False) and any(level.get("inner_state") == "pullback" for level in levels):
        return  # Its oracle sums deviations of all past gradients, which cannot be moved part of a way.
    steps = 14
    start = np.random.default_rng(0).standard_normal(40).astype("f4")
    grads = list(np.random.default_rng(1).standard_normal((steps, 40)).astype("f4"))
    # No gradient on a step that begins a cycle, on one within, and on those that end one.
    for missing in 4, 5, 7, 8:
        grads[missing] = None

    def gradient(p, i):
        return grads[i] if grads[i] is None else grads[i].astype(p.dtype)

    exact = np.array(list(nested(case.oracle, np.float64(start), gradient, steps, levels)))
    scale = np.abs(exact).max(axis=0) + np.abs(np.diff(exact, axis=0)).sum(axis=0)
    for dtype in "f4", "f8":
        path = train(start.astype(dtype), wrapped(case.rule, levels), gradient, steps)
        # Each step rounds a handful of times; outer momentum adds up what it is given, by at most 1 / (1 - .9).
        assert (np.abs(path - exact) <= 8 * steps * np.finfo(dtype).eps * scale).all()


def test_an_outer_lookahead_counts_the_syncs_of_the_inner_one():
    # 10 9 8 [7 -> 8.5] 7.5 6.5 [5.5 -> 7, halfway back to 10: 8.5]; and so on.
    rule = ls.Lookahead(ls.Lookahead(ls.SGD(lr=1.0), 3), 2)
    path = train(np.array([10.0]), rule, ones, 12)
    assert path.ravel().tolist() == [9, 8, 8.5, 7.5, 6.5, 8.5, 7.5, 6.5, 7, 6, 5, 7]


@pytest.mark.parametrize(("outer", "ahead"), [(ls.HeavyBall, 0), (ls.Nesterov, 1)])
@pytest.mark.parametrize("slow_step", [0.3, 1.0, 1.7])
def test_momentum_of_the_sync(outer, ahead, slow_step):
    """Heavy ball: phi -= a u; Nesterov: phi -= a (Delta + mu u); with u = mu u + Delta."""
    mu, k, lr = 0.6, 4, 0.1
    p = np.array([3.0, -1.0])
    opt = ls.Optimizer(p, ls.Lookahead(ls.SGD(lr=lr), k, slow_step, outer=outer(mu)))
    phi, u = p.copy(), 0.0
    for _ in range(6):
        for _ in range(k):
            opt.step(p.copy())
        delta = phi - phi * (1 - lr) ** k
        u = mu * u + delta
        phi = phi - slow_step * ((delta + mu * u) if ahead else u)
        np.testing.assert_allclose(p, phi, rtol=1e-13)


@every_dtype
@pytest.mark.parametrize("outer", [ls.HeavyBall, ls.Nesterov])
@pytest.mark.parametrize("slow_step", [0.0, 0.2, 0.8, 1.0])
def test_without_momentum_an_outer_step_is_lookahead(outer, slow_step, dtype):
    start = np.random.default_rng(0).standard_normal(70).astype(dtype)

    def gradient(p, i):
        return np.sin(p + i).astype(dtype)

    inner = ls.Adam(lr=0.1)
    plain = train(start.copy(), ls.Lookahead(inner, 3, slow_step), gradient, 12)
    momentum = train(start.copy(), ls.Lookahead(inner, 3, slow_step, outer=outer(0.0)), gradient, 12)
    # Two roundings a sync more or fewer, and what Adam makes of them: its step is not smooth where gradients are small.
    np.testing.assert_allclose(momentum, plain, atol=100 * np.finfo(dtype).eps)
    if slow_step == 0:
        assert momentum.tobytes() == plain.tobytes()


@every_level
def test_a_leaf_without_a_gradient_syncs_in_every_mode(levels):
    """On steps that begin a cycle, on those within, on those that end one: beside a leaf that always has one."""
    p = {"a": np.array([10.0, 2.0]), "b": np.array([10.0, 2.0])}
    opt = ls.Optimizer(p, wrapped(ls.SGD(lr=0.5, momentum=0.9), levels))
    oracle = replace(CASES["sgd-momentum"], rule=ls.SGD(lr=0.5, momentum=0.9)).oracle
    for missing in range(8):
        p["a"][:] = p["b"][:] = 10.0, 2.0
        opt = ls.Optimizer(p, wrapped(ls.SGD(lr=0.5, momentum=0.9), levels))

        def sparse(b, i, missing=missing):
            return None if i % 4 == missing % 4 or i == missing else np.ones(2)

        paths = [nested(oracle, np.array([10.0, 2.0]), gradient, 8, levels) for gradient in (ones, sparse)]
        for i, expected in enumerate(zip(*paths, strict=True)):
            opt.step({"a": np.ones(2), "b": sparse(p["b"], i)})
            np.testing.assert_allclose([p["a"], p["b"]], expected, rtol=1e-13, atol=1e-13)


def test_a_sync_by_hand_ends_the_inner_cycle_and_those_whose_last_step_it_is():
    p = np.array([10.0])
    opt = ls.Optimizer(p, ls.Lookahead(ls.Lookahead(ls.SGD(lr=1.0), 10), 2))
    opt.sync()  # Nothing has begun.
    assert (p, opt.syncs) == (10, 0)
    opt.step(np.ones(1))
    opt.step(np.ones(1))
    opt.sync()  # 8 and 10 meet; the outer cycle has its first step.
    assert (p, opt.slow, opt.syncs) == (9, 10, 1)
    opt.sync()  # Within, no cycle has begun.
    assert (p, opt.syncs) == (9, 1)
    opt.step(np.ones(1))
    opt.step(np.ones(1))
    opt.sync()  # 7 and 9 meet at 8; 8 and 10 meet at 9.
    assert (p, opt.slow, opt.syncs) == (9, 9, 2)
    for _ in range(20):
        opt.step(np.ones(1))
    # 9, within a cycle to -1, so 4; to -6, so -1; the outer one from 9 to -1: 4.
    assert (p, opt.syncs) == (4, 4)


@pytest.mark.parametrize("inner_state", ["keep", "reset", "pullback"])
def test_a_sync_by_hand_is_that_of_a_whole_cycle(inner_state):
    rng = np.random.default_rng(0)
    start, grads = rng.standard_normal(50), rng.standard_normal((12, 50))
    by_hand, counted = start.copy(), start.copy()
    for_ever = ls.Optimizer(by_hand, ls.Lookahead(ls.Adam(lr=0.1), 10**6, 0.3, inner_state=inner_state))
    periodic = ls.Optimizer(counted, ls.Lookahead(ls.Adam(lr=0.1), 3, 0.3, inner_state=inner_state))
    for i, g in enumerate(grads):
        for_ever.step(g)
        periodic.step(g)
        if i % 3 == 2:
            for_ever.sync()
        assert by_hand.tobytes() == counted.tobytes()
        for name, array in for_ever.state[""].items():
            assert array.tobytes() == periodic.state[""][name].tobytes()


def test_slow_weights_of_nested_levels_are_the_outermost():
    p = np.array([10.0])
    opt = ls.Optimizer(p, ls.Lookahead(ls.Lookahead(ls.SGD(lr=1.0), 3), 2))
    for fast in (9, 8, 8.5, 7.5):
        opt.step(np.ones(1))
        assert (p, opt.slow) == (fast, 10)
        with opt.slow_weights() as slow:
            assert slow == 10
        assert p == fast
    with opt.slow_weights():
        p[:] = 20
    for _ in range(2):
        opt.step(np.ones(1))
    # Within, 8.5 and 5.5 meet at 7; around, 20 and 7 at 13.5.
    assert p == 13.5


def cycle_matrix(lr, momentum, curvature, k, slow_step, inner_state):
    """What a cycle does to slow weight and momentum, from that of a step of heavy ball on curvature * x^2 / 2."""
    step = np.array([[1 - lr * curvature, -lr * momentum], [curvature, momentum]])
    power = np.linalg.matrix_power(step, k)
    a = slow_step
    if inner_state == "pullback":
        return (1 - a) * np.eye(2) + a * power
    matrix = np.array([[1 - a + a * power[0, 0], a * power[0, 1]], power[1]])
    if inner_state == "reset":
        matrix[:, 1], matrix[1] = 0, 0
    return matrix


@pytest.mark.parametrize(
    ("inner_state", "rate"), [("keep", 0.97592787), ("pullback", 0.96733744), ("reset", 0.94319031), (None, 0.99498744)]
)
def test_rate_of_heavy_ball_on_a_quadratic(inner_state, rate):
    """The contraction a gradient of the worst of two curvatures, measured: a cycle is a matrix that two runs reveal."""
    k, momentum, curvatures = 20, 0.99, np.array([0.01, 1.0])
    inner = ls.SGD(lr=1.0, momentum=momentum)
    rule = ls.Lookahead(inner, k, 0.5, inner_state=inner_state) if inner_state else inner
    x = np.ones(2)
    opt = ls.Optimizer(x, rule)
    states = []
    for _ in range(4):
        states.append(np.array([x, opt.state[""]["m"]]))
        for _ in range(k):
            opt.step(curvatures * x)
    radii = []
    for i, curvature in enumerate(curvatures):
        z = np.array(states)[:, :, i].T
        if inner_state == "reset":
            assert (z[1] == 0).all()
            measured = np.diag([z[0, 1] / z[0, 0], 0])
        else:
            measured = z[:, 1:3] @ np.linalg.inv(z[:, 0:2])
            np.testing.assert_allclose(measured @ z[:, 2], z[:, 3], rtol=1e-9, atol=1e-12)
        if inner_state:
            exact = cycle_matrix(1.0, momentum, curvature, k, 0.5, inner_state)
            np.testing.assert_allclose(measured, exact, rtol=1e-9, atol=1e-9)
        radii.append(np.abs(np.linalg.eigvals(measured)).max())
    assert max(radii) ** (1 / k) == pytest.approx(rate, abs=1e-8)


def test_kept_momentum_can_diverge_where_heavy_ball_converges_and_pulled_back_momentum_cannot():
    def grown(rule):
        x = np.ones(1)
        opt = ls.Optimizer(x, rule)
        for _ in range(25_000):
            opt.step(0.42 * x)
        return abs(x[0]) > 10

    # The spectral radius of a cycle that keeps momentum is 1.00203; that of one that pulls it back .083.
    heavy_ball = ls.SGD(lr=1.0, momentum=0.99)
    assert np.abs(np.linalg.eigvals(cycle_matrix(1.0, 0.99, 0.42, 5, 0.5, "keep"))).max() > 1.002
    assert not grown(heavy_ball)
    assert grown(ls.Lookahead(heavy_ball, 5, 0.5))
    assert not grown(ls.Lookahead(heavy_ball, 5, 0.5, inner_state="pullback"))


class Quadratic:
    """Half of x' A x less b' x, over a tree of leaves that are one vector x, split at `at`."""

    def __init__(self, n, at, seed=0, dtypes=("f8", "f8")):
        rng = np.random.default_rng(seed)
        q = np.linalg.qr(rng.standard_normal((n, n)))[0]
        self.a = q * np.geomspace(0.6, 1.0, n) @ q.T
        self.b = rng.standard_normal(n)
        self.at = at
        parts = np.split(rng.standard_normal(n), [at])
        self.params = {"a": parts[0].astype(dtypes[0]), "b": parts[1].reshape(-1, 2).astype(dtypes[1])}

    @property
    def x(self):
        return np.concatenate([np.float64(p).ravel() for p in self.params.values()])

    def slope(self, x):
        return self.a @ x - self.b

    def gradient(self):
        parts = np.split(self.slope(self.x), [self.at])
        leaves = zip(parts, self.params.items(), strict=True)
        return {name: part.reshape(p.shape).astype(p.dtype) for part, (name, p) in leaves}


@pytest.mark.parametrize(("dtypes", "digits"), [(("f8", "f8"), 1e-10), (("f4", "f8"), 1e-4), (("f2", "f4"), 0.02)])
def test_the_optimal_slow_step_ends_where_the_way_is_lowest(dtypes, digits):
    loss = Quadratic(12, 6, dtypes=dtypes)
    # A rate at which the weights swing to and fro: an odd number of steps goes too far.
    rule = ls.Lookahead(ls.SGD(lr=1.9), 3, ls.OptimalSlowStep(low=0.0))
    opt = ls.Optimizer(loss.params, rule)
    for _ in range(4):
        start = loss.x
        for _ in range(3):
            opt.step(loss.gradient())
        end = loss.x
        opt.step(loss.gradient())
        way = end - start
        best = loss.slope(start) @ way / ((loss.slope(start) - loss.slope(end)) @ way)
        assert 0 < best < 1
        assert opt.slow_step == pytest.approx(best, rel=digits)
        # There the slope along the way is zero, to what rounding of the weights leaves.
        slope = abs(loss.slope(loss.x) @ way) / (np.linalg.norm(loss.slope(start)) * np.linalg.norm(way))
        assert slope < digits
        rounding = np.abs(start).max() * np.finfo(dtypes[0]).eps
        np.testing.assert_allclose(loss.x, start + best * way, atol=digits * np.abs(way).max() + rounding)


@pytest.mark.parametrize(
    ("slope", "curvature", "lr", "measured"),
    [
        (1.0, 1.0, 1.5, 2 / 3),  # From 1 to -.5: the minimum is two thirds of the way.
        (1.0, 1.0, 0.5, 1.0),  # From 1 to .5: it is at twice the way.
        (1.0, 1.0, 100.0, 0.25),  # A hundredth of the way.
        (1.0, 0.0, 1.0, 1.0),  # A slope without end.
        (1.0, -1.0, 1.0, 1.0),  # A hill: down it goes.
        (0.0, 1.0, 1.0, 0.25),  # No way at all.
    ],
)
def test_the_optimal_slow_step_is_clipped(slope, curvature, lr, measured):
    w = np.array([1.0])
    opt = ls.Optimizer(w, ls.Lookahead(ls.SGD(lr=lr), 1, ls.OptimalSlowStep(low=0.25)))
    for _ in range(2):
        opt.step(slope + curvature * (w - 1))
    assert opt.slow_step == pytest.approx(measured, rel=1e-15)
    assert w == pytest.approx(1 - measured * lr * slope, rel=1e-15)


def test_uphill_the_optimal_slow_step_is_the_lowest():
    w = np.array([1.0])
    opt = ls.Optimizer(w, ls.Lookahead(ls.SGD(lr=1.0, maximize=True), 1, ls.OptimalSlowStep(low=0.25)))
    # Maximised, x^2 / 2 goes up without end: as good a way as a slope.
    for _ in range(2):
        opt.step(w.copy())
    assert opt.slow_step == 1.0
    w = np.array([1.0])
    opt = ls.Optimizer(w, ls.Lookahead(ls.SGD(lr=1.0, momentum=0.9), 1, ls.OptimalSlowStep(low=0.25)))
    opt.step(np.array([1.0]))
    opt.step(np.array([1.0]))
    # Now momentum carries the weights up: against a gradient of -.1, by .8.
    opt.step(np.array([-0.1]))
    opt.step(np.array([-0.2]))
    assert opt.slow_step == 0.25


def test_a_step_that_measures_counts_as_a_sync_and_not_as_a_step():
    w = np.array([10.0])
    opt = ls.Optimizer(w, ls.Lookahead(ls.Adam(lr=1.0), 2, ls.OptimalSlowStep(low=0.5)))
    assert opt.slow_step is None
    for cycle in range(3):
        start = w.copy()
        for i in range(2):
            opt.step(w.copy())
            assert (opt.steps, opt.syncs) == (2 * cycle + i + 1, cycle)
        fast, state = w.copy(), {name: array.copy() for name, array in opt.state[""].items()}
        # All that the next call does is wait for: slow weights are where the cycle began.
        assert opt.slow == start
        with opt.slow_weights():
            assert w == start
        assert w == fast
        opt.step(w.copy())
        assert (opt.steps, opt.syncs) == (2 * cycle + 2, cycle + 1)
        assert w == pytest.approx(start + opt.slow_step * (fast - start), rel=1e-15)
        assert opt.slow == w
        assert {name: array.tobytes() for name, array in opt.state[""].items()} == {
            name: array.tobytes() for name, array in state.items()
        }


@pytest.mark.parametrize("steps", [1, 2])
def test_a_sync_by_hand_has_nothing_to_measure_with(steps):
    w = np.array([10.0])
    opt = ls.Optimizer(w, ls.Lookahead(ls.SGD(lr=1.0), 2, ls.OptimalSlowStep(low=0.75)))
    for _ in range(steps):
        opt.step(np.ones(1))
    opt.sync()
    assert (w, opt.slow_step) == (10 - 0.75 * steps, 0.75)
    # The next cycle is whole.
    for _ in range(2):
        opt.step(w - 5)
    assert opt.syncs == 1
    opt.step(w - 5)
    assert opt.syncs == 2


def test_the_least_slow_step_can_be_changed():
    w = np.array([1.0])
    opt = ls.Optimizer(w, ls.Lookahead(ls.SGD(lr=100.0), 1, ls.OptimalSlowStep(low=0.5)))
    for low in (0.5, 0.2, 0.9):
        opt.rule = replace(opt.rule, slow_step=ls.OptimalSlowStep(low=low))
        w[:] = 1
        for _ in range(2):
            opt.step(w.copy())
        assert opt.slow_step == low


def test_an_optimal_slow_step_within_another_lookahead():
    loss = Quadratic(8, 4)
    inner = ls.Lookahead(ls.SGD(lr=1.9), 1, ls.OptimalSlowStep(low=0.0))
    opt = ls.Optimizer(loss.params, ls.Lookahead(inner, 3, 0.5))
    for _ in range(2):
        around = loss.x
        for sync in range(3):
            start = loss.x
            opt.step(loss.gradient())
            end = loss.x
            opt.step(loss.gradient())
            way = end - start
            best = loss.slope(start) @ way / ((loss.slope(start) - loss.slope(end)) @ way)
            assert 0 < best < 1
            assert opt.slow_step == pytest.approx(best, rel=1e-10)
            expected = start + best * way
            if sync == 2:
                expected = (around + expected) / 2
            np.testing.assert_allclose(loss.x, expected, rtol=1e-12, atol=1e-12)


def test_a_leaf_without_a_gradient_has_one_of_zero_for_the_measurement():
    """A loss that a parameter has no part in has no slope along it."""
    for missing_at, k in ("start", 4), ("end", 3):
        params = [np.array([1.0]), np.array([1.0])]
        opt = ls.Optimizer(params, ls.Lookahead(ls.SGD(lr=1.5), k, ls.OptimalSlowStep(low=0.0)))
        first = [params[0].copy(), None if missing_at == "start" else params[1].copy()]
        opt.step(first)
        for _ in range(k - 1):
            opt.step([p.copy() for p in params])
        way = [p - 1 for p in params]
        last = [params[0].copy(), None if missing_at == "end" else params[1].copy()]
        opt.step(last)
        slopes = [sum(w * (0 if g is None else g) for w, g in zip(way, gs, strict=True)) for gs in (first, last)]
        assert 0 < slopes[0] / (slopes[0] - slopes[1]) < 1
        assert opt.slow_step == pytest.approx((slopes[0] / (slopes[0] - slopes[1]))[0], rel=1e-14)


def test_a_slow_step_that_follows_a_schedule_is_that_of_the_last_step():
    """The sync at the end of the step that i others came before goes by the schedule at i."""
    start = np.array([0.0])
    steps = []

    def schedule(step):
        steps.append(step)
        return 1 / (step + 1)

    opt = ls.Optimizer(start, ls.Lookahead(ls.SGD(lr=1.0), 2, schedule))
    expected = 0.0
    for i in range(8):
        opt.step(-np.ones(1))
        if i % 2:
            expected += 2 / (i + 1)
            assert start == pytest.approx(expected, rel=1e-15)
            assert opt.slow_step == 1 / (i + 1)
    assert set(steps) >= set(range(8))


def test_every_level_may_follow_a_schedule():
    inner, outer = Linear(1.0, 0.0, steps=10), Linear(0.0, 1.0, steps=20)
    p = np.array([10.0])
    opt = ls.Optimizer(p, ls.Lookahead(ls.Lookahead(ls.SGD(lr=1.0), 3, inner), 2, outer))
    fast = slow = around = 10.0
    for i in range(12):
        fast -= 1
        if i % 3 == 2:
            slow = fast = slow + inner(i) * (fast - slow)
        if i % 6 == 5:
            around = slow = fast = around + outer(i) * (fast - around)
        opt.step(np.ones(1))
        assert p == pytest.approx(fast, rel=1e-14)


def test_a_sync_by_hand_goes_by_the_schedule_of_the_last_step_also_after_a_restart():
    schedule = Linear(1.0, 0.0, steps=10)
    p = np.array([10.0])
    opt = ls.Optimizer(p, ls.Lookahead(ls.SGD(lr=1.0), 100, schedule))
    for _ in range(4):
        opt.step(np.ones(1))
    again = np.array([0.0])
    resumed = ls.Optimizer(again, ls.Lookahead(ls.SGD(lr=1.0), 100, schedule))
    resumed.load_state_dict(opt.state_dict())
    opt.sync()
    resumed.sync()
    assert p == again == 10 - 4 * schedule(3)


def test_groups_have_slow_steps_of_their_own():
    params = {"a": np.array([10.0]), "b": np.array([10.0]), "c": np.array([10.0])}
    groups = [("a", {"slow_step": 1.0}), ("b", {"slow_step": Linear(0.0, 1.0, steps=4)})]
    opt = ls.Optimizer(params, ls.Lookahead(ls.SGD(lr=1.0), 3, 0.5), groups=groups)
    for _ in range(3):
        opt.step({name: np.ones(1) for name in params})
    assert {name: float(p[0]) for name, p in params.items()} == {"a": 7.0, "b": 8.5, "c": 8.5}
    assert opt.slow_step == 0.5
    for _ in range(3):
        opt.step({name: np.ones(1) for name in params})
    assert {name: float(p[0]) for name, p in params.items()} == {"a": 4.0, "b": 5.5, "c": 7.0}


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16])
@every_level
def test_leaves_of_16_bits_sync_beside_others(levels, dtype):
    """What 16 bits can hold exactly goes as in float64."""
    params = [np.array([8.0, 4.0], dtype), np.array([8.0, 4.0])]
    powers = [level | {"slow_step": 0.5} for level in levels]
    for level in powers:
        if "outer" in level:
            level["outer"] = (0.5, level["outer"][1])
    opt = ls.Optimizer(params, wrapped(ls.SGD(lr=1.0), powers), master_weights=True)
    for _ in range(8):
        opt.step([np.ones(2, dtype), np.ones(2)])
        np.testing.assert_array_equal(params[0], params[1].astype(dtype))
