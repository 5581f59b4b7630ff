"""Lookahead and RAdam in Keras: the paper's algorithm on each backend, and all that a Keras optimizer goes along with.

They run on the backend that KERAS_BACKEND names, on jax without it; one test runs the file on the others.
"""

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import reference

# Keras chooses its backend once, when it is imported; without a word from the user it would be TensorFlow.
os.environ.setdefault("KERAS_BACKEND", "jax")
keras = pytest.importorskip("keras", minversion="3", reason='Keras 3 is not installed: pip install "lookstep[keras]"')

from keras import ops  # noqa: E402
from keras.optimizers import SGD, Adam, AdamW, LossScaleOptimizer  # noqa: E402

from lookstep.keras import Lookahead, RAdam, SlowWeights  # noqa: E402

# Keras' variables do not know the argument `copy` that NumPy 2 passes on.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

ROOT = Path(__file__).parent.parent
BACKEND = keras.backend.backend()
X = np.random.default_rng(0).standard_normal((40, 3)).astype("f4")
Y = (X @ np.float32([[1], [-2], [3]])).astype("f4")


def step(optimizer, grads, *variables):
    """One step, as Keras' own loops make it: on jax, of values."""
    grads = [g if g is None else ops.convert_to_tensor(g) for g in grads]
    if not optimizer.built:
        optimizer.build(list(variables))
    if BACKEND != "jax":
        optimizer.apply(grads, variables)
        return
    moved, state = optimizer.stateless_apply(
        [v.value for v in optimizer.variables], grads, [v.value for v in variables]
    )
    for variable, value in zip([*variables, *optimizer.variables], [*moved, *state], strict=True):
        variable.assign(value)


def path_of(optimizer, steps, gradient=1.0, start=10.0):
    """The number that a variable of one is after each of some steps."""
    variable = keras.Variable(start)
    path = []
    for _ in range(steps):
        step(optimizer, [np.float32(gradient)], variable)
        path.append(number(variable))
    return path


def model_of(optimizer, hidden=0, **compiled):
    """A small model, the same one each time; a linear one takes least time to compile."""
    keras.utils.set_random_seed(0)
    between = [keras.layers.Dense(hidden, activation="tanh")] if hidden else []
    model = keras.Sequential([keras.Input((3,)), *between, keras.layers.Dense(1)])
    model.compile(optimizer, "mse", **compiled)
    return model


def fit(model, epochs=1, **options):
    """Some epochs of 5 steps."""
    return model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, **options).history


def number(variable):
    return float(ops.convert_to_numpy(variable))


def bits(variables):
    return [ops.convert_to_numpy(v).tobytes() for v in variables]


@pytest.mark.parametrize(
    ("optimizer", "path"),
    [
        (lambda: Lookahead(SGD(1.0), 3, 0.5), [9, 8, 8.5, 7.5, 6.5, 7, 6, 5, 5.5]),
        (lambda: Lookahead(SGD(1.0), 3, 0.0), [9, 8, 10, 9, 8, 10]),
        (lambda: Lookahead(SGD(1.0), 2, 0.25), [9, 9.5, 8.5, 9]),
        (lambda: Lookahead(Lookahead(SGD(1.0), 3), 2), [9, 8, 8.5, 7.5, 6.5, 8.5, 7.5, 6.5, 7, 6, 5, 7]),
        (lambda: Lookahead(Lookahead(SGD(1.0), 2, 1.0), 2), [9, 8, 7, 8, 7, 6, 5, 6]),
        (lambda: Lookahead(SGD(1.0, gradient_accumulation_steps=2), 3), [10, 9, 9, 8, 8, 8.5, 8.5, 7.5]),
        (lambda: Lookahead(SGD(1.0, loss_scale_factor=0.5), 3), [8, 6, 7]),
        (lambda: Lookahead(SGD(1.0, clipvalue=0.25), 2), [9.75, 9.75, 9.5, 9.5]),
        (lambda: Lookahead(SGD(1.0, clipnorm=0.25), 2), [9.75, 9.75]),
        (lambda: Lookahead(SGD(1.0, global_clipnorm=0.25), 2), [9.75, 9.75]),
        (lambda: Lookahead(SGD(0.5, weight_decay=0.5), 2), [7, 7.375]),
        (lambda: LossScaleOptimizer(Lookahead(SGD(0.5), 3), initial_scale=0.5), [9, 8, 8.5, 7.5]),
        (lambda: Lookahead(LossScaleOptimizer(SGD(0.5), initial_scale=0.5), 3), [9, 8, 8.5, 7.5]),
        (
            lambda: Lookahead(Lookahead(LossScaleOptimizer(SGD(0.5), initial_scale=0.5), 3), 2),
            [9, 8, 8.5, 7.5, 6.5, 8.5],
        ),
    ],
)
def test_the_paper_s_numbers_around_what_keras_has(optimizer, path):
    assert path_of(optimizer(), len(path)) == path


@pytest.mark.parametrize(("sync_period", "slow_step"), [(1, 0.5), (3, 0.5), (4, 0.2), (2, 0.8)])
@pytest.mark.parametrize("inner", ["sgd", "radam"])
def test_lookahead_follows_the_paper(inner, sync_period, slow_step):
    start, *grads = np.random.default_rng(1).standard_normal((10, 7)).astype("f4")
    no_decay = {"weight_decay": 0.0}

    def sgd(p, g, state, t):
        return reference.sgd(p, g, state, t, lr=0.1, momentum=0.0, dampening=0.0, **no_decay, nesterov=False)

    def radam(p, g, state, t):
        hyper = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, **no_decay, "decoupled_weight_decay": True}
        return reference.radam(p, g, state, t, **hyper)

    rule, optimizer = {"sgd": (sgd, SGD(0.1)), "radam": (radam, RAdam(0.1, 0.8, 0.9, 1e-3))}[inner]
    cycle = {"sync_period": sync_period, "slow_step": slow_step}
    exact = list(reference.lookahead(rule, np.float64(start), lambda p, i: np.float64(grads[i]), 9, **cycle))
    variable, optimizer = keras.Variable(start), Lookahead(optimizer, **cycle)
    for g, expected in zip(grads, exact, strict=True):
        step(optimizer, [g], variable)
        np.testing.assert_allclose(ops.convert_to_numpy(variable), expected, rtol=3e-6, atol=1e-6)
    assert int(optimizer.iterations) == 9
    assert int(optimizer.syncs) == 9 // sync_period


INNER = {
    "adam": lambda: Adam(0.05),
    "radam": lambda: RAdam(0.05, global_clipnorm=0.5, weight_decay=0.01),
    "nesterov": lambda: SGD(0.05, momentum=0.9, nesterov=True, clipnorm=1.0),
    "ema": lambda: AdamW(0.05, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3),
    "accumulated": lambda: Adam(0.05, gradient_accumulation_steps=2),
}


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_slow_step_one_is_the_wrapped_optimizer_bit_for_bit(inner):
    plain, wrapped = (model_of(o, hidden=4) for o in (inner(), Lookahead(inner(), sync_period=5, slow_step=1.0)))
    assert fit(plain, 3) == fit(wrapped, 3)
    assert bits(plain.variables) == bits(wrapped.variables)
    assert bits(plain.optimizer.variables) == bits(wrapped.optimizer.inner_optimizer.variables)


def test_the_article_s_example_trains():
    model = model_of(Lookahead(Adam(0.05), sync_period=5, slow_step=0.5), hidden=4, metrics=["mae"])
    before = model.evaluate(X, Y, verbose=0)
    losses = fit(model, 5, validation_split=0.2)["val_loss"]
    assert losses[-1] < losses[0]
    after = model.evaluate(X, Y, verbose=0)
    assert after[0] < before[0]


# torch.compile takes half a minute for it, and what it makes is torch's matter.
@pytest.mark.skipif(BACKEND == "torch", reason="torch.compile is too slow for what it would show")
def test_compiled_and_not_are_one_trajectory():
    compiled, plain = (
        model_of(Lookahead(RAdam(0.05), 3), jit_compile=jit, run_eagerly=not jit) for jit in (True, False)
    )
    fit(compiled)
    fit(plain)
    for one, other in zip(compiled.variables, plain.variables, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_after_a_sync_slow_is_fast_bit_for_bit():
    model = model_of(Lookahead(Adam(0.1), 3, 0.7), hidden=4)
    for i in range(1, 10):
        model.train_on_batch(X, Y)
        pairs = model.optimizer._kept()
        assert len(pairs) == 4
        assert (bits(slow for slow, _ in pairs) == bits(fast for _, fast in pairs)) == (i % 3 == 0)


def test_slow_step_zero_returns_to_slow_weights_also_from_nowhere():
    optimizer = Lookahead(SGD(1.0), 2, 0.0)
    variable = keras.Variable([1.0, 2.0])
    step(optimizer, [np.float32([np.inf, np.nan])], variable)
    assert not np.isfinite(ops.convert_to_numpy(variable)).any()
    step(optimizer, [np.float32([np.inf, np.nan])], variable)
    assert ops.convert_to_numpy(variable).tolist() == [1, 2]


def test_weights_loaded_between_cycles_are_the_slow_weights():
    variable, optimizer = keras.Variable(0.0), Lookahead(SGD(1.0), 3)
    optimizer.build([variable])
    for loaded in (10.0, 20.0):
        variable.assign(loaded)
        for _ in range(3):
            step(optimizer, [np.float32(1)], variable)
        assert number(variable) == loaded - 1.5


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_a_variable_without_a_gradient_takes_part_in_the_sync():
    variables, optimizer = [keras.Variable(10.0), keras.Variable(10.0)], Lookahead(SGD(1.0), 3)
    for second in (1.0, 1.0, None):
        step(optimizer, [np.float32(1), second and np.float32(second)], *variables)
    assert [number(v) for v in variables] == [8.5, 9.0]


def test_frozen_layers_stay():
    model = model_of(Lookahead(SGD(0.1), 2), hidden=4)
    model.layers[0].trainable = False
    model.compile(model.optimizer, "mse")
    frozen, before = bits(model.layers[0].variables), bits(model.layers[1].variables)
    fit(model)
    assert bits(model.layers[0].variables) == frozen
    assert bits(model.layers[1].variables) != before
    assert len(model.optimizer._kept()) == 2


def test_a_cycle_counts_updates_that_a_loss_scale_lets_through():
    for optimizer in (LossScaleOptimizer(Lookahead(SGD(1.0), 3)), Lookahead(LossScaleOptimizer(SGD(1.0)), 3)):
        variable = keras.Variable(10.0)
        scale = 2.0**15
        path = []
        for gradient in (1, 1, np.inf, np.nan, 1, 1):
            step(optimizer, [np.float32(gradient * scale)], variable)
            path.append(number(variable))
            scale = scale if np.isfinite(gradient) else scale / 2
        assert path == [9, 8, 8, 8, 8.5, 7.5]
        assert int(optimizer.iterations) == 4


@pytest.mark.parametrize("where", ["around", "inside"])
def test_mixed_precision_trains_with_a_loss_scale(where):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        if where == "around":
            model = model_of(Lookahead(SGD(0.02), 3))
            assert isinstance(model.optimizer, LossScaleOptimizer)
            lookahead = model.optimizer.inner_optimizer
        else:
            lookahead = Lookahead(LossScaleOptimizer(SGD(0.02)), 3)
            model = model_of(lookahead, auto_scale_loss=False)
        losses = fit(model, 4, callbacks=[SlowWeights()])["loss"]
    finally:
        keras.config.set_dtype_policy(policy)
    assert losses[-1] < losses[0]
    assert int(lookahead._iterations) == int(lookahead.iterations) > 15


def test_a_loss_is_scaled_once():
    with pytest.raises(ValueError, match=r"can only be scaled once: .*auto_scale_loss=False"):
        LossScaleOptimizer(Lookahead(LossScaleOptimizer(SGD(1.0))))


def test_the_learning_rate_is_the_wrapped_optimizer_s():
    inner = SGD(0.5)
    optimizer = Lookahead(inner)
    optimizer.learning_rate = 0.25
    assert float(inner.learning_rate) == float(optimizer.learning_rate) == 0.25


def test_callbacks_set_the_learning_rate():
    seen = []

    def halve(epoch, rate):
        seen.append(rate)
        return rate / 2

    model = model_of(Lookahead(SGD(0.5), 2))
    fit(model, 2, callbacks=[keras.callbacks.LearningRateScheduler(halve)])
    assert seen == [0.5, 0.25]
    # No epoch is better than the first by so much.
    plateau = keras.callbacks.ReduceLROnPlateau(monitor="loss", factor=0.5, patience=1, min_delta=1e6, cooldown=0)
    fit(model, 3, callbacks=[plateau])
    assert float(model.optimizer.inner_optimizer.learning_rate) == 0.125 / 4


def test_schedules_count_the_wrapped_optimizer_s_steps():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1, 3], [1.0, 0.5, 0.25])
    assert path_of(Lookahead(SGD(schedule), 3), 6) == [9, 8, 8.75, 8.25, 8, 8.25]
    with pytest.raises(TypeError, match="not settable"):
        Lookahead(SGD(schedule)).learning_rate = 0.1


def test_constraints_hold_after_a_sync():
    variable = keras.Variable(np.float32([1, 0]))
    variable.constraint = keras.constraints.UnitNorm(axis=0)
    optimizer = Lookahead(SGD(1.0), 2)
    step(optimizer, [np.float32([0, -1])], variable)
    np.testing.assert_allclose(variable, np.float32([1, 1]) / np.sqrt(2), rtol=1e-6)
    step(optimizer, [np.float32([1, 0]) / np.sqrt(2, dtype="f4")], variable)
    # (0, 1) and the slow weights (1, 0) meet at (1, 1) / 2, which is put back on the circle.
    np.testing.assert_allclose(variable, np.float32([1, 1]) / np.sqrt(2), rtol=1e-6)


@pytest.mark.parametrize(
    "wrap", [lambda inner: Lookahead(inner, 3), lambda inner: LossScaleOptimizer(Lookahead(inner, 3), 1.0)]
)
@pytest.mark.parametrize("every", [None, 2])
def test_an_average_inside_is_of_weights_after_the_sync(wrap, every):
    inner = SGD(1.0, use_ema=True, ema_momentum=0.75, ema_overwrite_frequency=every)
    optimizer, variable = wrap(inner), keras.Variable(10.0)
    fast, average = 10.0, None
    for i in range(7):
        if i % 3 == 0:
            slow = fast
        fast -= 1
        if i % 3 == 2:
            fast = (slow + fast) / 2
        average = fast if average is None else 0.75 * average + 0.25 * fast
        if every and (i + 1) % every == 0:
            fast = average
        step(optimizer, [np.float32(1)], variable)
        assert number(variable) == pytest.approx(fast, rel=1e-6)
        assert number(inner._model_variables_moving_average[0]) == pytest.approx(average, rel=1e-6)
    assert inner.use_ema
    optimizer.finalize_variable_values([variable])
    assert number(variable) == pytest.approx(average, rel=1e-6)


NESTED = {
    "lookahead": lambda: Lookahead(RAdam(0.05), 4, 0.3),
    "around": lambda: LossScaleOptimizer(Lookahead(Adam(0.05, use_ema=True), 4), initial_scale=8.0),
    "inside": lambda: Lookahead(LossScaleOptimizer(Adam(0.05), initial_scale=8.0), 4),
    "nested": lambda: Lookahead(Lookahead(SGD(0.05, momentum=0.9, gradient_accumulation_steps=2), 3), 2, 0.4),
}


@pytest.mark.parametrize("optimizer", NESTED.values(), ids=NESTED)
def test_a_saved_model_goes_on_bit_for_bit_from_the_middle_of_a_cycle(optimizer, tmp_path):
    model = model_of(optimizer())
    for i in range(3):
        model.train_on_batch(X[i : i + 20], Y[i : i + 20])
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert bits(again.optimizer.variables) == bits(model.optimizer.variables)
    for i in range(6):
        for run in (model, again):
            run.train_on_batch(X[i : i + 20], Y[i : i + 20])
    assert bits(again.variables) == bits(model.variables)
    assert bits(again.optimizer.variables) == bits(model.optimizer.variables)
    assert again.optimizer.get_config() == model.optimizer.get_config()


# The file holds SGD's variables too, which are of no use to another optimizer.
@pytest.mark.filterwarnings("ignore:.* of its own, and 2 are stored", "ignore:Skipping variable loading")
def test_saved_weights_start_a_cycle_of_another_run(tmp_path):
    source = model_of(SGD(0.1))
    fit(source)
    source.save_weights(tmp_path / "run.weights.h5")
    model = model_of(Lookahead(SGD(0.0), 2))
    model.train_on_batch(X, Y)
    model.train_on_batch(X, Y)
    model.load_weights(tmp_path / "run.weights.h5")
    for _ in range(2):
        model.train_on_batch(X, Y)
        assert bits(model.trainable_variables) == bits(source.trainable_variables)


def test_set_weights_sets_the_wrapped_optimizer_s_too():
    source, target = model_of(Lookahead(Adam(0.1), 2)), model_of(Lookahead(Adam(0.1), 2))
    fit(source)
    target.optimizer.build(target.trainable_variables)
    target.optimizer.set_weights([ops.convert_to_numpy(v) for v in source.optimizer.variables])
    assert bits(target.optimizer.variables) == bits(source.optimizer.variables)


CONFIGS = {
    **NESTED,
    "schedule": lambda: Lookahead(Adam(keras.optimizers.schedules.CosineDecay(0.1, 10)), 2, 0.25, name="ahead"),
    "radam": lambda: RAdam(0.1, 0.8, 0.9, 1e-6, weight_decay=0.1, clipnorm=1.0, gradient_accumulation_steps=2),
}


@pytest.mark.parametrize("optimizer", CONFIGS.values(), ids=CONFIGS)
def test_a_config_makes_the_same_optimizer_again(optimizer):
    config = keras.optimizers.serialize(optimizer())
    again = keras.optimizers.deserialize(copy.deepcopy(config))  # Keras takes apart what it is given.
    assert keras.optimizers.serialize(again) == config


def test_a_name_or_a_config_stands_for_the_wrapped_optimizer():
    assert isinstance(Lookahead("sgd").inner_optimizer, SGD)
    assert isinstance(Lookahead(keras.optimizers.serialize(AdamW(0.5))).inner_optimizer, AdamW)
    config = Lookahead(RAdam(0.5), 7, 0.25).get_config()
    again = Lookahead.from_config(config)
    assert (type(again.inner_optimizer), again.sync_period, again.slow_step) == (RAdam, 7, 0.25)
    assert Lookahead.from_config(config).get_config() == config


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_slow_weights_of_16_bits_keep_their_digits_from_cycle_to_cycle(dtype):
    variable, optimizer = keras.Variable(1.0, dtype=dtype), Lookahead(SGD(1.0), 1, 0.125)
    last_bit = {"float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    exact = slow = 1.0
    for _ in range(8):
        step(optimizer, [ops.cast(-last_bit, dtype)], variable)
        # Fast weights go one bit up, slow weights an eighth of that: alone, it would be rounded away.
        slow += 0.125 * (exact + last_bit - slow)
        exact = np.round(slow / last_bit) * last_bit
        assert number(optimizer._kept()[0][0]) == pytest.approx(slow, rel=1e-6)
        assert number(variable) == exact
    assert exact > 1
    variable.assign(3.0)
    step(optimizer, [ops.cast(0.0, dtype)], variable)
    assert number(optimizer._kept()[0][0]) == 3


@pytest.mark.parametrize("inner", [lambda: SGD(0.5), lambda: RAdam(0.5)])
def test_variables_of_several_types_keep_theirs(inner):
    dtypes = ["float16", "bfloat16", "float32"] + ["float64"] * (BACKEND != "jax")
    variables = [keras.Variable([1.0, 2.0], dtype=dtype) for dtype in dtypes]
    optimizer = Lookahead(inner(), 2)
    for _ in range(2):
        step(optimizer, [ops.ones((2,), dtype=dtype) for dtype in dtypes], *variables)
    assert [keras.backend.standardize_dtype(v.dtype) for v in variables] == dtypes
    assert [v.dtype for v, _ in optimizer._kept()] == ["float32"] * 3 + ["float64"] * (BACKEND != "jax")
    for variable in variables:
        np.testing.assert_allclose(ops.convert_to_numpy(ops.cast(variable, "float32")), [0.5, 1.5], rtol=5e-3)


@pytest.mark.parametrize("inner", [lambda: SGD(0.5), lambda: RAdam(0.5, epsilon=1e-3)])
def test_embeddings_train_as_dense_weights_do(inner):
    rows, targets = np.int32([[0, 2], [2, 2], [0, 1], [4, 0]]), np.ones((4, 1), "f4")

    def trained(dense):
        keras.utils.set_random_seed(0)
        table = keras.layers.Embedding(5, 1)
        table.build((None, 2))
        table.embeddings.assign(np.arange(5, dtype="f4")[:, None] / 4)
        given = keras.Input((5,) if dense else (2,), dtype="float32" if dense else "int32")
        looked_up = ops.matmul(given, table.embeddings) if dense else ops.sum(table(given), 1)
        if dense:
            layer = keras.layers.Dense(1, use_bias=False)
            looked_up = layer(given)
            layer.kernel.assign(table.embeddings)
        model = keras.Model(given, looked_up)
        model.compile(Lookahead(inner(), 2), "mse")
        x = np.stack([np.bincount(row, minlength=5) for row in rows]).astype("f4") if dense else rows
        for _ in range(5):
            model.train_on_batch(x, targets)
        return ops.convert_to_numpy(model.trainable_variables[0])

    np.testing.assert_allclose(trained(dense=False), trained(dense=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: Lookahead(Adam(), clipnorm=1.0),
            TypeError,
            r"clipnorm belongs on .* Lookahead\(Adam\(clipnorm=...\)\)",
        ),
        (lambda: Lookahead(Adam(), learning_rate=0.1), TypeError, "learning_rate belongs on the wrapped optimizer"),
        (lambda: Lookahead(Adam(), weight_decay=None), TypeError, "weight_decay belongs on the wrapped optimizer"),
        (lambda: Lookahead(Adam(), use_ema=True), TypeError, "use_ema belongs on the wrapped optimizer"),
        (lambda: Lookahead(Adam(), gradient_accumulation_steps=2), TypeError, "belongs on the wrapped optimizer"),
        (lambda: Lookahead(Adam(), loss_scale_factor=2.0), TypeError, "belongs on the wrapped optimizer"),
        (lambda: Lookahead(Adam(), la_steps=5), TypeError, "'la_steps' .did you mean 'sync_period'"),
        (lambda: Lookahead(Adam(), slow_step_size=0.5), TypeError, "did you mean 'slow_step'"),
        (lambda: Lookahead(Adam(), momentum=0.5), TypeError, "it takes optimizer, sync_period, slow_step, name"),
        (lambda: Lookahead(Adam), TypeError, "optimizer must be one of Keras', .* got the class Adam"),
        (lambda: Lookahead(None), TypeError, "got NoneType"),
        (lambda: Lookahead(Adam(), 0), ValueError, "sync_period must be an integer >= 1, got 0"),
        (lambda: Lookahead(Adam(), 2.5), TypeError, "sync_period must be an integer >= 1"),
        (lambda: Lookahead(Adam(), slow_step=1.5), ValueError, r"slow_step must be in \[0, 1\], got 1.5"),
        (lambda: Lookahead(Adam(), slow_step="0.5"), TypeError, "slow_step must be a real number"),
        (lambda: RAdam(-0.1), ValueError, "learning_rate must be finite and >= 0"),
        (lambda: RAdam(beta_1=1.0), ValueError, r"beta_1 must be in \[0, 1\)"),
        (lambda: RAdam(beta_2=-1), ValueError, r"beta_2 must be in \[0, 1\)"),
        (lambda: RAdam(epsilon=float("nan")), ValueError, "epsilon must be finite and >= 0"),
        (lambda: Lookahead(Adam()).apply([ops.ones(())]), ValueError, r"not built: .* build\(variables\)"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_options_are_set_on_the_wrapped_optimizer():
    optimizer = Lookahead(Adam())
    with pytest.raises(AttributeError, match="clipnorm belongs on the wrapped optimizer: set it on inner_optimizer"):
        optimizer.clipnorm = 1.0
    optimizer.inner_optimizer.clipnorm = 1.0
    optimizer.loss_scale_factor = 2.0  # LossScaleOptimizer sets it.
    assert optimizer.loss_scale_factor == optimizer.inner_optimizer.loss_scale_factor == 2.0
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    assert not optimizer.inner_optimizer._use_weight_decay(keras.Variable(1.0, name="bias"))


def test_slow_weights_are_in_place_inside_the_context_and_fast_ones_after_it():
    model = model_of(Lookahead(Adam(0.1), 3))
    with model.optimizer.slow_weights():  # Nothing is built: nothing moves.
        pass
    start = bits(model.variables)
    model.train_on_batch(X, Y)
    fast = bits(model.variables)
    with model.optimizer.slow_weights():
        assert bits(model.variables) == start
        model.evaluate(X, Y, verbose=0)
    assert bits(model.variables) == fast
    with model.optimizer.slow_weights(), pytest.raises(RuntimeError, match="hold the slow weights already"):
        model.optimizer.slow_weights().__enter__()
    with pytest.raises(ZeroDivisionError), model.optimizer.slow_weights():
        raise ZeroDivisionError
    assert bits(model.variables) == fast
    model.train_on_batch(X, Y)
    model.train_on_batch(X, Y)
    synced = bits(model.variables)
    with model.optimizer.slow_weights():
        assert bits(model.variables) == synced


def test_a_step_among_slow_weights_is_refused():
    variable, optimizer = keras.Variable(10.0), Lookahead(SGD(1.0), 3)
    step(optimizer, [np.float32(1)], variable)
    with optimizer.slow_weights(), pytest.raises(RuntimeError, match="leave slow_weights"):
        step(optimizer, [np.float32(1)], variable)
    assert number(variable) == 9
    model = model_of(Lookahead(SGD(0.1), 10))
    fit(model)
    fast = bits(model.variables)
    # A step that is compiled already cannot see where it is.
    with pytest.raises(RuntimeError, match=r"leave slow_weights|trained inside"), model.optimizer.slow_weights():
        fit(model)
    assert bits(model.variables) == fast


@pytest.mark.parametrize("wrap", [lambda o: o, LossScaleOptimizer])
def test_the_callback_validates_on_slow_weights_and_changes_nothing_else(wrap):
    # A cycle that does not end: slow weights are the ones that it starts with.
    plain, watched = (model_of(wrap(Lookahead(SGD(0.02), 100))) for _ in range(2))
    start = plain.evaluate(X, Y, verbose=0)
    predicted = plain.predict(X, verbose=0)
    fit(plain, 2)
    history = fit(watched, 2, validation_data=(X, Y), callbacks=[SlowWeights()])
    assert history["val_loss"] == pytest.approx([start, start], rel=1e-6)
    assert history["loss"][1] < history["loss"][0]
    assert bits(watched.variables) == bits(plain.variables)
    assert watched.evaluate(X, Y, verbose=0, callbacks=[SlowWeights()]) == pytest.approx(start, rel=1e-6)
    np.testing.assert_allclose(watched.predict(X, verbose=0, callbacks=[SlowWeights()]), predicted, rtol=1e-5)
    assert bits(watched.variables) == bits(plain.variables)


def test_fast_weights_survive_an_interrupted_validation():
    class Stop(keras.callbacks.Callback):
        def on_test_batch_begin(self, batch, logs=None):
            raise KeyboardInterrupt

    model = model_of(Lookahead(SGD(0.02), 100))
    fit(model)
    fast = bits(model.variables)
    callback = SlowWeights()
    with pytest.raises(KeyboardInterrupt):
        model.evaluate(X, Y, verbose=0, callbacks=[callback, Stop()])
    assert bits(model.variables) != fast
    callback.on_train_begin()
    assert bits(model.variables) == fast


def test_the_callback_needs_a_lookahead():
    with pytest.raises(TypeError, match="SlowWeights needs a Lookahead, got SGD"):
        model_of(SGD(0.1)).evaluate(X, Y, verbose=0, callbacks=[SlowWeights()])


@pytest.mark.parametrize("beta_2", [0.0, 0.6, 0.9, 0.99, 0.999, 0.9999, 1 - 1e-6])
def test_radam_s_step_is_exact_early_and_late(beta_2):
    eps32 = float(np.finfo("f4").eps)
    gradient = np.float32([0.5, -2.0])
    optimizer, variable = RAdam(0.5, 0.9, beta_2, 0.0), keras.Variable(np.zeros(2, "f4"))
    optimizer.build([variable])
    for t in [1, 2, 3, 4, 5, 6, 7, 8, 10, 20, 100, 1000, 1999, 2000, 2001, 5000, 10**5, 10**7]:
        for moment in (optimizer._m[0], optimizer._v[0], variable):
            moment.assign(np.zeros(2, "f4"))
        optimizer._iterations.assign(t - 1)
        step(optimizer, [gradient], variable)
        hyper = {"lr": 0.5, "betas": (0.9, beta_2), "eps": 0.0, "weight_decay": 0.0, "decoupled_weight_decay": True}
        expected = reference.radam(np.zeros(2), np.float64(gradient), {}, t, **hyper)
        # Where rho is near to 5, so that rho - 4 is small, its error is five times as large.
        np.testing.assert_allclose(ops.convert_to_numpy(variable), expected, rtol=30 * eps32, err_msg=f"step {t}")


def test_radam_s_golden_trajectory():
    variable, optimizer = keras.Variable(np.float32([1, -2])), RAdam(0.01)
    golden = {
        5: (0.9505417064932420, -1.1047283902037959),
        6: (0.9502843255858699, -1.1044840685771882),
        10: (0.9486460339491539, -1.1029641852945455),
    }
    for t in range(1, 11):
        step(optimizer, [np.float32([1, 10]) * ops.convert_to_numpy(variable)], variable)
        if t in golden:
            np.testing.assert_allclose(variable, golden[t], rtol=1e-6)


def test_radam_divides_zero_by_zero_to_zero_and_hides_no_nan():
    variable = keras.Variable(np.ones(2, "f4"))
    optimizer = RAdam(0.5, 0.9, 0.9, epsilon=0.0)
    for _ in range(20):
        step(optimizer, [np.float32([0, 1])], variable)
    assert variable[0] == 1
    assert variable[1] < 0
    step(optimizer, [np.float32([0, np.nan])], variable)
    assert np.isnan(ops.convert_to_numpy(variable)).tolist() == [False, True]


@pytest.mark.parametrize(("name", "value"), [("sync_period", 0), ("slow_step", 7.0), ("slow_step", float("nan"))])
def test_what_cannot_be_cannot_be_set_either(name, value):
    optimizer = Lookahead(keras.optimizers.SGD(0.1))
    with pytest.raises(ValueError, match=f"{name} must be"):
        setattr(optimizer, name, value)
    assert (optimizer.sync_period, optimizer.slow_step) == (5, 0.5)


def test_radam_s_weight_decay_is_decoupled():
    start, grads = np.float32([1.0, -2.0]), np.random.default_rng(0).standard_normal((12, 2)).astype("f4")
    variable, optimizer = keras.Variable(start), RAdam(0.1, 0.8, 0.9, weight_decay=0.3)
    hyper = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.3, "decoupled_weight_decay": True}
    expected, state = np.float64(start), {}
    for t, g in enumerate(grads, 1):
        step(optimizer, [g], variable)
        expected = reference.radam(expected, np.float64(g), state, t, **hyper)
        np.testing.assert_allclose(variable, expected, rtol=1e-5)


@pytest.mark.parametrize("backend", ["jax", "torch", pytest.param("tensorflow", marks=pytest.mark.tensorflow)])
def test_all_of_this_holds_on_another_backend(backend):
    if backend == BACKEND:
        pytest.skip(f"this process is on {backend} itself")
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    tests = [__file__, "-k", "not another_backend", "-p", "no:cacheprovider", "-q"]
    env = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-m", "pytest", *tests], env=env, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
