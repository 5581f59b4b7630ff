"""Lookahead as a gradient transformation of optax is the paper's, and one of optax's own kind."""

import pickle
import subprocess
import sys
from functools import lru_cache, partial

import numpy as np
import pytest

import reference

optax = pytest.importorskip("optax", reason='needs optax: pip install "lookstep[optax]"')

import jax  # noqa: E402
from jax import numpy as jnp  # noqa: E402

from lookstep.optax import LookaheadState, lookahead, slow_params  # noqa: E402


def stepper(tx, gradient):
    def step(params, state, i):
        updates, state = tx.update(gradient(params, i), state, params)
        return optax.apply_updates(params, updates), state

    return step


compiled = lru_cache(lambda tx, gradient: jax.jit(stepper(tx, gradient)))


def train(tx, params, gradient, steps, *, jit=True, state=None, first=0):
    """The fast weights after each step, and the last state."""
    step = (compiled if jit else stepper)(tx, gradient)
    state = tx.init(params) if state is None else state
    path = []
    for i in range(first, first + steps):
        params, state = step(params, state, i)
        path.append(params)
    return path, state


def ones(p, i):
    return jax.tree.map(jnp.ones_like, p)


def waves(p, i):
    return jax.tree.map(lambda x: jnp.sin(3 * x + i), p)


def normal(seed=0, size=70):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(size), jnp.float32)


def bits(tree):
    return [(np.asarray(leaf).dtype.name, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


whether_compiled = pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
INNER = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(0.1),
    "lamb": lambda: optax.lamb(0.1),
    "schedule-free": lambda: optax.contrib.schedule_free_sgd(0.1),
}
every_inner = pytest.mark.parametrize("inner", INNER.values(), ids=INNER.keys())

# 10, then three steps of -1 to 7, and half of the way back: 8.5; and so on.
ANALYTIC = [9, 8, 8.5, 7.5, 6.5, 7, 6, 5, 5.5]


@whether_compiled
def test_the_first_cycle_is_a_whole_cycle(jit):
    path, _ = train(lookahead(optax.sgd(1.0), sync_period=3), jnp.array([10.0]), ones, 9, jit=jit)
    assert np.ravel(path).tolist() == ANALYTIC


def test_a_scan_is_the_same_run():
    tx = lookahead(optax.sgd(1.0), sync_period=3)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jnp.ones(1), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, slow_params(state, params))

    start = jnp.array([10.0])
    (_, state), (fast, slow) = jax.lax.scan(step, (start, tx.init(start)), length=9)
    assert np.ravel(fast).tolist() == ANALYTIC
    assert np.ravel(slow).tolist() == [10, 10, 8.5, 8.5, 8.5, 7, 7, 7, 5.5]
    assert state.steps == 0


@pytest.mark.parametrize(
    ("inner", "inner_state", "golden"),
    [
        ("momentum", "keep", {5: (0.48542, -1.8716340259), 10: (-0.0591872708, -1.6128402008172809)}),
        ("momentum", "reset", {6: (0.436878, -1.852917685641), 10: (0.2356325764, -1.7515069634533207)}),
        ("momentum", "pullback", {6: (0.321696, -1.817590629951), 10: (0.0882226528, -1.6821735821353005)}),
        ("adam", "keep", {5: (0.753981830963610, -1.751477902978258), 10: (0.519556062882343, -1.507051659861132)}),
    ],
)
def test_golden_trajectory(inner, inner_state, golden):
    tx = lookahead(INNER[inner](), inner_state=inner_state)
    with jax.enable_x64(True):
        path, _ = train(tx, jnp.array([1.0, -2.0]), lambda p, i: p * jnp.array([1.0, 0.1]), 10)
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
    tx = lookahead(optax.sgd(1.0, momentum=0.9), 3, inner_state=inner_state)
    params, state, momentum = jnp.zeros(1), None, []
    for _ in after_syncs:
        (*_, params), state = train(tx, params, ones, 3, state=state)
        momentum.append(float(optax.tree_utils.tree_get(state.inner, "trace")[0]))
    np.testing.assert_allclose(momentum, after_syncs, rtol=3e-6)  # They are given to 6 digits.


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("sync_period", "slow_step"), [(1, 0.5), (3, 0.5), (5, 0.2), (4, 0.8), (2, 0.0), (3, 1.0)])
def test_lookahead_follows_the_paper(sync_period, slow_step, dtype):
    start = np.random.default_rng(0).standard_normal(70).astype(dtype)
    grads = np.random.default_rng(1).standard_normal((11, 70)).astype(dtype)
    rule = partial(reference.sgd, lr=0.1, momentum=0.9, dampening=0.0, weight_decay=0.0, nesterov=False)
    cycle = {"sync_period": sync_period, "slow_step": slow_step}
    exact = list(reference.lookahead(rule, np.float64(start), lambda p, i: np.float64(grads[i]), 11, **cycle))
    with jax.enable_x64(dtype == "float64"):
        given = jnp.asarray(grads)
        tx = lookahead(INNER["momentum"](), **cycle)
        path, _ = train(tx, jnp.asarray(start), lambda p, i: given[i], 11)
        assert path[-1].dtype == dtype
    scale = np.abs(exact).max(axis=0) + np.abs(np.diff(exact, axis=0)).sum(axis=0)
    assert (np.abs(np.array(path) - exact) <= 4 * 11 * np.finfo(dtype).eps * scale).all()


@pytest.mark.filterwarnings("ignore:.*getattr:DeprecationWarning")
def test_optax_says_the_same_about_a_pair_of_params():
    theirs = optax.lookahead(INNER["adam"](), sync_period=3, slow_step_size=0.3)
    pair = optax.LookaheadParams.init_synced(normal())
    path, state = [], theirs.init(pair)
    for i in range(7):
        updates, state = theirs.update(waves(pair.fast, i), state, pair)
        pair = optax.apply_updates(pair, updates)
        path.append(pair)
    params, state = train(lookahead(INNER["adam"](), 3, 0.3), normal(), waves, 7)
    np.testing.assert_allclose(params[-1], path[-1].fast, rtol=0, atol=1e-5)
    np.testing.assert_allclose(slow_params(state, params[-1]), path[-1].slow, rtol=0, atol=1e-5)


@whether_compiled
@every_inner
def test_slow_step_one_is_the_inner_transformation_bit_for_bit(inner, jit):
    plain, _ = train(inner(), normal(), waves, 7, jit=jit)
    for sync_period in (1, 3):
        wrapped, _ = train(lookahead(inner(), sync_period, 1.0), normal(), waves, 7, jit=jit)
        assert bits(plain) == bits(wrapped)


@pytest.mark.parametrize("slow_step", [0.0, 0.3, 0.7, 1.0])
def test_a_sync_leads_to_the_exact_lerp_and_the_next_cycle_starts_there_bit_for_bit(slow_step):
    start = normal(size=1000)
    a, rest = np.float32(slow_step), np.float32(1 - slow_step)
    slow, tx = np.asarray(start), lookahead(optax.sgd(0.01), 2, slow_step)
    path, state = train(tx, start, waves, 2, jit=False)  # Compiled, products may be contracted.
    gradient = np.asarray(waves(path[0], 1))
    fast = np.asarray(path[0]) + np.float32(-0.01) * gradient
    met = fast - (fast - slow) * rest if slow_step >= 0.5 else slow + a * (fast - slow)
    exact = (np.abs(met) < 2 * np.abs(path[0])) & (np.abs(met) > np.abs(path[0]) / 2)
    assert exact.mean() > 0.9
    assert np.array_equal(np.asarray(path[1])[exact], met[exact])
    assert bits(slow_params(state, path[1])) == bits(path[1])
    (after,), state = train(tx, path[1], waves, 1, jit=False, state=state)
    assert bits(state.slow) == bits(path[1]) == bits(slow_params(state, after))


@whether_compiled
def test_slow_step_zero_returns_to_slow_weights_also_from_nowhere(jit):
    bad = jnp.array([[0.5, 0.5], [jnp.inf, jnp.nan]])
    path, _ = train(lookahead(optax.sgd(1.0), 2, 0.0), jnp.array([1.0, 2.0]), lambda p, i: bad[i], 2, jit=jit)
    assert path[1].tolist() == [1, 2]


@whether_compiled
def test_slow_weights_outlive_a_gradient_that_is_not_finite(jit):
    tx, start = lookahead(optax.sgd(1.0), 3), jnp.array([1.0, 2.0])
    (*_, params), state = train(tx, start, lambda p, i: jnp.array([jnp.inf, 1.0]), 2, jit=jit)
    assert not np.isfinite(params).all()
    assert slow_params(state, params).tolist() == [1, 2]
    path, _ = train(tx, slow_params(state, params), ones, 3, state=tx.init(start), jit=jit)
    assert path[-1].tolist() == [-0.5, 0.5]


def test_weights_loaded_between_cycles_are_the_slow_weights():
    tx = lookahead(optax.sgd(1.0), 3)
    state = tx.init(jnp.zeros(1))
    for loaded in (10.0, 20.0):
        path, state = train(tx, jnp.array([loaded]), ones, 3, state=state)
        assert path[-1] == loaded - 1.5


def test_within_another_lookahead_periods_count_steps():
    tx = lookahead(lookahead(optax.sgd(1.0), 3), 6)
    path, state = train(tx, jnp.array([10.0]), ones, 12)
    assert np.ravel(path).tolist() == [9, 8, 8.5, 7.5, 6.5, 8.5, 7.5, 6.5, 7, 6, 5, 7]
    path, state = train(tx, path[-1], ones, 4, state=state)
    assert slow_params(state, path[-1]) == 7  # The outermost.


def in_steps(gradients, tx, start=10.0):
    given = jnp.array(gradients)[:, None]
    path, state = train(tx, jnp.array([start]), lambda p, i: given[i], len(gradients))
    return np.ravel(path).tolist(), state


def test_a_step_that_is_dropped_around_does_not_advance_the_cycle():
    tx = optax.apply_if_finite(lookahead(optax.sgd(1.0), 3), max_consecutive_errors=5)
    path, _ = in_steps([1.0, np.nan, 1.0, np.inf, np.nan, 1.0, 1.0], tx)
    assert path == [9, 9, 8, 8, 8, 8.5, 7.5]


def test_accumulated_gradients_are_one_step():
    path, state = in_steps([1.0] * 8, optax.MultiSteps(lookahead(optax.sgd(1.0), 3), 2))
    assert path == [10, 9, 9, 8, 8, 8.5, 8.5, 7.5]
    assert slow_params(state, jnp.array([path[-1]])) == 8.5


def test_accumulation_inside_counts_every_call():
    path, _ = in_steps([1.0] * 8, lookahead(optax.MultiSteps(optax.sgd(1.0), 2), 4))
    assert path == [10, 9, 9, 9, 9, 8, 8, 8]


@whether_compiled
def test_the_slow_step_may_follow_a_schedule(jit):
    schedule = optax.piecewise_constant_schedule(0.5, {5: 0.5})
    tx = optax.inject_hyperparams(lookahead)(optax.sgd(1.0), 3, schedule)
    path, _ = train(tx, jnp.array([10.0]), ones, 6, jit=jit)
    assert np.ravel(path).tolist() == [9, 8, 8.5, 7.5, 6.5, 7.75]  # 0.5 of the way, then 0.25.


def test_an_injected_slow_step_and_period_can_be_set():
    tx = optax.inject_hyperparams(lookahead)(optax.sgd(1.0), 5, 0.5)
    (*_, params), state = train(tx, jnp.array([10.0]), ones, 2)
    state.hyperparams["sync_period"], state.hyperparams["slow_step"] = jnp.array(2), jnp.array(0.25)
    path, _ = train(tx, params, ones, 3, state=state)
    # The step that is the third of a cycle of 2 ends it: 10 + (7 - 10) / 4.
    assert np.ravel(path).tolist() == [9.25, 8.25, 8.75]


@pytest.mark.parametrize("inner_state", ["keep", "reset", "pullback"])
def test_injected_hyperparams_inside_are_not_moved_by_a_sync(inner_state):
    tx = lookahead(optax.inject_hyperparams(optax.sgd)(learning_rate=1.0), 3, inner_state=inner_state)
    path, state = in_steps([1.0] * 9, tx)
    assert path == ANALYTIC
    assert state.inner.hyperparams["learning_rate"] == 1


def test_extra_arguments_reach_the_inner_transformation():
    tx = optax.chain(lookahead(optax.polyak_sgd(), 1, 0.5))
    params = jnp.array([2.0])
    updates, _ = tx.update(2 * params, tx.init(params), params, value=jnp.sum(params**2))
    # Polyak's step is f / g^2 = 1 / 4 of the gradient 4: -1, of which the sync leaves half.
    np.testing.assert_allclose(updates, [-0.5], rtol=1e-6)


AROUND = {
    "chain": lambda tx: optax.chain(optax.clip(10.0), tx),
    "masked": lambda tx: optax.masked(tx, {"a": True, "b": False}),
    "partition": lambda tx: optax.partition({"ours": tx, "other": optax.sgd(1.0)}, {"a": "ours", "b": "other"}),
    "two": lambda tx: optax.partition({"a": tx, "b": lookahead(optax.sgd(1.0), 9)}, {"a": "a", "b": "b"}),
}


@pytest.mark.parametrize(("name", "slow_b"), [("chain", 10), ("masked", 12), ("partition", 8), ("two", 10)])
def test_slow_weights_are_found_in_what_is_around(name, slow_b):
    tx = AROUND[name](lookahead(optax.sgd(1.0), 3))
    start = {"a": jnp.array(10.0), "b": [jnp.array(10.0)]}
    (*_, params), state = train(tx, start, ones, 2)
    assert jax.tree.map(float, slow_params(state, params)) == {"a": 10, "b": [slow_b]}
    assert jax.tree.map(float, jax.jit(slow_params)(state, params)) == {"a": 10, "b": [slow_b]}
    assert params["a"] == 8


def test_leaves_of_any_kind_keep_structure_and_dtype():
    start = {
        "none": None,
        "scalar": jnp.float32(10),
        "empty": jnp.zeros((0, 3)),
        "half": jnp.full((2, 2), 10, jnp.float16),
        "brain": jnp.full(2, 10, jnp.bfloat16),
        "complex": jnp.array([10 + 10j]),
        "numpy": np.full(3, 10, np.float32),
        "nothing": (),
    }
    tx = lookahead(optax.sgd(1.0), 3)
    path, state = train(tx, start, ones, 3)
    assert jax.tree.map(jnp.result_type, path[-1]) == jax.tree.map(jnp.result_type, start)
    assert path[-1]["complex"].tolist() == [8.5 + 10j]
    assert all((np.real(leaf) == 8.5).all() for leaf in jax.tree.leaves(path[-1]))
    assert jax.tree.structure(slow_params(state, path[-1])) == jax.tree.structure(start)
    assert train(tx, {}, ones, 3)[0] == [{}, {}, {}]


@pytest.mark.parametrize("inner_state", ["reset", "pullback"])
@pytest.mark.parametrize("inner", [optax.identity, lambda: optax.noisy_sgd(0.1, 0.1, key=jax.random.key(0))])
def test_inner_states_without_arrays_or_with_keys_of_random_numbers(inner, inner_state):
    path, state = train(lookahead(inner(), 2, inner_state=inner_state), normal(), waves, 5)
    assert np.isfinite(path).all()
    assert state.steps == 1


@whether_compiled
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_slow_weights_of_16_bits_keep_their_digits_from_cycle_to_cycle(dtype, jit):
    ulp = float(jnp.finfo(dtype).eps)
    start = jnp.ones(3, dtype)
    # A cycle's step is an ulp, and a sync takes a quarter of that, which rounding would lose again and again.
    step = jnp.full(3, -ulp, dtype)
    tx = lookahead(optax.sgd(1.0), 1, 0.25)
    path, state = train(tx, start, lambda p, i: step, 8, jit=jit)
    assert [(float(p[0]) - 1) / ulp for p in path] == [0, 0, 1, 1, 1, 1, 2, 2]  # 0.25, 0.44, 0.58, ...
    assert state.slow.dtype == "float32"
    loaded, _ = train(tx, jnp.full(3, 4, dtype), lambda p, i: step, 1, state=state, jit=jit)
    assert loaded[0].tolist() == [4, 4, 4]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_after_a_sync_parameters_of_16_bits_are_the_slow_weights_rounded(dtype):
    start = normal(size=1000).astype(dtype)
    (params,), state = train(lookahead(optax.sgd(0.5), 1, 0.7), start, waves, 1)
    ratio = np.abs(np.float32(params) / np.float32(start))
    near = (ratio > 0.5) & (ratio < 2)
    assert near.mean() > 0.4
    assert (params == state.slow.astype(dtype))[near].all()


def test_a_reset_begins_with_the_weights_of_the_sync():
    tx = lookahead(optax.contrib.schedule_free_sgd(0.1), 2, inner_state="reset")
    path, state = train(tx, normal(), waves, 2)
    assert bits(state.inner.z) == bits(path[-1])


@pytest.mark.parametrize("inner_state", ["keep", "reset", "pullback"])
def test_buffers_may_be_donated(inner_state):
    tx = lookahead(optax.adam(0.1), 2, inner_state=inner_state)

    step = jax.jit(stepper(tx, waves), donate_argnums=(0, 1))
    plain, _ = train(tx, normal(), waves, 5)
    for init in (tx.init, jax.jit(tx.init)):
        params = normal()
        state = init(params)
        for i in range(5):
            before = params
            params, state = step(params, state, i)
            assert before.is_deleted()
        assert bits(params) == bits(plain[-1])


def test_vmap_trains_each_row_as_alone():
    tx, start = lookahead(optax.sgd(0.1), 2), normal(size=(3, 5))
    rows = optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))
    path, state = train(rows, start, waves, 5)
    alone = [train(tx, row, waves, 5)[0][-1] for row in start]
    np.testing.assert_allclose(path[-1], np.stack(alone), rtol=1e-5)
    np.testing.assert_array_equal(jax.vmap(slow_params)(state, path[-1]), state.slow)


def test_slow_weights_lie_where_their_parameters_do():
    code = """if True:
        import jax, optax
        from jax import numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec
        from lookstep.optax import lookahead, slow_params
        jax.config.update("jax_num_cpu_devices", 2)
        shards = NamedSharding(jax.make_mesh((2,), ("rows",)), PartitionSpec("rows"))
        params = jax.device_put(jnp.full((4, 2), 10.0), shards)
        tx = lookahead(optax.sgd(1.0), 3)
        state = tx.init(params)
        assert state.slow.sharding.is_equivalent_to(shards, 2)

        @jax.jit
        def step(params, state):
            updates, state = tx.update(jnp.ones_like(params), state, params)
            return optax.apply_updates(params, updates), state

        for i in range(7):
            params, state = step(params, state)
            assert params.sharding.is_equivalent_to(shards, 2) and state.slow.sharding.is_equivalent_to(shards, 2)
            slow = slow_params(state, params)
            print(*map(float, (params.min(), params.max(), slow.min(), slow.max())))"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    low, high, slow_low, slow_high = zip(*(map(float, line.split()) for line in run.stdout.splitlines()), strict=True)
    assert list(low) == list(high) == ANALYTIC[:7]
    assert slow_low == slow_high == (10, 10, 8.5, 8.5, 8.5, 7, 7)


@pytest.mark.parametrize("inner_state", ["keep", "reset", "pullback"])
def test_a_resumed_run_is_the_same_run(inner_state):
    tx = lookahead(optax.adam(0.1), 3, inner_state=inner_state)
    start = {"w": normal(), "b": jnp.ones(2, jnp.bfloat16)}
    whole, end = train(tx, start, waves, 8)
    for stop in (1, 2, 3, 5):
        (*_, params), state = train(tx, start, waves, stop)
        stored = pickle.dumps(jax.tree.map(np.asarray, (params, state)))
        params, state = jax.tree.map(jnp.asarray, pickle.loads(stored))
        assert isinstance(state, LookaheadState)
        (*_, params), state = train(tx, params, waves, 8 - stop, state=state, first=stop)
        assert bits((params, state)) == bits((whole[-1], end))


def test_train_states_take_it_in_place_of_the_inner_transformation():
    # What flax's TrainState does: init and update with a plain tree, and nothing else.
    for tx in (optax.adam(0.1), lookahead(optax.adam(0.1))):
        params = {"w": normal()}
        updates, _ = tx.update(waves(params, 0), tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: lookahead(optax.adam), TypeError, r"inner must be a gradient transformation such as .*, got adam"),
        (lambda: lookahead(0.1), TypeError, "inner must be a gradient transformation such as .*, got float"),
        (lambda: lookahead(optax.adam(0.1), 0), ValueError, "sync_period must be an integer >= 1, got 0"),
        (lambda: lookahead(optax.adam(0.1), 2.5), TypeError, "sync_period must be an integer >= 1, got float 2.5"),
        (lambda: lookahead(optax.adam(0.1), True), TypeError, "sync_period must be an integer >= 1, got bool True"),
        (lambda: lookahead(optax.adam(0.1), 5, 1.5), ValueError, r"slow_step must be in \[0, 1\], got 1.5"),
        (lambda: lookahead(optax.adam(0.1), 5, np.nan), ValueError, r"slow_step must be in \[0, 1\], got nan"),
        (lambda: lookahead(optax.adam(0.1), 5, "1"), TypeError, "slow_step must be a real number, got str '1'"),
        (lambda: lookahead(optax.adam(0.1), inner_state="rest"), ValueError, "inner_state must be \"keep\", .*'rest'"),
        (
            lambda: (tx := lookahead(optax.sgd(0.1))).update(1.0, tx.init(1.0)),
            ValueError,
            r"lookahead needs the parameters: call update\(grads, state, params\)",
        ),
        (
            lambda: slow_params(optax.adam(0.1).init(1.0), 1.0),
            ValueError,
            "there is no lookahead in this state: pass what its init or update gave",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_cure(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize("missing", ["jax", "optax"])
def test_where_the_framework_is_missing_the_error_says_how_to_get_it(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; import lookstep.optax"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'ImportError: lookstep.optax needs JAX and optax: pip install "lookstep[optax]"' in run.stderr
