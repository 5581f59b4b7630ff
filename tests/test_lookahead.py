"""Lookahead is the paper's: its trajectories, its identities, its statistics."""

import numpy as np
import pytest

import lookstep as ls
from cases import every_case, every_dtype
from reference import lookahead


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
    ids=["momentum", "adam", "radam-alone"],
)
def test_golden_trajectory(rule, curvature, golden):
    path = train(np.array([1.0, -2.0]), rule, lambda p, i: curvature * p, 10)
    for t, theta in golden.items():
        np.testing.assert_allclose(path[t - 1], theta, rtol=1e-14)


def test_momentum_is_kept_over_a_sync():
    opt = ls.Optimizer(np.zeros(1), ls.Lookahead(ls.SGD(lr=1.0, momentum=0.9), sync_period=3))
    kept = []
    for _ in range(12):
        opt.step(np.ones(1))
        kept.append(opt.state[""]["m"][0])
    np.testing.assert_allclose(kept[2::3], [2.71, 4.68559, 6.12579, 7.1757], rtol=1e-6)


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
