"""Lookahead as a gradient transformation of optax. It lives inside jit: the Rust kernels are not used here."""

from functools import partial
from typing import Any, Literal, NamedTuple

from .hyper import CHECKS

try:
    import jax
    import optax
    from jax import lax
    from jax import numpy as jnp
except ImportError as error:
    raise ImportError('lookstep.optax needs JAX and optax: pip install "lookstep[optax]"') from error

__all__ = ["LookaheadState", "lookahead", "slow_params"]


class LookaheadState(NamedTuple):
    """The state of `lookahead`, a pytree.

    Attributes:
        inner: the inner transformation's state.
        slow: the slow weights, a tree of the structure of the parameters; float32 where those are of 16 bits.
        steps: how many steps of the cycle are done, an int32.
        before: with `inner_state="pullback"`, the inner state that the cycle began with; else empty.
    """

    inner: Any
    slow: Any
    steps: jax.Array
    before: Any


def lookahead(
    inner: optax.GradientTransformation,
    sync_period: int | jax.Array = 5,
    slow_step: float | jax.Array = 0.5,
    *,
    inner_state: Literal["keep", "reset", "pullback"] = "keep",
) -> optax.GradientTransformationExtraArgs:
    r"""Lookahead around any gradient transformation, with the slow weights in the state: parameters stay what they are.

    Fast weights $\theta$ are moved by the inner transformation for `sync_period` steps ($k$); then slow weights $\phi$
    move a fraction `slow_step` ($\alpha$) of the way to them, and the fast weights start again from there:

    $$\theta_{t,0} = \phi_{t-1}, \qquad \theta_{t,i} = \text{inner}(\theta_{t,i-1}), \qquad
    \phi_t = \phi_{t-1} + \alpha (\theta_{t,k} - \phi_{t-1})$$

    Gradients are taken at the parameters, which are the fast weights; `slow_params` gives what to evaluate. Updates are
    added to parameters as they are, so nothing may change them on the way: put it last in a chain.

    A cycle starts from the parameters that its first step finds, so slow and fast weights are equal there bit for bit,
    and parameters that were loaded before it are honoured. A step that a transformation around this one drops
    (`optax.apply_if_finite`, `optax.MultiSteps`) does not count; what the inner one drops does.

    What is exact: with `slow_step=1` updates are the inner ones, bit for bit. A gradient that is not finite leaves the
    slow weights of its cycle as they are; with `slow_step=0`, the sync returns to them from parameters that are finite.
    What is not: a sync is an update that is added, `params + (slow - params)`, so its last bit may be rounded where it
    more than halves or doubles a parameter, and it cannot bring back a parameter that is infinite or NaN. XLA may
    contract products and sums, so that the last bits of a compiled step and of one that is not may differ.

    For parameters of 16 bits, slow weights are float32. They keep their digits from cycle to cycle where the parameters
    are still those that the sync has left.

    Around another Lookahead, periods count steps in both: `lookahead(lookahead(tx, 3), 6)` syncs at every second sync
    within.

    Args:
        inner: a `optax.GradientTransformation` such as `optax.adam(1e-3)`. Extra arguments of `update` go to it.
        sync_period: steps a cycle, an integer >= 1.
        slow_step: the fraction of the way that slow weights move, in [0, 1]. For a schedule of it, use
            `optax.inject_hyperparams(lookahead)`: what that puts in is not checked, and a 1 is then exact only to
            the contraction of products.
        inner_state: what a sync does to the inner state: `"keep"` leaves it as it is; `"reset"` makes it what
            `inner.init` gives, counts and injected hyper-parameters too; `"pullback"` moves its floating-point arrays
            as slow weights move, from what they were when the cycle began, and leaves the others.

    Returns:
        A `optax.GradientTransformationExtraArgs`, whose `update` needs `params`.

    Raises:
        TypeError: if `inner` is no gradient transformation, or a hyper-parameter is of another type.
        ValueError: if a hyper-parameter is out of range; in `update`, without `params`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from lookstep.optax import lookahead, slow_params
        >>> tx = lookahead(optax.sgd(1.0), sync_period=3, slow_step=0.5)
        >>> params = jnp.array([10.0])
        >>> state = tx.init(params)
        >>> for _ in range(6):
        ...     updates, state = tx.update(jnp.array([1.0]), state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     print(params[0], slow_params(state, params)[0])
        9.0 10.0
        8.0 10.0
        8.5 8.5
        7.5 8.5
        6.5 8.5
        7.0 7.0

    References:
        Zhang, Lucas, Hinton & Ba, "Lookahead Optimizer: k steps forward, 1 step back", 2019,
        https://arxiv.org/abs/1907.08610
    """
    if isinstance(inner, type) or not (callable(getattr(inner, "init", None)) and hasattr(inner, "update")):
        got = getattr(inner, "__name__", None) or type(inner).__name__
        raise TypeError(f"inner must be a gradient transformation such as optax.adam(1e-3), got {got}")
    if inner_state not in ("keep", "reset", "pullback"):
        raise ValueError(f'inner_state must be "keep", "reset" or "pullback", got {inner_state!r}')
    # What `optax.inject_hyperparams` puts in is an array, whose value is not known while it is traced.
    if not isinstance(sync_period, jax.Array):
        sync_period = CHECKS["sync_period"]("sync_period", sync_period)
    if not isinstance(slow_step, jax.Array):
        slow_step = CHECKS["slow_step"]("slow_step", slow_step)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> LookaheadState:
        state = inner.init(params)
        before = jax.tree.map(_copy, state) if inner_state == "pullback" else ()
        slow = jax.tree.map(lambda p: _copy(_wide(p)), params)
        return LookaheadState(state, slow, jnp.zeros([], jnp.int32), before)

    def update(updates: Any, state: LookaheadState, params: Any = None, **extra: Any) -> tuple[Any, LookaheadState]:
        if params is None:
            raise ValueError("lookahead needs the parameters: call update(grads, state, params)")
        starts = state.steps == 0
        slow = jax.tree.map(partial(_at_start, starts), params, state.slow)
        before = state.before
        if inner_state == "pullback":
            before = jax.tree.map(partial(jnp.where, starts), state.inner, before)

        updates, now = inner.update(updates, state.inner, params, **extra)

        syncs = state.steps + 1 >= sync_period
        moves = syncs & (slow_step < 1)  # At 1, the sync leaves everything as it is.
        met = jax.tree.map(lambda s, p, u: _lerp(s, _wide(p) + _wide(u), slow_step), slow, params, updates)
        updates = jax.tree.map(partial(_toward, moves), met, params, updates)
        slow = jax.tree.map(partial(jnp.where, moves), met, slow)
        if inner_state == "reset":
            fresh = inner.init(optax.apply_updates(params, updates))
            now = jax.tree.map(partial(jnp.where, syncs), fresh, now)
        elif inner_state == "pullback":
            now = jax.tree.map(lambda old, new: _pulled(moves, old, new, slow_step), before, now)
        return updates, LookaheadState(now, slow, jnp.where(syncs, 0, state.steps + 1), before)

    return optax.GradientTransformationExtraArgs(init, update)


def slow_params(state: Any, params: Any) -> Any:
    """The slow weights, to evaluate and export: those of the outermost `lookahead` in the state of any transformation.

    Between cycles they are the parameters. So are those of leaves that a mask keeps from every `lookahead`.

    Args:
        state: the state of `lookahead`, or of what it is in: a chain, a mask, `optax.MultiSteps`, ...
        params: the parameters as they are after the last update.

    Returns:
        A tree of the structure and dtypes of `params`.

    Raises:
        ValueError: if there is no `lookahead` in the state.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from lookstep.optax import lookahead, slow_params
        >>> tx = optax.chain(optax.clip(1.0), lookahead(optax.sgd(1.0)))
        >>> params = {"w": jnp.array([10.0])}
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"w": jnp.array([5.0])}, state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> print(params["w"], slow_params(state, params)["w"])
        [9.] [10.]
    """
    found = [part for part in jax.tree.leaves(state, is_leaf=_is_ours) if _is_ours(part)]
    if not found:
        raise ValueError("there is no lookahead in this state: pass what its init or update gave, also within a chain")
    for part in found:
        params = jax.tree.map(partial(_slow, part.steps == 0), part.slow, params, is_leaf=_is_masked)
    return params


def _is_ours(part: Any) -> bool:
    return isinstance(part, LookaheadState)


def _is_masked(part: Any) -> bool:
    return isinstance(part, optax.MaskedNode)


def _slow(between: Any, slow: Any, params: Any) -> Any:
    return params if _is_masked(slow) else jnp.where(between, params, slow.astype(jnp.asarray(params).dtype))


def _copy(x: Any) -> Any:
    """A buffer of its own: state and parameters may both be donated."""
    return jnp.array(x, copy=True)


def _wide(x: Any) -> Any:
    """The array in the type that is computed in: float32 at least."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _rounded(x: Any, dtype: Any) -> Any:
    """What is left of an array in another type; a cast there and back could be simplified away."""
    info = jnp.finfo(dtype)
    return x if x.dtype == dtype else lax.reduce_precision(x, info.nexp, info.nmant)


def _at_start(starts: Any, p: Any, slow: Any) -> Any:
    """The slow weights of the cycle that may start here."""
    p = jnp.asarray(p)
    found = p.astype(slow.dtype)
    if p.dtype != slow.dtype:
        found = jnp.where(found == _rounded(slow, p.dtype), slow, found)
    return jnp.where(starts, found, slow)


def _lerp(slow: Any, fast: Any, slow_step: Any) -> Any:
    """The point between slow and fast, exact at both ends; the slow end also where fast is not finite."""
    real = jnp.finfo(fast.dtype).dtype
    part, rest = jnp.asarray(slow_step, real), jnp.asarray(1 - slow_step, real)
    way = fast - slow
    return jnp.where(slow_step == 0, slow, jnp.where(slow_step >= 0.5, fast - way * rest, slow + part * way))


def _toward(moves: Any, met: Any, p: Any, update: Any) -> Any:
    """The update, or at a sync, the one that leads to where slow and fast meet."""
    update = jnp.asarray(update)
    way = _rounded(met, jnp.asarray(p).dtype) - _wide(p)
    return jnp.where(moves, way.astype(update.dtype), update)


def _pulled(moves: Any, before: Any, now: Any, slow_step: Any) -> Any:
    """An array of the inner state, moved as slow weights move."""
    if not jnp.issubdtype(now.dtype, jnp.inexact):
        return now
    return jnp.where(moves, _lerp(_wide(before), _wide(now), slow_step).astype(now.dtype), now)
