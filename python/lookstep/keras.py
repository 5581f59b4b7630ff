"""Lookahead and RAdam as optimizers of Keras 3, on its jax, torch and tensorflow backends.

They are made of `keras.ops`, so that they run inside compiled training steps, on any device that Keras trains on. The
Rust kernel is not used here.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from typing import Any, Self

try:
    import keras
except ImportError as error:
    raise ImportError('optimizers for Keras need Keras 3: pip install "lookstep[keras]"') from error

from keras import ops

from .hyper import Check, at_least_zero, below_one, positive_integer, unexpected, up_to_one

__all__ = ["Lookahead", "RAdam", "SlowWeights"]

_ON_WRAPPED = (
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "gradient_accumulation_steps",
)
"""Options of Keras' optimizers that only the wrapped one can follow."""

_CHECKS: Mapping[str, Check] = {"sync_period": positive_integer, "slow_step": up_to_one}

_FORWARDED = ("learning_rate", "loss_scale_factor")
"""Those that can be read and set through a wrapper, too."""


@keras.saving.register_keras_serializable(package="lookstep")
class Lookahead(keras.optimizers.Optimizer):
    r"""Lookahead around any optimizer of Keras: k steps forward, one step back.

    Fast weights $\theta$, which are the model's, are moved by the wrapped optimizer for `sync_period` steps ($k$); then
    slow weights $\phi$ move a fraction `slow_step` ($\alpha$) of the way to them, and the fast weights start again from
    there:

    $$\theta_{t,0} = \phi_{t-1}, \qquad \theta_{t,i} = \text{inner}(\theta_{t,i-1}), \qquad
    \phi_t = \phi_{t-1} + \alpha (\theta_{t,k} - \phi_{t-1})$$

    A cycle starts from the weights that its first step finds, so weights that were loaded before it are honoured. Steps
    are updates that are applied: not those that a loss scale skips, and of accumulated gradients only the last. With
    `slow_step=1` this is the wrapped optimizer, bit for bit. To compare the two fairly at another slow step, raise the
    learning rate by `1 / slow_step`.

    After a sync come the variables' constraints, and then the wrapped optimizer's `use_ema`, which so averages the
    weights that each batch leaves. All variables sync, also those without a gradient. The wrapped optimizer may be
    another Lookahead, whose syncs are then the steps of this one, or a `LossScaleOptimizer`.

    State: the wrapped optimizer's, a counter, and slow weights: a variable of each trainable variable's size, in
    float32 for those of 16 bits.

    Args:
        optimizer: the optimizer that moves fast weights, or its name or config; kept as `inner_optimizer`.
        sync_period: steps a cycle (syncs of the wrapped optimizer, where that is a `Lookahead`), an integer >= 1.
        slow_step: the fraction of the way that slow weights move, in [0, 1].
        name: the name of this optimizer.

    Reading and setting `learning_rate` reads and sets the wrapped optimizer's. Options such as `clipnorm` and
    `weight_decay` belong on that one, and are refused here.

    Raises:
        TypeError: if `optimizer` is none of Keras', a hyper-parameter is of another type or unknown, or an option
            belongs on the wrapped optimizer.
        ValueError: if a hyper-parameter is out of range.

    Example:
        >>> import keras
        >>> from lookstep.keras import Lookahead
        >>> w = keras.Variable(10.0)
        >>> optimizer = Lookahead(keras.optimizers.SGD(1.0), sync_period=3, slow_step=0.5)
        >>> for _ in range(6):
        ...     optimizer.apply([keras.ops.ones(())], [w])
        ...     print(float(w), end=" ")
        9.0 8.0 8.5 7.5 6.5 7.0

    References:
        Zhang, Lucas, Hinton & Ba, "Lookahead Optimizer: k steps forward, 1 step back", 2019,
        https://arxiv.org/abs/1907.08610
    """

    def __init__(
        self, optimizer: Any, sync_period: int = 5, slow_step: float = 0.5, name: str | None = None, **unknown: Any
    ) -> None:
        """Checks the hyper-parameters; variables are made when the optimizer is built."""
        for option in unknown:
            raise TypeError(_refusal(option))
        if isinstance(optimizer, str | dict):
            optimizer = keras.optimizers.get(optimizer)
        if not isinstance(optimizer, keras.optimizers.Optimizer):
            got = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else type(optimizer).__name__
            raise TypeError(f"optimizer must be one of Keras', such as keras.optimizers.Adam(1e-3), got {got}")
        # A function: for a number, Keras would make a variable that nothing uses.
        super().__init__(learning_rate=self._learning_rate_within, name=name)
        self.sync_period = sync_period
        self.slow_step = slow_step
        self._showing_slow = False
        self.inner_optimizer = optimizer

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses to set what would have no effect here."""
        made = "inner_optimizer" in vars(self)  # Before that, Keras' constructor sets its own defaults.
        if made and name in _ON_WRAPPED:
            raise AttributeError(f"{name} belongs on the wrapped optimizer: set it on inner_optimizer")
        if name in _CHECKS:
            value = _CHECKS[name](name, value)
        if name != "loss_scale_factor":
            super().__setattr__(name, value)
        elif made and any(isinstance(part, keras.optimizers.LossScaleOptimizer) for part in _chain(self)):
            raise ValueError(
                "this Lookahead wraps a LossScaleOptimizer, and a loss can only be scaled once: wrap the Lookahead in "
                "the LossScaleOptimizer, or compile with auto_scale_loss=False"
            )
        elif made:
            self.inner_optimizer.loss_scale_factor = value

    def build(self, variables: Sequence[Any]) -> None:
        """Makes the slow weights, and what the wrapped optimizer keeps."""
        if self.built:
            return
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        super().build(variables)
        self._slow = [_variable_for(self, variable, "slow") for variable in variables]

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Moves variables by their gradients; at the end of a cycle, slow and fast weights sync.

        Args:
            grads: a gradient or None for each variable.
            trainable_variables: the variables; without them, those that the optimizer was built with.

        Raises:
            RuntimeError: if the variables hold the slow weights.
            ValueError: if the optimizer is not built, and no variables are given.
        """
        if self._showing_slow:
            raise RuntimeError("variables hold the slow weights: leave slow_weights() before the next step")
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            self.build(trainable_variables)
        elif not self.built:
            raise ValueError("the optimizer is not built: pass the variables too, or call build(variables) first")
        *_, innermost = _chain(self)
        # Copies, because variables would show what they become.
        steps, calls = ops.copy(self._steps), ops.copy(innermost._iterations)
        averages = innermost.use_ema and self.slow_step < 1
        self._assign_if(self._between_cycles, self._beginning)
        innermost.use_ema = innermost.use_ema and not averages  # Its averages are of weights after the sync, below.
        try:
            self._apply_within(grads, trainable_variables)
        finally:
            innermost.use_ema = innermost.use_ema or averages
        applied = ops.not_equal(self._steps, steps)
        self._iterations.assign_add(ops.cast(applied, self._iterations.dtype))
        if self.slow_step < 1:
            self._assign_if(ops.logical_and(applied, ops.equal(self._iterations % self.sync_period, 0)), self._ending)
        if averages:
            self._average(innermost, calls)

    def _assign_if(self, condition: Any, changes: Callable[[], Iterator[tuple[Any, Any]]]) -> None:
        """Makes changes to variables where a condition holds, which is a tensor."""
        if keras.backend.backend() == "jax":  # It has no conditional assignments.
            for variable, value in changes():
                variable.assign(ops.where(condition, value, ops.convert_to_tensor(variable)))
            return

        def assign() -> None:
            for variable, value in changes():
                self.assign(variable, value)

        ops.cond(condition, assign, lambda: None)  # Most steps then leave the slow weights alone.

    def _beginning(self) -> Iterator[tuple[Any, Any]]:
        """Where a cycle begins, slow weights are the fast ones."""
        for slow, variable in self._kept():
            fast = ops.cast(variable, slow.dtype)
            if _dtype(variable) != slow.dtype:
                # Slow weights that the fast ones are a rounding of keep their digits.
                is_rounded = ops.equal(ops.cast(slow, _dtype(variable)), ops.convert_to_tensor(variable))
                fast = ops.where(is_rounded, ops.convert_to_tensor(slow), fast)
            yield slow, fast

    def _ending(self) -> Iterator[tuple[Any, Any]]:
        """Where it ends, slow weights move toward the fast ones, which start again from there."""
        for slow, variable in self._kept():
            synced = self._synced(ops.cast(variable, slow.dtype), ops.convert_to_tensor(slow))
            if variable.constraint is not None:
                synced = variable.constraint(synced)
            yield slow, synced
            yield variable, ops.cast(synced, _dtype(variable))

    def _synced(self, fast: Any, slow: Any) -> Any:
        """Where slow weights move to; exact at both ends."""
        if self.slow_step == 0:
            return slow
        if self.slow_step < 0.5:
            return slow + self.slow_step * (fast - slow)
        return fast - (fast - slow) * (1 - self.slow_step)

    def _kept(self) -> list[tuple[Any, Any]]:
        """Slow weights and their variables; Keras overwrites some variables, those of float8 scales, without steps."""
        pairs = zip(self._slow, self._trainable_variables, strict=True)
        return [(slow, variable) for slow, variable in pairs if slow is not None]

    @property
    def _steps(self) -> Any:
        """How many steps the wrapped optimizer has made: updates it applied, or syncs of the Lookahead within."""
        within = _lookahead(self.inner_optimizer)
        return self.inner_optimizer.iterations if within is None else within.syncs

    @property
    def _between_cycles(self) -> Any:
        """Whether slow weights are the fast ones, here and in the Lookahead within."""
        here = ops.equal(self._iterations % self.sync_period, 0)
        within = _lookahead(self.inner_optimizer)
        return here if within is None else ops.logical_and(here, within._between_cycles)

    def _apply_within(self, grads: Sequence[Any], variables: Sequence[Any] | None) -> None:
        inner = self.inner_optimizer
        if not (isinstance(inner, keras.optimizers.LossScaleOptimizer) and keras.backend.backend() == "jax"):
            inner.apply(grads, variables)
            return
        # On jax, it can only skip a step of values that it is handed.
        every = self._trainable_variables
        given = dict(zip(map(id, variables or every), grads, strict=True))
        values = [[ops.convert_to_tensor(v) for v in vs] for vs in (inner.variables, every)]
        moved, state = inner.stateless_apply(values[0], [given.get(id(v)) for v in every], values[1])
        for variable, value in zip([*every, *inner.variables], [*moved, *state], strict=True):
            variable.assign(value)

    def _average(self, optimizer: Any, calls: Any) -> None:
        """Does what `use_ema` of an optimizer does, which had been called as often as `calls` says.

        The formula is Keras'; it averages in `apply`, before there can be a sync.
        """
        called = ops.not_equal(optimizer._iterations, calls)
        done = ops.floor_divide(calls, optimizer.gradient_accumulation_steps or 1)
        averages = optimizer._model_variables_moving_average
        for variable, average in zip(self._trainable_variables, averages, strict=True):
            if average is not None:
                old, now = ops.convert_to_tensor(average), ops.convert_to_tensor(variable)
                momentum = ops.cast(ops.not_equal(done, 0), old.dtype) * optimizer.ema_momentum
                new = ops.where(called, momentum * old + (1 - momentum) * now, old)
                self.assign(average, new)
                if every := optimizer.ema_overwrite_frequency:
                    overwrites = ops.logical_and(called, ops.equal((done + 1) % every, 0))
                    self.assign(variable, ops.where(overwrites, new, now))

    @contextmanager
    def slow_weights(self) -> Iterator[None]:
        """A context in which variables hold the slow weights; the fast ones come back at its end, whatever happens.

        They are what to evaluate and export. Between cycles slow and fast weights are one, and nothing moves. What is
        written into variables inside is gone at the end. On jax, a callback that is called within an epoch has to call
        `model.jax_state_sync()` first, as for any look at the model. `SlowWeights` is a callback that does all this.

        Raises:
            RuntimeError: if the model is trained inside, or another such context opened.

        Example:
            >>> import keras
            >>> from lookstep.keras import Lookahead
            >>> w = keras.Variable(10.0)
            >>> optimizer = Lookahead(keras.optimizers.SGD(1.0))
            >>> optimizer.apply([keras.ops.ones(())], [w])
            >>> with optimizer.slow_weights():
            ...     print(float(w))
            10.0
            >>> float(w)
            9.0
        """
        if self._showing_slow:
            raise RuntimeError("variables hold the slow weights already")
        kept = self._kept() if self.built and not bool(self._between_cycles) else []
        fast = [ops.copy(variable) for _, variable in kept]
        *_, innermost = _chain(self)
        calls = int(innermost._iterations)
        self._showing_slow = True
        try:
            for slow, variable in kept:
                # A copy, because jax hands the buffers of a model over to what evaluates it.
                variable.assign(ops.copy(ops.cast(slow, variable.dtype)))
            yield
        finally:
            self._showing_slow = False
            for (_, variable), value in zip(kept, fast, strict=True):
                variable.assign(value)
        if int(innermost._iterations) != calls:
            raise RuntimeError("the model was trained inside slow_weights(): that training of its weights is undone")

    @property
    def syncs(self) -> Any:
        """How many cycles have ended."""
        return ops.floor_divide(self._iterations, self.sync_period)

    @property
    def iterations(self) -> Any:
        """How many updates the wrapped optimizer has applied."""
        return self.inner_optimizer.iterations

    def _learning_rate_within(self) -> Any:
        return self.inner_optimizer.learning_rate

    @property
    def learning_rate(self) -> Any:
        """The wrapped optimizer's learning rate."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def loss_scale_factor(self) -> float | None:
        """The wrapped optimizer's; to set it here sets it there, as a `LossScaleOptimizer` around this one does."""
        factor: float | None = self.inner_optimizer.loss_scale_factor
        return factor

    def scale_loss(self, loss: Any) -> Any:
        """The loss, scaled as the wrapped optimizer does."""
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Does what the wrapped optimizer does at the end of `fit`."""
        self.inner_optimizer.finalize_variable_values(var_list)

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Tells the wrapped optimizer."""
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    @property
    def variables(self) -> list[Any]:
        """The counter, the slow weights, and the wrapped optimizer's variables."""
        return [*self._variables, *self.inner_optimizer.variables]

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets all `variables`."""
        own = len(self._variables)
        super().set_weights(weights[:own])
        self.inner_optimizer.set_weights(weights[own:])

    def save_own_variables(self, store: Any) -> None:
        """Stores what is not the wrapped optimizer's, which Keras saves by itself."""
        for i, variable in enumerate(self._variables):
            store[str(i)] = variable.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Takes what `save_own_variables` stored."""
        if len(store.keys()) != len(self._variables):
            warnings.warn(
                f"{self.name} has {len(self._variables)} variables of its own, and {len(store.keys())} are stored: "
                "none is loaded",
                stacklevel=2,
            )
            return
        for i, variable in enumerate(self._variables):
            variable.assign(store[str(i)])

    def get_config(self) -> dict[str, Any]:
        """The configuration, with the wrapped optimizer's."""
        return {
            "name": self.name,
            "optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "sync_period": self.sync_period,
            "slow_step": self.slow_step,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Self:
        """An optimizer of a configuration, without state."""
        # A copy, because Keras takes apart what it is given.
        inner = keras.saving.deserialize_keras_object(deepcopy(config["optimizer"]), custom_objects=custom_objects)
        return cls(**{**config, "optimizer": inner})


class SlowWeights(keras.callbacks.Callback):
    """Evaluates on the slow weights: the validation of `fit`, and `evaluate` and `predict`.

    The model's optimizer is a `Lookahead`, or wraps one. The fast weights are back before training goes on.

    Raises:
        TypeError: if there is no Lookahead.

    Example:
        >>> import keras
        >>> import numpy as np
        >>> from lookstep.keras import Lookahead, SlowWeights
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        >>> model.compile(Lookahead(keras.optimizers.SGD(0.1)), "mse")
        >>> x, y = np.ones((8, 2)), np.ones((8, 1))
        >>> _ = model.fit(x, y, validation_data=(x, y), callbacks=[SlowWeights()], verbose=0)
    """

    def __init__(self) -> None:
        """Begins with the fast weights in place."""
        super().__init__()
        self._context: AbstractContextManager[None] | None = None

    def _show(self) -> None:
        self._hide()  # What is left of an evaluation that was interrupted.
        lookahead = _lookahead(self.model.optimizer)
        if lookahead is None:
            raise TypeError(f"SlowWeights needs a Lookahead, got {type(self.model.optimizer).__name__}")
        context = lookahead.slow_weights()
        context.__enter__()
        self._context = context

    def _hide(self) -> None:
        context, self._context = self._context, None
        if context is not None:
            context.__exit__(None, None, None)

    def on_train_begin(self, logs: Any = None) -> None:
        """Puts the fast weights back that an interrupted evaluation has left out."""
        self._hide()

    def on_test_begin(self, logs: Any = None) -> None:
        """Puts the slow weights in place."""
        self._show()

    def on_test_end(self, logs: Any = None) -> None:
        """Puts the fast weights back."""
        self._hide()

    def on_predict_begin(self, logs: Any = None) -> None:
        """Puts the slow weights in place."""
        self._show()

    def on_predict_end(self, logs: Any = None) -> None:
        """Puts the fast weights back."""
        self._hide()


@keras.saving.register_keras_serializable(package="lookstep")
class RAdam(keras.optimizers.Optimizer):
    r"""Rectified Adam: no adaptive step before the second moment can be trusted, so that no warm-up is needed.

    $$m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2$$

    With $\rho_\infty = 2 / (1 - \beta_2) - 1$ and $\rho_t = \rho_\infty - 2 t \beta_2^t / (1 - \beta_2^t)$: while
    $\rho_t \le 5$,

    $$p \leftarrow p - \eta \frac{m}{1 - \beta_1^t}$$

    and from then on

    $$r = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)\rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2)\rho_t}}, \qquad
    p \leftarrow p - \eta r \frac{m}{1 - \beta_1^t} \frac{\sqrt{1 - \beta_2^t}}{\sqrt{v} + \epsilon}$$

    as `lookstep.RAdam` has it: the threshold of 5, the place of $\epsilon$ and its default of 1e-8 are torch's. The
    paper's threshold is 4, and Keras' own optimizers have an `epsilon` of 1e-7.

    State: `m`, `v`, in float32 for variables of 16 bits, which are computed in float32.

    Args:
        learning_rate: a number >= 0, a `LearningRateSchedule`, or a function without arguments.
        beta_1: decay rate of the average of the gradient, in [0, 1).
        beta_2: decay rate of the average of its square, in [0, 1).
        epsilon: added to the denominator, >= 0. Where the denominator is zero all the same, the update is zero.
        weight_decay: Keras' base options from here on, as for its `AdamW`: the decay is decoupled from the gradient.
        clipnorm: see `keras.optimizers.Optimizer`.
        clipvalue: see `keras.optimizers.Optimizer`.
        global_clipnorm: see `keras.optimizers.Optimizer`.
        use_ema: see `keras.optimizers.Optimizer`.
        ema_momentum: see `keras.optimizers.Optimizer`.
        ema_overwrite_frequency: see `keras.optimizers.Optimizer`.
        loss_scale_factor: see `keras.optimizers.Optimizer`.
        gradient_accumulation_steps: see `keras.optimizers.Optimizer`.
        name: the name of this optimizer.

    Raises:
        TypeError: if a hyper-parameter is of another type.
        ValueError: if it is out of range.

    Example:
        >>> import keras
        >>> from lookstep.keras import Lookahead, RAdam
        >>> optimizer = Lookahead(RAdam(1e-3), sync_period=5, slow_step=0.5)
        >>> optimizer.inner_optimizer.epsilon
        1e-08

    References:
        Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", 2020, https://arxiv.org/abs/1908.03265
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str | None = None,
    ) -> None:
        """Checks the hyper-parameters; variables are made when the optimizer is built."""
        super().__init__(
            learning_rate=learning_rate if callable(learning_rate) else at_least_zero("learning_rate", learning_rate),
            weight_decay=weight_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            name=name,
        )
        self.beta_1 = below_one("beta_1", beta_1)
        self.beta_2 = below_one("beta_2", beta_2)
        self.epsilon = at_least_zero("epsilon", epsilon)

    def build(self, variables: Sequence[Any]) -> None:
        """Makes the moments."""
        if self.built:
            return
        super().build(variables)
        self._m = [_variable_for(self, variable, "m") for variable in variables]
        self._v = [_variable_for(self, variable, "v") for variable in variables]

    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any
    ) -> None:
        # What depends on the step alone is the same for all variables.
        scalars = self._scalars(learning_rate)
        super()._backend_update_step(grads, trainable_variables, scalars)

    def _scalars(self, learning_rate: Any) -> tuple[Any, Any]:
        """Whether the step is adaptive, and by what it is multiplied."""
        dtype = "float64" if any(_dtype(variable) == "float64" for variable in self._trainable_variables) else "float32"
        t = ops.cast(self.iterations + 1, dtype)
        size = ops.cast(learning_rate, dtype) / _complement(self.beta_1, t)
        inf = 2 / (1 - self.beta_2) - 1
        if inf <= 5:
            return ops.zeros((), dtype="bool"), size
        rho = _rho(self.beta_2, t)
        adaptive = rho > 5
        rho = ops.where(adaptive, rho, 5)  # No roots of less than zero, even where they are not taken.
        squared = (rho - 4) * (rho - 2) * inf / ((inf - 4) * (inf - 2) * rho)
        return adaptive, size * ops.where(adaptive, ops.sqrt(squared * _complement(self.beta_2, t)), 1)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Moves one variable; in place of the learning rate are the scalars of the step."""
        adaptive, size = learning_rate
        i = self._get_variable_index(variable)
        m, v = ops.convert_to_tensor(self._m[i]), ops.convert_to_tensor(self._v[i])
        # A sparse gradient may name a row twice: only added up can it be squared.
        g = ops.add(ops.zeros_like(m), ops.cast(gradient, m.dtype))
        m = self.beta_1 * m + (1 - self.beta_1) * g
        v = self.beta_2 * v + (1 - self.beta_2) * ops.square(g)
        z = ops.where(adaptive, ops.sqrt(v) + self.epsilon, 1)
        nothing = ops.equal(z, 0)
        step = ops.where(nothing, 0, ops.cast(size, m.dtype) * m / ops.where(nothing, 1, z))
        self.assign(self._m[i], m)
        self.assign(self._v[i], v)
        self.assign(variable, ops.cast(ops.cast(variable, m.dtype) - step, _dtype(variable)))

    def get_config(self) -> dict[str, Any]:
        """The configuration."""
        config: dict[str, Any] = super().get_config()
        return config | {"beta_1": self.beta_1, "beta_2": self.beta_2, "epsilon": self.epsilon}


def _complement(beta: float, t: Any) -> Any:
    """1 - beta^t, to the last digits also where that is small."""
    return -ops.expm1(t * math.log(beta)) if beta else ops.ones_like(t)


def _rho(beta: float, t: Any) -> Any:
    """The paper's rho: the length of the simple average that the second moment stands for.

    With `x = -ln beta` it is `rho_inf - 2 t / (exp(t x) - 1)`, which early on is a small difference of large numbers:
    in float32 nothing is left of it. It is also `t - 2 (E(t x) - E(x)) / x`, where `E(x)` is small then, and is
    `x / (1 - exp(-x)) - 1 - x / 2`. About `t x = 2`, each takes away a third of what it takes it from.
    """
    x = -math.log(beta)
    early = t - 2 * (_beyond(t * x) - _beyond(x)) / x
    late = 2 / (1 - beta) - 1 - 2 * t / ops.expm1(t * x)
    return ops.where(t * x < 2, early, late)


def _beyond(x: Any) -> Any:
    """`E`, which is `x / 2 coth(x / 2) - 1`, by the continued fraction of that, to the last digit up to two."""
    y, tail = x * x / 4, 0.0
    for n in range(19, 1, -2):
        tail = y / (n + tail)
    return tail


def _dtype(variable: Any) -> str:
    """The type of a variable of Keras or of its backend."""
    name: str = keras.backend.standardize_dtype(variable.dtype)
    return name


def _variable_for(optimizer: Any, variable: Any, name: str) -> Any:
    """A variable of an optimizer for one of the model: of its type, but float32 for 16 bits.

    None for a variable that Keras overwrites with its gradient.
    """
    if getattr(variable, "overwrite_with_gradient", False):
        return None
    path = getattr(variable, "path", variable.name).replace("/", "_").replace(":", "_")
    return optimizer.add_variable(
        shape=variable.shape,
        dtype="float32" if _dtype(variable) in ("float16", "bfloat16") else _dtype(variable),
        layout=getattr(variable, "_layout", None),
        name=f"{path}_{name}",
    )


def _chain(optimizer: Any) -> Iterator[Any]:
    """An optimizer and those that it wraps, the outermost first."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "inner_optimizer", None)


def _lookahead(optimizer: Any) -> Lookahead | None:
    """The outermost Lookahead of an optimizer."""
    return next((part for part in _chain(optimizer) if isinstance(part, Lookahead)), None)


def _refusal(option: str) -> str:
    """Why Lookahead does not take a keyword."""
    if option in _ON_WRAPPED + _FORWARDED:
        return f"{option} belongs on the wrapped optimizer, as in Lookahead(Adam({option}=...))"
    return unexpected("Lookahead", option, ["optimizer", "sync_period", "slow_step", "name"])
