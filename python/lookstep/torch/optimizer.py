"""A torch optimizer over the compiled rules."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any, Literal, overload

import torch

from .. import _core, optimizer
from ..checkpoint import check_cycles
from ..hyper import Rule, is_scheduled
from ..plan import Matched, Plan
from .keys import from_torch, to_torch
from .tensors import Array, array_of, as_tensor

_RUN = "lookstep"
"""Where a group says how far the run has come."""

_State = defaultdict[torch.Tensor, Any]


@dataclass
class _Bound:
    """The optimizer over the memory of tensors, and how they and their groups were when it was made."""

    over: optimizer.Optimizer[dict[str, Array]]
    params: list[torch.Tensor]
    names: list[str]
    places: list[Any]
    hyper: list[dict[str, Any]]
    state: tuple[tuple[int, int], _State, list[tuple[Any, Any]]] | None = None
    """What was last read of its state: after how many steps and syncs, and what is seen of it then."""
    is_aside: bool = False
    """Whether the parameters hold the slow weights."""


class Optimizer(torch.optim.Optimizer):
    r"""Any rule of lookstep as an optimizer of torch: one compiled pass over the memory of CPU tensors.

    What a step does to each tensor is what the rule says, $\theta \leftarrow \text{rule}(\theta, \nabla\theta)$; with
    `Lookahead`, slow and fast weights sync in the same pass. Tensors of bfloat16 and float16 are computed in float32,
    with state and slow weights in float32. Nothing is copied: parameters, gradients and state are read and written
    where they are.

    It is a `torch.optim.Optimizer`: parameter groups, `add_param_group`, learning rate schedulers, closures, hooks,
    `torch.amp.GradScaler`, `copy.deepcopy`, pickle and `torch.load(weights_only=True)` of its state dict work as they
    do there. Hyper-parameters live in `param_groups`, under torch's names (and `slow_step`), and may be changed there
    at any time. State is under torch's keys where torch has the rule, in tensors that share the optimizer's memory, so
    that a checkpoint of `torch.optim.AdamW` goes on here, and one of `AdamW` there. State of a parameter is there once
    it has been stepped. A parameter whose gradient is `None` is not stepped; a sync includes it.

    A tensor that gets other memory (`p.data = ...`) is followed there, with its state.

    Args:
        params: tensors on the CPU of dtype bfloat16, float16, float32 or float64, pairs of a name and such a tensor
            (`model.named_parameters()`), or dicts of them with hyper-parameters of their own, as torch takes them.
        rule: what a step does: `AdamW(lr=1e-3)`, or `Lookahead` around a rule. Of its hyper-parameters, `slow_step`
            alone may follow a schedule.
        max_grad_norm: see `lookstep.Optimizer`, as are all the others; `centralize` is 0 for torch's layers.
        max_grad_value: see `lookstep.Optimizer`.
        nonfinite: see `lookstep.Optimizer`.
        centralize: see `lookstep.Optimizer`.
        master_weights: see `lookstep.Optimizer`.
        state_dtype: see `lookstep.Optimizer`. State in fewer bits is kept under torch's keys, too, but is no state for
            torch's optimizers.
        rounding: see `lookstep.Optimizer`.
        seed: see `lookstep.Optimizer`; a parameter's name, or else its place in the groups, is its path.
        threads: see `lookstep.Optimizer`; torch's own number of threads does not count.

    Raises:
        TypeError: if `rule` is no rule, or a tensor is sparse, on another device, or of another dtype: those that
            `lookstep.torch.Lookahead` around an optimizer of torch's can take.
        ValueError: if a hyper-parameter is out of range or follows a schedule, or tensors share memory.

    Example:
        >>> import torch
        >>> import lookstep as ls
        >>> from lookstep.torch import Optimizer
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = Optimizer(model.parameters(), ls.Lookahead(ls.RAdam(lr=0.1), sync_period=5, slow_step=0.5))
        >>> for _ in range(10):
        ...     loss = (model(torch.ones(4, 3)) - 1).square().mean()
        ...     opt.zero_grad()
        ...     loss.backward()
        ...     opt.step()
        >>> opt.steps, opt.syncs
        (10, 2)
        >>> with opt.slow_weights():
        ...     prediction = model(torch.ones(1, 3))
        >>> sorted(opt.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'slow', 'step']

    References:
        Zhang, Lucas, Hinton & Ba, "Lookahead Optimizer: k steps forward, 1 step back", 2019,
        https://arxiv.org/abs/1907.08610
    """

    param_groups: list[dict[str, Any]]

    def __init__(
        self,
        params: Iterable[Any],
        rule: Rule,
        *,
        max_grad_norm: float | None = None,
        max_grad_value: float | None = None,
        nonfinite: Literal["propagate", "skip", "raise"] = "propagate",
        centralize: int | None = None,
        master_weights: bool = False,
        state_dtype: Literal["bfloat16", "int8"] | None = None,
        rounding: Literal["stochastic", "nearest"] = "stochastic",
        seed: int = 0,
        threads: int | None = None,
    ) -> None:
        """Checks the tensors, and makes the rule's state for them."""
        plan = Plan.of(rule, (), ["params"])
        self._rule = rule
        self._options: dict[str, Any] = {
            "max_grad_norm": max_grad_norm,
            "max_grad_value": max_grad_value,
            "nonfinite": nonfinite,
            "centralize": centralize,
            "master_weights": master_weights,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "seed": seed,
            "threads": threads,
        }
        self._hyper_names = list(_defaults(plan))
        # Once made, it is changed and never replaced: Lightning's optimizers share it with what they wrap.
        self._bound: _Bound | None = None
        if isinstance(params, torch.nn.Module):
            raise TypeError(f"params must be tensors, got a {type(params).__name__}: pass its .parameters()")
        super().__init__(params, _defaults(plan))
        self._bound = self._bind()
        self._note_run()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves every parameter that has a gradient, in place; at the end of a cycle, slow and fast weights sync.

        Args:
            closure: computes the loss and gradients anew, and returns the loss.

        Returns:
            What the closure returned, or `None`.

        Raises:
            TypeError, ValueError, RuntimeError, FloatingPointError: as `lookstep.Optimizer.step`; nothing has moved.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        bound = self._followed()
        hyper = self._hyper(self.param_groups)
        if hyper != bound.hyper:
            bound.over.groups = _matched(hyper, self.param_groups)
            bound.hyper = hyper
        grads = [p.grad if p.grad is None else p.grad.resolve_neg() for p in bound.params]
        arrays = [
            None if grad is None else array_of(f'grads["{name}"]', grad)
            for name, grad in zip(bound.names, grads, strict=True)
        ]
        steps, syncs = bound.over.steps, bound.over.syncs
        bound.over.step(dict(zip(bound.names, arrays, strict=True)))
        if bound.over.syncs != syncs:
            _wrote(bound.params)
        elif bound.over.steps != steps:
            _wrote([p for p, grad in zip(bound.params, grads, strict=True) if grad is not None])
        return loss

    def sync(self) -> None:
        """Ends the cycle now: see `lookstep.Optimizer.sync`."""
        bound = self._followed()
        bound.over.sync()
        _wrote(bound.params)

    @contextmanager
    def slow_weights(self) -> Iterator[None]:
        """A context in which parameters hold the slow weights; the fast ones come back at its end, whatever happens.

        They are what to evaluate and export: see `lookstep.Optimizer.slow_weights`. What is written into the parameters
        inside is gone at the end. Inside, there is one more copy of the parameters.

        Raises:
            RuntimeError: for a step, a sync, `state_dict` and the like, or another such context inside.
        """
        bound = self._followed()
        fast = [p.detach().clone() for p in bound.params]
        slow = bound.over.slow.values()
        bound.is_aside, bound.state = True, None
        try:
            for p, array in zip(bound.params, slow, strict=True):
                p.detach().copy_(as_tensor(array.copy()))
            yield
        finally:
            bound.is_aside = False
            for p, numbers in zip(bound.params, fast, strict=True):
                if p.shape == numbers.shape:
                    p.detach().copy_(numbers)
                else:  # It became another inside.
                    p.data = numbers

    @property
    def rule(self) -> Rule:
        """The rule, as the optimizer was made with it; what it does now, `param_groups` says."""
        return self._rule

    @property
    def steps(self) -> int:
        """Steps applied so far."""
        return self._made.over.steps

    @property
    def syncs(self) -> int:
        """Syncs so far; where cycles are nested, of the innermost one."""
        return self._made.over.syncs

    @property
    def skipped(self) -> int:
        """Steps that were dropped because a gradient was not finite, with `nonfinite="skip"`."""
        return self._made.over.skipped

    @property
    def grad_norm(self) -> float | None:
        """The norm of all gradients of the last step together: see `lookstep.Optimizer.grad_norm`."""
        return self._made.over.grad_norm

    @property
    def slow_step(self) -> float | None:
        """The slow step of the last sync: see `lookstep.Optimizer.slow_step`."""
        return self._made.over.slow_step

    @property
    def state(self) -> _State:
        """The state of each parameter that has been stepped, by torch's keys; tensors share the optimizer's memory.

        What is changed here (tensors put in the place of others, counters, entries) is taken over by the next step.
        After a step, read it anew. Steps of the run and of its cycle go on.
        """
        if self._bound is None:
            return defaultdict(dict)
        self._refuse_aside()
        over = self._bound.over
        stamp = over.steps, over.syncs
        if self._bound.state is None or self._bound.state[0] != stamp:
            state = self._read_state()
            self._bound.state = stamp, state, _seen(state)
        return self._bound.state[1]

    @state.setter
    def state(self, state: Mapping[torch.Tensor, Any]) -> None:
        if self._bound is not None:  # torch's own constructor sets an empty one.
            self._restore(self._followed(), state, self.param_groups, self._run(), allow_nonfinite=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds tensors, with hyper-parameters of their own; their cycle is the others'.

        Raises:
            TypeError, ValueError: as for a new optimizer; nothing is added.
        """
        super().add_param_group(param_group)
        if self._bound is not None:
            try:
                self._followed()
            except BaseException:
                del self.param_groups[-1]
                raise

    def state_dict(self) -> dict[str, Any]:
        """The state as torch has it, with references to tensors.

        Each group says under "lookstep" how far the run has come. Parameters are not in it: save the model beside it.
        """
        self._followed()
        self._note_run()
        state: dict[str, Any] = super().state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any], *, allow_nonfinite: bool = False) -> None:
        """Goes on from a state: of this class, or of torch's optimizer of the same rule.

        A state that has no slow weights (a plain run's) begins a cycle.

        Args:
            state_dict: what `state_dict` gave.
            allow_nonfinite: also take a state that holds an infinity or a NaN.

        Raises:
            ValueError: if it is of other parameters or another rule, or damaged, naming what; nothing is loaded then.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        saved = deepcopy(state_dict["param_groups"])
        ours, theirs = ([len(group["params"]) for group in groups] for groups in (self.param_groups, saved))
        if ours != theirs:
            raise ValueError(f"the state has groups of {theirs} parameters, but this optimizer has groups of {ours}")
        ids = chain.from_iterable(group["params"] for group in saved)
        bound = self._followed()
        of_id = dict(zip(ids, bound.params, strict=True))
        if unknown := [key for key in state_dict["state"] if key not in of_id]:
            raise ValueError(f"the state has {unknown[0]!r}, which is in none of its groups")
        groups = [
            group | other | {"params": group["params"]} for group, other in zip(self.param_groups, saved, strict=True)
        ]
        run = saved[0].get(_RUN, {})
        if not isinstance(run, Mapping):
            raise ValueError(f'"{_RUN}" of the state\'s groups must be a dict, got {type(run).__name__}')
        by_param = {of_id[key]: value for key, value in state_dict["state"].items()}
        self._restore(bound, by_param, groups, run, allow_nonfinite=allow_nonfinite)
        self.param_groups = groups
        self._note_run()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        """What makes pickles and copies: tensors, their state, and the rule."""
        self._followed()
        self._note_run()
        return {
            "defaults": self.defaults,
            "state": dict(self.state),
            "param_groups": self.param_groups,
            "_rule": self._rule,
            "_options": self._options,
            "_hyper_names": self._hyper_names,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Goes on from there, over the copies of the tensors."""
        self._bound = None
        super().__setstate__({key: value for key, value in state.items() if key != "state"})
        bound = self._bind()
        self._restore(bound, state["state"], self.param_groups, self.param_groups[0][_RUN], allow_nonfinite=True)
        self._bound = bound

    def __repr__(self) -> str:
        """The rule, how far it has come, and the groups."""
        self._note_run()
        groups: str = super().__repr__()
        return groups

    @property
    def _made(self) -> _Bound:
        assert self._bound is not None
        return self._bound

    def _bind(self) -> _Bound:
        """The optimizer over the tensors' memory, with new state."""
        params = _params(self.param_groups)
        names = _names(self.param_groups)
        arrays = {name: array_of(f'params["{name}"]', p) for name, p in zip(names, params, strict=True)}
        hyper = self._hyper(self.param_groups)
        groups = _matched(hyper, self.param_groups)
        over = optimizer.Optimizer(arrays, self._rule, groups=groups, **self._options)
        return _Bound(over, params, names, list(map(_place, params)), hyper)

    def _followed(self) -> _Bound:
        """The optimizer over the tensors that groups have now, where their numbers are now, with its state."""
        self._refuse_aside()
        bound = self._made
        moved = list(map(_place, _params(self.param_groups))) != bound.places
        edited = False
        if bound.state is not None and bound.state[0] == (bound.over.steps, bound.over.syncs):
            edited = not _is_same(bound.state[2], _seen(bound.state[1]))
        if moved or edited:
            # From here on, nothing touches the memory where parameters were: it may be gone.
            state, run = self.state, self._run()
            fresh = self._bind() if moved else bound
            self._restore(fresh, state, self.param_groups, run, allow_nonfinite=True)
            vars(bound).update(vars(fresh))
        return bound

    def _refuse_aside(self) -> None:
        if self._made.is_aside:
            raise RuntimeError("params hold the slow weights: leave slow_weights() first, and the fast ones come back")

    def _hyper(self, groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Each group's hyper-parameters, as plain numbers."""
        return [{name: _plain(group[name]) for name in self._hyper_names} for group in groups]

    def _read_state(self) -> _State:
        over, params, state = self._made.over, self._made.params, _State(dict)
        engine, plan = over._engine, over._plan
        # Lookahead keeps something for parameters that have not been stepped, too.
        keeps = over.steps > 0 and bool(plan.levels)
        counts = engine.counters()["leaves"]
        for p, group, kinds, rows, (steps, carry) in zip(
            params, plan.of_leaf, engine.kinds(), engine.rows(), counts, strict=True
        ):
            if steps or keeps:
                state[p] = to_torch(plan.groups[group].inner, kinds, rows, steps, carry)
        return state

    def _run(self) -> dict[str, Any]:
        """How far the run has come, beside what each parameter's state says."""
        over = self._made.over
        counters = over._engine.counters()
        return {
            "rule": type(over._plan.inner).__name__,
            "steps": counters["steps"],
            "skipped": counters["skipped"],
            "cycles": [list(cycle) for cycle in counters["cycles"]],
            "carry": list(counters["carry"]),
        }

    def _note_run(self) -> None:
        run = self._run()
        for group in self.param_groups:
            group[_RUN] = deepcopy(run)

    def _restore(
        self,
        bound: _Bound,
        by_param: Mapping[torch.Tensor, Any],
        groups: Sequence[Mapping[str, Any]],
        run: Mapping[str, Any],
        *,
        allow_nonfinite: bool,
    ) -> None:
        """Takes a state, hyper-parameters of groups, and how far the run had come; all of it or nothing."""
        over = bound.over
        hyper = self._hyper(groups)
        plan = Plan.of(self._rule, _matched(hyper, groups), bound.names)
        name_of_rule = type(plan.inner).__name__
        if run.get("rule", name_of_rule) != name_of_rule:
            raise ValueError(f"the state is of {run['rule']}, but this optimizer's rule is {self._rule}")
        cycles = run.get("cycles") or [[0, 0] for _ in plan.levels]
        check_cycles(cycles)
        kernels = _core.kernels()
        state = over.state_dict()
        has_begun = any(done for done, _ in cycles)
        for name, p, of, kinds in zip(bound.names, bound.params, plan.of_leaf, over._engine.kinds(), strict=True):
            leaf, inner = state["leaves"][name], plan.groups[of].inner
            needed = [kind[0] for kind in kinds] if has_begun else kernels[inner._kernel][1]
            found = by_param.get(p) or {}
            leaf |= from_torch(f'params["{name}"]', inner, kinds, needed, leaf["params"], found)
        state |= {
            "groups": plan.given,
            "steps": run.get("steps", max(leaf["steps"] for leaf in state["leaves"].values())),
            "skipped": run.get("skipped", 0),
            "cycles": cycles,
            "carry": run.get("carry", [0.0, 0.0, 0.0]),
        }
        over.load_state_dict(state, allow_nonfinite=allow_nonfinite)
        bound.hyper, bound.state = hyper, None


def _defaults(plan: Plan) -> dict[str, Any]:
    """The hyper-parameters that groups have."""
    defaults = {field.name: getattr(plan.inner, field.name) for field in fields(plan.inner)}
    if followed := [name for name, value in defaults.items() if is_scheduled(value)]:
        raise ValueError(
            f"{followed[0]} follows {defaults[followed[0]]!r}, but hyper-parameters live in param_groups here: "
            "give a number, and use a scheduler of torch.optim.lr_scheduler"
        )
    if len(plan.levels) == 1 and isinstance(slow_step := plan.levels[0].slow_step, float):
        defaults["slow_step"] = slow_step
    return defaults


def _matched(hyper: Sequence[dict[str, Any]], groups: Sequence[Mapping[str, Any]]) -> Matched:
    """Groups as `lookstep.Optimizer` takes them."""
    of_leaf = [index for index, group in enumerate(groups, 1) for _ in group["params"]]
    return Matched([(f"param_groups[{index}]", different) for index, different in enumerate(hyper)], of_leaf)


def _params(groups: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
    return [p for group in groups for p in group["params"]]


def _names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """The parameters' names, or where they are in groups."""
    given = [name for group in groups for name in group.get("param_names", ())]
    places = [f"{index}/{place}" for index, group in enumerate(groups) for place in range(len(group["params"]))]
    return given if len(set(given)) == len(places) else places


def _place(p: torch.Tensor) -> tuple[Any, ...]:
    """Which tensor this is, and where its numbers are."""
    return id(p), p.data_ptr(), p.stride(), p.shape, p.dtype


def _seen(state: _State) -> list[tuple[Any, Any]]:
    """What is another once somebody has put something else into a state, or written there."""
    found: list[tuple[Any, Any]] = []
    for p, entry in state.items():
        found.append((p, None))
        for key, value in entry.items() if isinstance(entry, Mapping) else ():
            counts = isinstance(value, torch.Tensor) and not value.is_inference()
            found += [(key, None), (value, value._version if counts else None)]
    return found


def _is_same(before: list[tuple[Any, Any]], now: list[tuple[Any, Any]]) -> bool:
    pairs = zip(before, now, strict=False)
    return len(before) == len(now) and all(a is b and x == y for (a, x), (b, y) in pairs)


def _wrote(params: list[torch.Tensor]) -> None:
    """Lets autograd know that numbers have changed."""
    torch.autograd.graph.increment_version(params)


def _plain(value: Any) -> Any:
    """A number of a tensor's; a pair of such, too."""
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, torch.Tensor) else value
