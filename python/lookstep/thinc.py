"""Rules, and Lookahead around them, as optimizers of thinc: for its models, and so for spaCy's."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np

from . import lookahead, optimizer, safetensors
from .atomic import StrPath
from .checkpoint import _CLASSES
from .hyper import at_least_zero, flag
from .plain import decode, parse
from .plan import Plan, with_inner

try:
    from thinc.optimizers import Optimizer as _Optimizer
except ImportError as error:
    raise ImportError('lookstep.thinc needs thinc: pip install "lookstep[thinc]"') from error

__all__ = ["Lookahead", "Optimizer"]

_FORMAT = "lookstep.thinc"
_VERSION = 1
_COUNTERS = ("steps", "skipped", "cycles")


class Optimizer(_Optimizer):
    """A rule as an optimizer of thinc; `lookstep.Optimizer.v1` in its registry.

    It is called with a key, weights and a gradient: steps the weights in place, makes the gradient zero, and returns
    both. Each array has a run of its own: its state, its count of steps and its cycle go on when it is called. An array
    that takes the place of another one under its key (by `set_param`, `from_bytes`, ...) goes on with that one's state
    if it has the same shape and dtype; otherwise it starts afresh.

    `averages` are what to evaluate: the slow weights of `Lookahead`, the averages of rules that have some, and the
    weights themselves for others. They are copies, made when they are asked for.
    `learn_rate` and `grad_clip` may be set at any time, and follow their schedules by `step_schedules()`.

    Args:
        rule: a rule such as `lookstep.RAdam(lr=1e-3)`, or what a block of a config has for one: its name and its
            hyper-parameters, `{"name": "RAdam", "lr": 1e-3}`. There, `lr` may also be a schedule of thinc. The schedule
            of `lr`, of thinc or of lookstep, gives its next value at `step_schedules()`; other schedules of lookstep
            count each array's steps.
        grad_clip: the largest norm of one array's gradient, >= 0: larger ones are scaled down to it. 0 clips nothing.
            Or a schedule of thinc.
        use_averages: whether there are `averages`, which spaCy then evaluates and saves; without, they are `None`.

    Raises:
        TypeError: if `rule` is no rule, or an option is of another type.
        ValueError: if a hyper-parameter is out of range, or a block says something unknown.

    Example:
        >>> import numpy as np
        >>> import lookstep as ls
        >>> from lookstep.thinc import Optimizer
        >>> opt = Optimizer(ls.Lookahead(ls.SGD(lr=1.0), sync_period=3))
        >>> w, g = np.array([10.0], "f4"), np.array([1.0], "f4")
        >>> w, g = opt((0, "W"), w, g)
        >>> print(w, g, opt.averages[0, "W"])
        [9.] [0.] [10.]
    """

    def __init__(self, rule: Any, *, grad_clip: Any = 1.0, use_averages: bool = True) -> None:
        """Takes the learning rate out of the rule, to where thinc has it."""
        rule, rate = _made(rule)
        inner = Plan.of(rule, (), [""]).inner
        if rate is None:
            rate = map(inner.lr, count()) if callable(inner.lr) else inner.lr
        numbers = inner._hyper()
        super().__init__(
            rate,
            L2=numbers.get("weight_decay", 0.0),
            beta1=numbers.get("b1", 0.0),
            beta2=numbers.get("b2", 0.0),
            eps=numbers.get("eps", 0.0),
            grad_clip=grad_clip if isinstance(grad_clip, Iterator | list) else at_least_zero("grad_clip", grad_clip),
            use_averages=flag("use_averages", use_averages),
        )
        self._lr = _Rate()
        self._rule = with_inner(rule, replace(inner, lr=self._lr))
        self._runs: dict[Any, tuple[optimizer.Optimizer[Any], float]] = {}
        self._schedule_steps = 0

    def __call__(self, key: Any, weights: Any, gradient: Any, *, lr_scale: float = 1.0) -> tuple[Any, Any]:
        """Steps the weights, in place, and makes the gradient zero.

        Args:
            key: what the weights are known by: the id of their node, and their name there.
            weights: a NumPy array of float32, float64, or 16 bits.
            gradient: a NumPy array of their shape.
            lr_scale: what the learning rate is multiplied by at this step.

        Returns:
            `weights` and `gradient`.

        Raises:
            TypeError, ValueError: if they are no such arrays, or the rate is none; nothing has moved then.
        """
        for name, array in (("weights", weights), ("gradient", gradient)):
            if not isinstance(array, np.ndarray):
                kind = f"{type(array).__module__}.{type(array).__qualname__}"
                raise TypeError(
                    f"the {name} of {key} must be a NumPy array, got {kind}: train on the CPU (--gpu-id -1, NumpyOps), "
                    "or with thinc's own optimizers"
                )
        if not gradient.flags.writeable:  # It is to be made zero, and nothing may move before that is known to go.
            raise ValueError(f"the gradient of {key} is read-only: pass a copy")
        if gradient.size:
            self._lr.now = self.learn_rate * lr_scale
            self._run(key, weights).step({_name(key): gradient})
            gradient[...] = 0
            self.nr_update[key] += 1
        return weights, gradient

    @property
    def averages(self) -> dict[Any, Any] | None:
        """What to evaluate, by key, for `use_params` of a model or of spaCy's pipeline; `None` without averages."""
        if not self._use_averages:
            return None
        # Kernels of thinc refuse the read-only views that there are of slow weights.
        found = [(key, run.slow[_name(key)], run.params[_name(key)]) for key, (run, _) in self._runs.items()]
        return {key: slow.astype(weights.dtype) for key, slow, weights in found}

    @averages.setter
    def averages(self, averages: dict[Any, Any] | None) -> None:
        self._use_averages = averages is not None

    def step_schedules(self) -> None:
        """Goes on to the next values of all schedules: once a step of the whole model, as spaCy does."""
        super().step_schedules()
        self._schedule_steps += 1

    def to_disk(self, path: StrPath, *models: Any) -> None:
        """Writes the state of every array to a safetensors file, whole or not at all, for `from_disk`.

        Weights are not in it: they are the models' own (`model.to_disk`, `nlp.to_disk`, outside of `use_params`). Nor
        are hyper-parameters, which are the config's.

        Args:
            path: the file to make or replace.
            models: all models that the optimizer trains, in an order that you will give to `from_disk` too.

        Raises:
            ValueError: if the optimizer has stepped an array of another model, or of a layer of another framework.
            OSError: if the file cannot be written; what was there before is intact.
        """
        places = {(node.id, name): place for place, (node, name) in _places(models).items()}
        runs: dict[str, Any] = {}
        tensors: dict[str, Any] = {}
        for key, (run, _) in self._runs.items():
            if key not in places:
                raise ValueError(
                    f"{key} is a parameter of none of these models: pass every model that the optimizer has stepped "
                    "(parameters within a PyTorchWrapper cannot be stored)"
                )
            state, place = run.state_dict(), places[key]
            leaf = state["leaves"][_name(key)]
            runs[place] = {name: state[name] for name in _COUNTERS} | {"leaf": leaf["steps"]}
            arrays = {name: value for name, value in leaf.items() if isinstance(value, np.ndarray) and name != "params"}
            arrays["carry"] = np.array([leaf["carry"], state["carry"]])
            tensors |= {f"{place}/{name}": array for name, array in arrays.items()}
        found = {"version": _VERSION, "schedule_steps": self._schedule_steps, "runs": runs}
        safetensors.write(path, tensors, {_FORMAT: json.dumps(found)})

    def from_disk(self, path: StrPath, *models: Any) -> None:
        """Goes on from a state that `to_disk` wrote, bit for bit, also from the middle of a cycle.

        Args:
            path: the file.
            models: the models, with the weights that they had, in the same order. They may be other objects.

        Raises:
            ValueError: if the file is damaged or none of ours, or the state is of other models or of another rule, or
                schedules have gone on further than it; nothing is loaded then.
            OSError: if the file cannot be read.
        """
        places = _places(models)
        runs = {}
        with safetensors.Reader(path) as file:
            if _FORMAT not in file.metadata:
                raise ValueError(f"this is no state of {_FORMAT}: its metadata has no {_FORMAT!r}")
            found = parse(file.metadata[_FORMAT])
            try:
                if found["version"] > _VERSION:
                    raise ValueError(f"the state is of version {found['version']}; this lookstep reads {_VERSION}")
                ahead = int(found["schedule_steps"]) - self._schedule_steps
                for place, counters in found["runs"].items():
                    if place not in places:
                        raise ValueError(f"the state has {place}, which these models do not have")
                    node, name = places[place]
                    runs[node.id, name] = self._restored(node.get_param(name), name, place, counters, file)
            except (AttributeError, KeyError, TypeError) as error:
                raise ValueError(f"the state is damaged, or of another rule: {error!r}") from None
        if ahead < 0:
            raise ValueError(f"schedules are {-ahead} steps ahead of the state: load it into a new optimizer")
        for _ in range(ahead if self.schedules else 0):
            self.step_schedules()
        self._schedule_steps = int(found["schedule_steps"])
        self._runs = runs
        self.nr_update.update({key: run.steps for key, (run, _) in runs.items()})

    def _restored(self, weights: Any, name: str, place: str, counters: Any, file: safetensors.Reader) -> Any:
        """A run that goes on from what a file has of it."""
        run = self._new(name, weights)
        state = run.state_dict() | {counter: counters[counter] for counter in _COUNTERS}
        carries = file.read(f"{place}/carry").tolist()
        leaf = state["leaves"][name]
        kept = {key for key, value in leaf.items() if isinstance(value, np.ndarray)} - {"params"}
        stored = {tensor for tensor in file.tensors if tensor.startswith(f"{place}/")}
        if unknown := stored - {f"{place}/{key}" for key in (*kept, "carry")}:
            raise ValueError(f"the state is not of this rule: it has {min(unknown)}")
        leaf |= {key: file.read(f"{place}/{key}") for key in kept} | {"steps": counters["leaf"], "carry": carries[0]}
        run.load_state_dict(state | {"carry": carries[1]}, allow_nonfinite=True)
        return run, self.grad_clip

    def _run(self, key: Any, weights: Any) -> optimizer.Optimizer[Any]:
        """The run of the weights under a key, over just this array, and with the present options."""
        name = _name(key)
        run, grad_clip = self._runs.get(key, (None, None))
        if run is not None:
            held = run.params[name]
            is_held = held is weights or held.__array_interface__ == weights.__array_interface__
            if is_held and grad_clip == self.grad_clip and run.rule is self._rule:
                return run
        new = self._new(name, weights)
        if run is not None and (held.shape, held.dtype) == (weights.shape, weights.dtype):
            state = run.state_dict() | {"rule": self._rule}
            state["leaves"][name]["params"] = np.array(weights)
            new.load_state_dict(state, allow_nonfinite=True)
        self._runs[key] = new, self.grad_clip
        return new

    def _new(self, name: str, weights: Any) -> optimizer.Optimizer[Any]:
        return optimizer.Optimizer({name: weights}, self._rule, max_grad_norm=self.grad_clip or None)


class _Rate:
    """The learning rate of the present call, which is a schedule to the rule: thinc's schedules and callers set it."""

    now: float = 0.0

    def __call__(self, step: int) -> float:
        return self.now

    def __repr__(self) -> str:
        return "learn_rate"


def Lookahead(
    inner: Any,
    sync_period: Any = 5,
    slow_step: Any = 0.5,
    *,
    inner_state: Any = "keep",
    outer: Any = None,
    grad_clip: Any = 1.0,
    use_averages: bool = True,
) -> Optimizer:
    """Lookahead around a rule, as an optimizer of thinc; `lookstep.Lookahead.v1` in its registry.

    The cycle of an array advances when it is called with a gradient. For all else see `lookstep.Lookahead`, and
    `Optimizer` here. The block of a config:

        [training.optimizer]
        @optimizers = "lookstep.Lookahead.v1"
        sync_period = 5
        slow_step = 0.5
        grad_clip = 1.0

        [training.optimizer.inner]
        name = "RAdam"
        lr = 0.001

    Args:
        inner: the rule that moves fast weights, or a block's name and hyper-parameters of one; see `Optimizer`.
        sync_period: steps a cycle, an integer >= 1.
        slow_step: the fraction of the way that slow weights move, in [0, 1]; or a block's name and arguments of a
            schedule of lookstep.
        inner_state: `"keep"`, `"reset"` or `"pullback"`: what a sync does to the inner rule's state.
        outer: momentum of the sync, or a block's name and arguments of one.
        grad_clip: see `Optimizer`.
        use_averages: see `Optimizer`; `averages` are the slow weights.

    Raises:
        TypeError, ValueError: see `Optimizer`.

    Example:
        >>> import lookstep as ls
        >>> from lookstep.thinc import Lookahead
        >>> Lookahead(ls.RAdam(lr=1e-3), sync_period=5, slow_step=0.5).learn_rate
        0.001
        >>> Lookahead({"name": "RAdam", "lr": 1e-3}, sync_period=5, slow_step=0.5).learn_rate
        0.001

    References:
        Zhang, Lucas, Hinton & Ba, "Lookahead Optimizer: k steps forward, 1 step back", 2019,
        https://arxiv.org/abs/1907.08610
    """
    if isinstance(inner, Mapping):
        options = {"sync_period": sync_period, "slow_step": slow_step, "inner_state": inner_state, "outer": outer}
        rule: Any = {"name": "Lookahead", "inner": inner, **options}
    else:
        _check_no_optimizer("inner", inner)
        rule = lookahead.Lookahead(inner, sync_period, slow_step, inner_state=inner_state, outer=outer)
    return Optimizer(rule, grad_clip=grad_clip, use_averages=use_averages)


def _made(rule: Any) -> tuple[Any, Any]:
    """The rule that a block of a config says, and the schedule of thinc that its learning rate follows, or `None`."""
    _check_no_optimizer("rule", rule)
    if not isinstance(rule, Mapping):
        return rule, None
    block, rate = _without_schedule(rule)
    try:
        return decode(block, _CLASSES), rate
    except ValueError as error:
        raise ValueError(str(error).replace("the value", "rule", 1)) from None


def _check_no_optimizer(name: str, value: Any) -> None:
    if isinstance(value, _Optimizer):
        raise TypeError(
            f"{name} must be a rule, got an optimizer of thinc: "
            'in its block of a config, put name = "RAdam" in place of @optimizers'
        )


def _without_schedule(block: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """The block of a rule without the schedule of thinc that the innermost learning rate follows, and that."""
    plain, rate = dict(block), None
    if isinstance(plain.get("inner"), Mapping):
        plain["inner"], rate = _without_schedule(plain["inner"])
    elif isinstance(plain.get("lr"), Iterator | list):
        rate = plain.pop("lr")
    return plain, rate


def _name(key: Any) -> str:
    """What errors call the weights."""
    return str(key[-1] if isinstance(key, tuple) else key)


def _places(models: tuple[Any, ...]) -> dict[str, tuple[Any, str]]:
    """The parameters of models, as nodes and names there, by where they are found: ids are not the same elsewhere."""
    return {
        f"{index}/{number}/{name}": (node, name)
        for index, model in enumerate(models)
        for number, node in enumerate(model.walk())
        for name in node.param_names
        if node.has_param(name)
    }
