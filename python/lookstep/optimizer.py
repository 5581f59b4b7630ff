"""The optimizer: a rule at work on the user's arrays."""

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar

import numpy as np

from . import checkpoint
from ._core import Engine
from .atomic import StrPath
from .hyper import CHECKS, Rule, above_zero, at_step, count, flag, is_scheduled, real
from .plan import Groups, Plan, with_inner
from .tree import Structure, Tree, is_gpu

if TYPE_CHECKING:
    from .gpu import LossScale, Stats

Params = TypeVar("Params", bound=Tree)

_NUM_THREADS = "LOOKSTEP_NUM_THREADS"
_MOST_THREADS = 1024
_LOOK_AGAIN = 32
"""Steps between looks at whether `params` still holds the same arrays."""


class Optimizer(Generic[Params]):
    r"""Moves parameters in place by a rule.

    The arrays are the user's, and stay so: a step writes new numbers into them, and to load other weights is to write
    them there too (`w[...] = loaded`). Arrays of any layout are stepped in place; contiguous ones are fastest. State is
    made once, here. A step that is refused has changed nothing.

    Parameters of float32 and float64 are computed in their own type; those of float16 and bfloat16 (of `ml_dtypes`) in
    float32, with state and slow weights in float32. Options that are not used cost nothing.

    Args:
        params: a NumPy array of dtype float16, bfloat16, float32 or float64, or a list, tuple or dict of such, to any
            depth. Or arrays on the GPU: a `lookstep.gpu.View`, a `wgpu.GPUBuffer` of float32, or a tree of these.
        rule: what a step does: `SGD`, `Adam`, ... or `Lookahead` around one of them.
        groups: what is different for some leaves: pairs of a regular expression, searched for in a leaf's path
            ("encoder/w"), and a dict of the inner rule's hyper-parameters, of `slow_step`, or `{"frozen": True}`, which
            leaves a leaf untouched (its gradient may be `None`). The first that matches counts.
        max_grad_norm: the largest norm of all gradients together, > 0: larger ones are scaled down to it. The norm is
            accumulated in float64, in a fixed order.
        max_grad_value: the largest magnitude of an element of a gradient, > 0.
        nonfinite: what a gradient that holds an infinity or a NaN does. `"propagate"`: it is stepped with. `"skip"`:
            nothing moves, the cycle does not advance, and `skipped` counts it. `"raise"`: FloatingPointError, and
            nothing has moved.
        centralize: the axis of a gradient that belongs to outputs (-1 for weights that are used as `x @ w`, 0 as torch
            has them): the mean over all other axes is taken away (gradient centralisation, Yong et al., 2020,
            https://arxiv.org/abs/2004.01461). Leaves of one axis stay as they are.
        master_weights: keep a float32 copy of parameters of 16 bits, and step that; the parameters are it, rounded.
            Without it, a step of less than half of a parameter's last bit is lost: bfloat16 has 8 of them.
        state_dtype: what the rule's moments are kept in: `None` for what is computed in, `"bfloat16"`, or `"int8"`: 8
            bits with a scale for each 256 elements, which is coarse for those whose gradients are some thousand times
            smaller than the largest one's. Slow weights and other weights stay whole, and so does all of float64.
        rounding: how they are rounded to that: `"stochastic"`, which is right in the mean, or `"nearest"`, which loses
            what is less than half a step: second moments in bfloat16 hardly fall with it.
        seed: an integer in [0, 2^32): the random bits of an element depend on it, the leaf's path, the element's index
            and the step alone.
        threads: how many may share a step, >= 1; the bits are the same for any number. `None`: the environment variable
            `LOOKSTEP_NUM_THREADS`, else the CPUs that the process may use, by its affinity and its container's limit.
            They are started by the first step that is long enough to be shared (of some 250,000 elements), and sleep
            between steps.
        loss_scale: a `lookstep.gpu.LossScale`, for GPU arrays alone.

    Gradients are multiplied by `scale`, clipped by value, clipped by norm, and centralised, in this order.

    Raises:
        TypeError: if `rule` is no rule, `params` no such tree, or a leaf no such array; the leaf is named by its path.
        ValueError: if there is no leaf, a leaf is read-only, two leaves share memory, an option is out of range, or a
            group matches no leaf.

    Example:
        >>> import numpy as np
        >>> import lookstep as ls
        >>> params = {"w": np.ones((2, 3)), "b": np.zeros(3)}
        >>> opt = ls.Optimizer(params, ls.Lookahead(ls.RAdam(lr=0.1), sync_period=5, slow_step=0.5))
        >>> for _ in range(10):
        ...     opt.step({"w": params["w"] * 2, "b": params["b"] * 2})
        >>> opt.steps, opt.syncs
        (10, 2)
        >>> opt = ls.Optimizer(params, ls.AdamW(lr=0.1), groups=[("b$", {"weight_decay": 0.0})], max_grad_norm=1.0)
        >>> opt.step({"w": params["w"] * 2, "b": params["b"] * 2})
    """

    __slots__ = (
        "__weakref__",
        "_arrays",
        "_engine",
        "_gpu",
        "_leaves",
        "_options",
        "_params",
        "_plan",
        "_structure",
        "_threads",
    )

    def __init__(
        self,
        params: Params,
        rule: Rule,
        *,
        groups: Groups | None = None,
        max_grad_norm: float | None = None,
        max_grad_value: float | None = None,
        nonfinite: Literal["propagate", "skip", "raise"] = "propagate",
        centralize: int | None = None,
        master_weights: bool = False,
        state_dtype: Literal["bfloat16", "int8"] | None = None,
        rounding: Literal["stochastic", "nearest"] = "stochastic",
        seed: int = 0,
        threads: int | None = None,
        loss_scale: "LossScale | None" = None,
    ) -> None:
        """Checks the arrays, and makes the rule's state for them."""
        self._options = {
            "max_grad_norm": max_grad_norm if max_grad_norm is None else above_zero("max_grad_norm", max_grad_norm),
            "max_grad_value": max_grad_value
            if max_grad_value is None
            else above_zero("max_grad_value", max_grad_value),
            "nonfinite": _choice("nonfinite", nonfinite, "propagate", "skip", "raise"),
            "centralize": centralize if centralize is None else _axis(centralize),
            "master_weights": flag("master_weights", master_weights),
            "state_dtype": _choice("state_dtype", state_dtype, None, "bfloat16", "int8"),
            "rounding": _choice("rounding", rounding, "stochastic", "nearest"),
            "seed": _seed(seed),
        }
        self._threads = _threads(threads)
        self._structure = Structure(params)
        self._plan = Plan.of(rule, groups or (), self._structure.paths)
        self._params = params
        self._leaves = leaves = list(self._structure.leaves(params))
        _check_axis(self._options["centralize"], self._structure.names, leaves)
        plan = self._plan
        on_gpu = any(map(is_gpu, leaves))
        if loss_scale is not None and not on_gpu:
            raise ValueError("loss_scale is for GPU arrays: for NumPy arrays, pass scale to step")
        make: Any = _gpu_engine() if on_gpu else Engine
        self._engine: Engine = make(
            self._structure.names,
            leaves,
            plan.of_leaf,
            plan.described(0),
            plan.cycles(),
            self._options
            | {"optimal": plan.is_optimal}
            | {"seed": self._options["seed"] if rounding == "stochastic" else None, "threads": self._threads}
            | {"loss_scale": loss_scale},
        )
        self._gpu: Any = self._engine if on_gpu else None
        self._arrays: Sequence[Any] = leaves if self._gpu is None else self._gpu.views

    def step(self, grads: Any, *, scale: float = 1.0, zero_grads: bool = False, into: Any = None) -> None:
        """Moves every parameter by its gradient, in place; at the end of a cycle, slow and fast weights sync.

        The interpreter lock is released while numbers move, but for so few that it takes longer to get it back.

        Args:
            grads: a tree of the structure of `params`; each leaf an array of its parameter's shape, of any layout,
                read-only or not, of float64 for a parameter of float64, and of any narrower float for others. Where a
                leaf is `None`, the rule leaves the parameter and its state alone; a sync includes it all the same.
            scale: what gradients are multiplied by, such as 1 / the loss's scale.
            zero_grads: make gradients zero in the same pass, for shaders that add to them. For GPU arrays alone.
            into: a `wgpu.GPUCommandEncoder` or `wgpu.GPUComputePassEncoder` that the step is recorded into, to run when
                that is submitted. Without it, a step of GPU arrays is submitted at once. For GPU arrays alone.

        Raises:
            TypeError: if a leaf is no array, or of a dtype that does not go with its parameter's.
            ValueError: if a leaf is missing, unknown, of another shape, or shares memory with a parameter or the state;
                or if a schedule gives a value that cannot be, naming the step.
            FloatingPointError: if a gradient is not finite, with `nonfinite="raise"`.
            RuntimeError: if `params` holds another array than when the optimizer was built, or one that has changed in
                more than its numbers; or if params hold the slow weights.
        """
        if not (self._engine.steps if self._gpu is None else self._gpu.next_step) % _LOOK_AGAIN:
            self._check_bound()
        leaves = self._structure.leaves(grads)
        if self._gpu is not None:
            hyper = self._plan.hyper(self._gpu.next_step) if self._plan.is_scheduled else None
            scale = scale if type(scale) is float and scale == 1.0 else _scale(scale)
            zero_grads = zero_grads is True or (zero_grads is not False and flag("zero_grads", zero_grads))
            self._gpu.step(leaves, scale, hyper, zero_grads, into)
        elif zero_grads is not False or into is not None:
            raise ValueError("zero_grads and into are for GPU arrays: NumPy arrays are stepped at once")
        elif self._plan.is_scheduled:
            self._engine.step(leaves, _scale(scale), self._plan.hyper(self._engine.steps))
        elif type(scale) is float and scale == 1.0:
            self._engine.step(leaves)
        else:
            self._engine.step(leaves, _scale(scale))

    def sync(self) -> None:
        """Ends the cycle now: slow and fast weights meet, as at the end of a whole cycle.

        For what must sync at one moment, such as the players of a game: give each optimizer a `sync_period` that is
        never reached, and sync all after the same steps. Without a step since the last sync, nothing happens. Where
        cycles are nested, the innermost one ends; those around it count that as one of their steps.

        Raises:
            RuntimeError: as `step`.
        """
        self._check_bound()
        if self._plan.is_scheduled:
            self._engine.sync(self._plan.hyper(max(self._counted() - 1, 0)))
        else:
            self._engine.sync()

    def slow_weights(self) -> AbstractContextManager[Params]:
        """A context in which `params` hold the slow weights; the fast ones come back at its end, whatever happens.

        They are what to evaluate and export: slow weights of the outermost `Lookahead`; without one, the averages of
        `ScheduleFreeSGD`, `ScheduleFreeAdamW` and `ASGD`. Where there is no second copy (between cycles, and for other
        rules) slow and fast weights are one, and nothing moves.

        Numbers that are written into params inside are written into the slow weights of `Lookahead`; averages, which
        are made for the occasion, forget them.

        Raises:
            RuntimeError: as `step`; also for a step, a sync or another such context inside.

        Example:
            >>> import numpy as np
            >>> import lookstep as ls
            >>> w = np.array([10.0])
            >>> opt = ls.Optimizer(w, ls.Lookahead(ls.SGD(lr=1.0)))
            >>> opt.step(np.array([1.0]))
            >>> with opt.slow_weights() as params:
            ...     print(params)
            [10.]
            >>> print(w)
            [9.]
        """
        self._check_bound()
        return self._engine.slow_weights(self._params)

    @property
    def slow(self) -> Params:
        """The slow weights: read-only views in a tree of the structure of `params`, right until the next call.

        What `slow_weights` shows; averages of `ScheduleFreeSGD`, `ScheduleFreeAdamW` and `ASGD` are copies.
        """
        slow: Params = self._structure.build(self._engine.slow())
        return slow

    @property
    def state(self) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
        """The rule's state: read-only views by their leaf's path and their name, as in `state["encoder/w"]["m"]`.

        With `state_dtype`, what is kept in fewer bits is a copy in float32, which later steps leave as it is.
        """
        return dict(zip(self._structure.paths, self._engine.state(), strict=True))

    @property
    def params(self) -> Params:
        """The parameters: the arrays that the optimizer was built over."""
        return self._params

    @property
    def rule(self) -> Rule:
        """The rule; set it to another of the same kind to change hyper-parameters from the next step on.

        Raises:
            TypeError: if it is set to what is no rule.
            ValueError: if the new rule needs other state than the old one, or another `sync_period`.
        """
        return self._plan.rule

    @rule.setter
    def rule(self, rule: Rule) -> None:
        self._replan(rule, self._plan.given)

    @property
    def groups(self) -> tuple[tuple[str, dict[str, Any]], ...]:
        """What is different for some leaves; set it to change hyper-parameters of groups from the next step on.

        Raises:
            TypeError, ValueError: as for the argument; also if the new groups need other state than the old ones.
        """
        return tuple((pattern, dict(different)) for pattern, different in self._plan.given)

    @groups.setter
    def groups(self, groups: Groups) -> None:
        self._replan(self._plan.rule, groups)

    def _replan(self, rule: Rule, groups: Groups) -> None:
        """Goes on with other hyper-parameters, where the state that is there is the one that they need."""
        plan = Plan.of(rule, groups, self._structure.paths)
        if plan.needs() != self._plan.needs():
            raise ValueError(
                f"{rule} with these groups keeps other arrays, cycles or frozen leaves than this optimizer: "
                "build a new one"
            )
        self._engine.set_groups(plan.of_leaf, plan.described(self._counted()))
        self._plan = plan

    def _counted(self) -> int:
        """Steps applied so far, also where a GPU has to be asked."""
        if self._gpu is not None:
            self._gpu.stats()
        return self.steps

    @property
    def lr(self) -> float:
        """The inner rule's learning rate at the next step; set it to change it from there on. Groups keep their own.

        Raises:
            TypeError, ValueError: if it is set to anything but a finite number >= 0, or follows a schedule.
        """
        return at_step("lr", self._plan.inner.lr, self.steps)

    @lr.setter
    def lr(self, lr: float) -> None:
        inner = self._plan.inner
        if is_scheduled(inner.lr):
            raise ValueError(f"lr follows {inner.lr!r}: set opt.rule to a rule with another lr instead")
        self.rule = with_inner(self._plan.rule, replace(inner, lr=CHECKS["lr"]("lr", lr)))

    @property
    def steps(self) -> int:
        """Steps applied so far."""
        return self._engine.steps

    @property
    def syncs(self) -> int:
        """Syncs so far; where cycles are nested, of the innermost one."""
        return self._engine.syncs

    @property
    def skipped(self) -> int:
        """Steps that were dropped because a gradient was not finite, with `nonfinite="skip"`."""
        return self._engine.skipped

    @property
    def grad_norm(self) -> float | None:
        """The norm of all gradients of the last step together, scaled and clipped by value but not by norm.

        It is taken with `max_grad_norm`, and where `nonfinite` is not `"propagate"`; without them, it is `None`.
        """
        return self._engine.grad_norm

    @property
    def slow_step(self) -> float | None:
        """The slow step of the last sync: of the innermost `Lookahead`, for leaves without one of their own."""
        return self._engine.slow_step

    def read_stats(self) -> "Stats":
        """How far the run has come: steps, syncs, skipped, grad_norm, slow_step and loss_scale, as a named tuple.

        Where the GPU decides, this is the only way to know: it waits for the GPU, and `steps` and the like are what was
        last read here. Elsewhere it is what they are.
        """
        if self._gpu is None:
            raise TypeError("read_stats is for GPU arrays: steps, syncs, ... of NumPy arrays are always up to date")
        stats: Stats = self._gpu.stats()
        return stats

    @property
    def control(self) -> Any:
        """The buffer of what the GPU decides: its first float32 is the loss scale; `None` where it decides nothing."""
        return None if self._gpu is None else self._gpu.control

    def state_dict(self) -> dict[str, Any]:
        """All that the run is: copies of parameters and state, counters, the rule, groups and options.

        Raises:
            RuntimeError: as `step`.
        """
        self._check_bound()
        arrays, counters = self._engine.dump()
        return checkpoint.state_of(
            self._plan.rule,
            self._plan.given,
            self._options,
            counters,
            dict(zip(self._structure.paths, arrays, strict=True)),
            self._engine.kinds(),
        )

    def load_state_dict(self, state: Mapping[str, Any], *, allow_nonfinite: bool = False) -> None:
        """Goes on from a state: parameters, state, counters, rule and groups become those of `state`.

        Options of the step (`max_grad_norm`, ...) stay this optimizer's own; `Optimizer.load` takes them over too.

        Args:
            state: what `state_dict` gave, of an optimizer over parameters of the same paths, shapes and dtypes, with a
                rule that keeps the same arrays, and the same `master_weights`, `state_dtype`, `rounding` and `seed`.
            allow_nonfinite: also take a state that holds an infinity or a NaN.

        Raises:
            TypeError: if `state` is no dict.
            ValueError: if it is of another version or optimizer, or damaged, naming what; nothing is loaded then.
            RuntimeError: as `step`.
        """
        self._check_bound()
        rule, _, options = checkpoint.made_of(state)
        for name in ("master_weights", "state_dtype", "rounding", "seed"):
            if options[name] != self._options[name]:
                raise ValueError(
                    f"the state has {name} {options[name]!r}, but this optimizer has {self._options[name]!r}"
                )
        plan = Plan.of(rule, checkpoint.groups_of(state, self._structure.paths), self._structure.paths)
        if plan.needs() != self._plan.needs():
            raise ValueError(f"the state is of {rule}, which keeps other arrays or cycles than {self._plan.rule}")
        arrays, counters = checkpoint.checked(
            state,
            self._structure.paths,
            self._arrays,
            self._engine.kinds(),
            [(level.sync_period, plan.is_optimal and depth == 0) for depth, level in enumerate(plan.levels)],
            allow_nonfinite,
        )
        described = plan.described(counters["steps"])
        self._engine.restore(arrays, counters, plan.of_leaf, described)
        self._plan = plan

    def save(self, path: StrPath) -> None:
        """Writes `state_dict` to a safetensors file, whole or not at all, and durably.

        Args:
            path: the file to make or replace.

        Raises:
            ValueError: if a hyper-parameter follows a plain function, which cannot be stored.
            RuntimeError: as `state_dict`.
            OSError: if the file cannot be written; what was there before is intact.

        Example:
            >>> import os, tempfile
            >>> import numpy as np
            >>> import lookstep as ls
            >>> w = np.ones(3)
            >>> opt = ls.Optimizer(w, ls.Adam(lr=0.1))
            >>> opt.step(w.copy())
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     opt.save(os.path.join(folder, "run.safetensors"))
            ...     again = ls.Optimizer.load(os.path.join(folder, "run.safetensors"), np.zeros(3))
            >>> again.steps, bool((again.params == w).all())
            (1, True)
        """
        checkpoint.save(path, self.state_dict())

    @classmethod
    def load(
        cls,
        path: StrPath,
        params: Params,
        *,
        allow_nonfinite: bool = False,
        threads: int | None = None,
        loss_scale: "LossScale | None" = None,
    ) -> Self:
        """An optimizer that continues a saved run, bit for bit.

        Args:
            path: what `save` wrote.
            params: a tree of the same paths, shapes and dtypes as the saved one; the saved parameters are written into
                its arrays.
            allow_nonfinite: also take a state that holds an infinity or a NaN.
            threads: as for a new optimizer; they are this machine's matter, and no part of a run.
            loss_scale: as for a new optimizer; it goes on from the saved scale.

        Raises:
            TypeError, ValueError: if `params` does not fit, or the file is damaged, of a newer version, or none of
                ours; nothing is loaded then.
            OSError: if the file cannot be read.
        """
        paths = Structure(params).paths
        with checkpoint.opened(path, len(paths)) as file:
            rule, groups, options = file.made_of(paths)
            opt = cls(params, rule, groups=groups, threads=threads, loss_scale=loss_scale, **options)
            state = file.state(opt._structure.paths, opt._arrays, opt._engine.kinds())
        opt.load_state_dict(state, allow_nonfinite=allow_nonfinite)
        return opt

    def _check_bound(self) -> None:
        """Refuses to go on with arrays that the user has put others in place of: training would not be seen."""
        now = self._structure.leaves(self._params, "params")
        for index, (leaf, held) in enumerate(zip(now, self._leaves, strict=True)):
            if leaf is not held:
                name = self._structure.names[index]
                raise RuntimeError(
                    f"{name} is another array than the optimizer was built over: write new numbers into that one "
                    "(w[...] = new), or build a new optimizer"
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Another optimizer, over copies of the arrays, that goes on from here."""
        self._check_copied()
        state = self.state_dict()
        other = type(self)(
            deepcopy(self._params, memo), self._plan.rule, groups=self.groups, threads=self._threads, **self._options
        )
        memo[id(self)] = other
        other.__setstate__(state)
        return other

    def __reduce__(self) -> Any:
        """Makes pickles: another optimizer, over copies of the arrays, that goes on from here."""
        self._check_copied()
        options = self._options
        state = self.state_dict()
        for leaf in state["leaves"].values():
            del leaf["params"]  # They come with the arrays.
        return _rebuilt, (type(self), self._params, self._plan.rule, self.groups, options), state

    def _check_copied(self) -> None:
        """Refuses where arrays have no copies."""
        if self._gpu is not None:
            raise TypeError(
                "buffers of a GPU cannot be copied along: load_state_dict of another optimizer takes state_dict()"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Goes on from where the other one was."""
        for path, leaf in zip(self._structure.paths, self._leaves, strict=True):
            state["leaves"][path]["params"] = np.array(leaf)
        self.load_state_dict(state, allow_nonfinite=True)

    def __copy__(self) -> Self:
        """Refuses: a shallow copy would step the same arrays, by a state of its own."""
        raise TypeError("an optimizer is bound to its arrays: use copy.deepcopy, and step the copy's own params")

    def __repr__(self) -> str:
        """The rule, and how far it has come."""
        count = self._structure.count
        leaves = "1 leaf" if count == 1 else f"{count} leaves"
        return f"Optimizer({leaves}, {self.rule}, steps={self.steps}, syncs={self.syncs})"


def _rebuilt(cls: type[Optimizer[Any]], params: Any, rule: Rule, groups: Groups, options: dict[str, Any]) -> Any:
    return cls(params, rule, groups=groups, **options)


def _gpu_engine() -> Any:
    """The engine of GPU arrays, imported where there are some."""
    from .gpu.engine import Engine

    return Engine


def _choice(name: str, value: Any, *choices: Any) -> Any:
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def _axis(value: Any) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"centralize must be the number of an axis, got {type(value).__name__} {value!r}")
    if not -64 <= (axis := int(value)) < 64:  # NumPy's arrays have no more axes.
        raise ValueError(f"centralize must be the number of an axis, got {value!r}")
    return axis


def _check_axis(axis: int | None, names: Sequence[str], leaves: Sequence[Any]) -> None:
    for name, leaf in zip(names, leaves, strict=True):
        ndim = getattr(leaf, "ndim", 0)
        if axis is not None and ndim > 1 and not -ndim <= axis < ndim:
            raise ValueError(f"{name} has {ndim} axes, and none is number {axis}, along which to centralize")


def _threads(value: Any) -> int | None:
    name, given = "threads", value
    if given is None:
        name, text = _NUM_THREADS, os.environ.get(_NUM_THREADS, "").strip()
        if not text:
            return None
        given = int(text) if text.isdecimal() else text
    if not isinstance(given, Integral) or isinstance(given, bool):
        raise (TypeError if value is not None else ValueError)(f"{name} must be an integer >= 1, got {given!r}")
    if given < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {given!r}")
    return min(int(given), _MOST_THREADS)


def _seed(value: Any) -> int:
    seed = count("seed", value)
    if seed >= 2**32:
        raise ValueError(f"seed must be an integer in [0, 2**32), got {value!r}")
    return seed


def _scale(value: Any) -> float:
    scale = real("scale", value)
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"scale must be finite and >= 0, got {value!r}")
    return scale
