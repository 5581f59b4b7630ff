"""Lookahead around any optimizer of torch, on any device, by torch's own operations."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import LBFGS, Adagrad, Optimizer

from .. import lookahead as rules
from ..hyper import CHECKS, count, unexpected
from ..rules import SGD
from .optimizer import Optimizer as Compiled

_SLOW = "slow"
"""The key of slow weights in a parameter's state, and the beginning of the keys of other state that is pulled back."""

_PROGRESS = "lookahead"
"""The key, in every parameter group, of how far the run is: the way of a state_dict that all trainers leave open."""

_START = {"steps": 0, "syncs": 0, "cycle_steps": 0}

_SCALARS = ("step", "mu_product", "mu", "eta")
"""State that torch.optim keeps in tensors without axes: not to be taken for state of a parameter without axes."""

_INSIDE = "params hold the slow weights: leave slow_weights() first, so that the fast ones come back"


class Lookahead(Optimizer):
    r"""Lookahead around an optimizer of torch: k steps forward, one step back.

    Fast weights $\theta$, the parameters, are moved by the inner optimizer for `sync_period` steps ($k$); then slow
    weights $\phi$ move a fraction `slow_step` ($\alpha$) of the way to them, and the fast weights start again from
    there:

    $$\theta_{t,0} = \phi_{t-1}, \qquad \theta_{t,i} = \text{inner}(\theta_{t,i-1}), \qquad
    \phi_t = \phi_{t-1} + \alpha (\theta_{t,k} - \phi_{t-1})$$

    A cycle starts from the weights that its first step finds, so weights that were loaded before it are honoured. It
    counts steps that were applied: one that a `GradScaler` skips is none, and one that calls a closure several times is
    one. Parameters without a gradient take part in the sync; those that do not require one have no slow weights. A
    parameter that joins within a cycle starts from what its first step finds, and syncs with the others. With
    `slow_step=1` this is the inner optimizer, bit for bit.

    It is an optimizer of torch itself: give it, and not the inner one, to `GradScaler`, trainers and checkpoints.
    Parameter groups are the inner optimizer's own, so a scheduler may be attached to either. A group may have a
    `slow_step` of its own, which can be changed there at any time, as a learning rate can.

    State: the inner optimizer's; in each parameter's entry beside that, `"slow"`, a tensor of the parameter's size, on
    its device and of its dtype, but of float32 for parameters of 16 bits, so that slow weights keep their digits from
    cycle to cycle; and with `"pullback"` one more for each tensor that is pulled back, as `"slow_exp_avg"`.

    Args:
        optimizer: any optimizer of torch but another `Lookahead`.
        sync_period: steps a cycle, an integer >= 1.
        slow_step: the fraction of the way that slow weights move, in [0, 1].
        inner_state: what a sync does to the inner optimizer's state: `"keep"` leaves it as it is; `"reset"` drops all
            of it, step counts too, before the next cycle's first step; `"pullback"` moves tensors of their parameter's
            shape as slow weights move, from what they were after the last sync (zero at first), and leaves the rest.

    Raises:
        TypeError: if `optimizer` is none of torch, or a hyper-parameter is of another type, or unknown.
        ValueError: if a hyper-parameter is out of range, or state cannot be pulled back (that of `LBFGS`).

    Example:
        >>> import torch
        >>> from lookstep.torch import Lookahead
        >>> w = torch.nn.Parameter(torch.tensor([10.0]))
        >>> opt = Lookahead(torch.optim.SGD([w], lr=1.0), sync_period=3, slow_step=0.5)
        >>> for _ in range(6):
        ...     opt.zero_grad()
        ...     w.sum().backward()
        ...     opt.step()
        ...     print(w.item(), end=" ")
        9.0 8.0 8.5 7.5 6.5 7.0

    References:
        Zhang, Lucas, Hinton & Ba, "Lookahead Optimizer: k steps forward, 1 step back", 2019,
        https://arxiv.org/abs/1907.08610
    """

    inner: Any
    """The optimizer that moves fast weights."""

    # Mutated and never replaced, so that what imitates this object by its attributes (Lightning does) shares them.
    _own: dict[Tensor, dict[str, Tensor]]
    _progress: dict[str, Any]
    _aside: list[list[Tensor]]

    def __new__(cls, *args: Any, **kwargs: Any) -> "Lookahead":
        """Refuses unknown keywords before Python does, with the known ones."""
        known = ["optimizer", "sync_period", "slow_step", "inner_state"]
        for name in kwargs:
            if name not in known:
                raise TypeError(unexpected("Lookahead", name, known))
        made: Lookahead = super().__new__(cls)
        return made

    def __init__(
        self,
        optimizer: Optimizer,
        sync_period: int = 5,
        slow_step: float = 0.5,
        *,
        inner_state: Literal["keep", "reset", "pullback"] = "keep",
    ) -> None:
        """Checks the hyper-parameters, and adds them to the parameter groups."""
        if isinstance(optimizer, Compiled):
            raise TypeError(
                "optimizer must be an optimizer of torch, got lookstep.torch.Optimizer, whose rule says it all: "
                "Optimizer(params, lookstep.Lookahead(rule))"
            )
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, Lookahead):
            got = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else type(optimizer).__name__
            raise TypeError(
                "optimizer must be an optimizer of torch, such as torch.optim.AdamW(model.parameters()), and no "
                f"Lookahead, got {got}"
            )
        default = CHECKS["slow_step"]("slow_step", slow_step)
        progress = _checked({"sync_period": sync_period, "inner_state": inner_state, **_START})
        if inner_state == "pullback" and isinstance(optimizer, LBFGS):
            raise ValueError("the state of LBFGS is no average of gradients: inner_state must be 'keep' or 'reset'")
        before = optimizer.defaults.get("slow_step")
        for group in optimizer.param_groups:
            if group.pop(_PROGRESS, None) and group["slow_step"] == before:  # From a Lookahead that was here before.
                del group["slow_step"]
            CHECKS["slow_step"]("slow_step", group.setdefault("slow_step", default))
        optimizer.defaults["slow_step"] = default
        self.__setstate__({"inner": optimizer, "_own": {}, "_progress": progress})
        self._share_progress()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps the inner optimizer; at the end of a cycle, slow and fast weights sync.

        Args:
            closure: what computes the loss and its gradients anew, for the inner optimizer. However often that calls
                it, it is one step.

        Returns:
            What the inner optimizer's step gives: the closure's loss.

        Raises:
            TypeError, ValueError: if a group's `slow_step` was set to what it cannot be.
            RuntimeError: if params hold the slow weights.
        """
        self._refuse_inside()
        progress = self._progress
        is_last = progress["cycle_steps"] + 1 >= progress["sync_period"]
        if is_last:
            self._slow_steps()  # Refused here, before anything has moved.
        if progress["cycle_steps"] == 0:
            self._start_cycle()
        else:
            self._snapshot([p for p in self._taking_part() if p not in self._own])
        loss = self.inner.step() if closure is None else self.inner.step(closure)
        progress["steps"] += 1
        progress["cycle_steps"] += 1
        if progress["inner_state"] == "pullback" and progress["cycle_steps"] == 1:
            for p in self._own:  # Made now, so that checkpoints have the same keys from the first step on.
                self._pulled_back(p)
        if is_last:
            self.sync()
        return loss

    def sync(self) -> None:
        """Ends the cycle now: slow and fast weights meet, as at the end of a whole cycle.

        For what must sync at one moment, such as the players of a game: give each optimizer a `sync_period` that is
        never reached, and sync all after the same steps. Without a step since the last sync, nothing happens.

        Raises:
            TypeError, ValueError, RuntimeError: as `step`.
        """
        self._refuse_inside()
        progress = self._progress
        if progress["cycle_steps"] == 0:
            return
        pairs = defaultdict(list)
        for group, slow_step in zip(self.param_groups, self._slow_steps(), strict=True):
            for p in group["params"]:
                if p in self._own:
                    pairs[slow_step].append((self._own[p][_SLOW], p))
                    if progress["inner_state"] == "pullback":
                        pairs[slow_step] += self._pulled_back(p)
        with torch.no_grad():
            for slow_step, both in pairs.items():
                for slow, fast in _alike(both):
                    _meet(slow, fast, slow_step)
        progress["cycle_steps"] = 0
        progress["syncs"] += 1

    @contextmanager
    def slow_weights(self) -> Iterator[None]:
        """A context in which parameters hold the slow weights; the fast ones come back at its end, whatever happens.

        They are what to evaluate and export. Between cycles slow and fast weights are one, and nothing moves. Numbers
        that are written into parameters inside are written into the slow weights.

        Raises:
            RuntimeError: for a step, a sync, `state_dict`, `load_state_dict`, a copy or another such context inside.

        Example:
            >>> import torch
            >>> from lookstep.torch import Lookahead
            >>> w = torch.nn.Parameter(torch.tensor([10.0]))
            >>> opt = Lookahead(torch.optim.SGD([w], lr=1.0))
            >>> w.sum().backward()
            >>> opt.step()
            >>> with opt.slow_weights():
            ...     print(w.item())
            10.0
            >>> print(w.item())
            9.0
        """
        self._refuse_inside()
        params = [p for p in self._params() if p in self._own] if self._progress["cycle_steps"] else []
        slow = [self._own[p][_SLOW] for p in params]
        self._aside.append([p.detach().clone() for p in params])
        shown = False
        try:
            _copy(params, slow)
            shown = True
            yield
        finally:
            fast = self._aside.pop()
            try:
                if shown:
                    _take(slow, params)
            finally:
                for p, numbers in zip(params, fast, strict=True):
                    if p.shape != numbers.shape:  # It became another inside.
                        p.data = numbers
                _copy(params, fast)

    @property
    def steps(self) -> int:
        """Steps applied so far."""
        steps: int = self._progress["steps"]
        return steps

    @property
    def syncs(self) -> int:
        """Syncs so far."""
        syncs: int = self._progress["syncs"]
        return syncs

    @property
    def sync_period(self) -> int:
        """Steps a cycle; set it to change it. A cycle that has this many steps already ends with its next one."""
        period: int = self._progress["sync_period"]
        return period

    @sync_period.setter
    def sync_period(self, sync_period: int) -> None:
        self._progress["sync_period"] = CHECKS["sync_period"]("sync_period", sync_period)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups; each has a `slow_step`, and says under `"lookahead"` how far the run is."""
        groups: list[dict[str, Any]] = self.inner.param_groups
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's defaults, and `slow_step`."""
        defaults: dict[str, Any] = self.inner.defaults
        return defaults

    @property
    def state(self) -> defaultdict[Tensor, dict[str, Any]]:
        """State by parameter: the inner optimizer's, and slow weights beside it.

        The dicts are made when they are asked for; what is put into them or taken out is so for good.
        """
        return _State(self.inner.state, self._own)

    @state.setter
    def state(self, state: defaultdict[Tensor, dict[str, Any]]) -> None:
        self.inner.state = state
        self._own.clear()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the inner optimizer, which may have a `slow_step` of its own. See `torch.optim.Optimizer`."""
        CHECKS["slow_step"]("slow_step", param_group.get("slow_step", self.defaults["slow_step"]))
        self.inner.add_param_group(param_group)
        self._share_progress()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Makes gradients `None`, or zero. See `torch.optim.Optimizer`."""
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """All that the run is but parameters, in torch's form; tensors are no copies. See `torch.optim.Optimizer`.

        Raises:
            RuntimeError: if params hold the slow weights.
        """
        self._refuse_inside()
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        self._share_progress()
        saved = self.inner.state_dict()
        entries, progress = dict(saved["state"]), dict(self._progress)
        for key, p in self._by_key(saved):
            if p in self._own:
                entries[key] = {**entries.get(key, {}), **self._own[p]}
        groups = [{**group, _PROGRESS: progress} for group in saved["param_groups"]]
        state = {**saved, "state": entries, "param_groups": groups}
        for after in self._optimizer_state_dict_post_hooks.values():
            state = after(self, state) or state
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state: the inner optimizer's, slow weights, the cycle, and what groups say.

        As everywhere in torch, that includes hyper-parameters: `sync_period`, `slow_step` and `inner_state` become
        those of the state. Load the parameters beside it. A state of the inner optimizer alone, of a run that was plain
        so far, does as well: then the hyper-parameters stay, a cycle starts, and steps count from there.

        Args:
            state_dict: what `state_dict` gave, of an optimizer with as many parameters in as many groups.

        Raises:
            ValueError: if it does not fit; nothing is loaded then.
            RuntimeError: if params hold the slow weights.
        """
        self._refuse_inside()
        state = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state = before(self, state) or state
        progress, own = self._read(state)
        entries = {
            key: {name: value for name, value in entry.items() if not _is_ours(name, entry)}
            if isinstance(entry, Mapping)
            else entry
            for key, entry in state["state"].items()
        }
        slow_steps = self._slow_steps()
        self.inner.load_state_dict({**state, "state": {key: entry for key, entry in entries.items() if entry != {}}})
        for group, slow_step in zip(self.param_groups, slow_steps, strict=True):
            group.setdefault("slow_step", slow_step)
        self._progress.update(progress)
        self._own.clear()
        self._own.update(own)
        self._share_progress()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _read(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[Tensor, dict[str, Tensor]]]:
        """What is ours in a state: how far the run is, and copies of slow weights; all checked."""
        given = [group[_PROGRESS] for group in state["param_groups"] if _PROGRESS in group]
        if not given:
            return dict(_START), {}
        progress = _checked(given[0])
        for group in state["param_groups"]:
            CHECKS["slow_step"]("slow_step", group.get("slow_step", self.defaults["slow_step"]))
        own: dict[Tensor, dict[str, Tensor]] = {}
        for key, p in self._by_key(state):
            for name, value in (entry := state["state"].get(key, {})).items():
                if _is_ours(name, entry):
                    if not isinstance(value, Tensor) or value.shape != p.shape:
                        needed, got = tuple(p.shape), tuple(getattr(value, "shape", ())) or type(value).__name__
                        raise ValueError(f"{name} of parameter {key!r} must be a tensor of shape {needed}, got {got}")
                    own.setdefault(p, {})[name] = value.detach().to(p.device, _wide(p.dtype), copy=True)
        if progress["cycle_steps"] and not own and any(p.requires_grad for p in self._params()):
            raise ValueError("the state is of the middle of a cycle, but has no slow weights")
        return progress, own

    def __getstate__(self) -> dict[str, Any]:
        """For pickles and copies: as of every optimizer of torch, without hooks."""
        self._refuse_inside()
        return {"inner": self.inner, "_own": self._own, "_progress": self._progress}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes over what `__getstate__` gave."""
        self.__dict__.update(state, _aside=[])
        for what in ("step", "state_dict", "load_state_dict"):
            for when in ("pre", "post"):
                setattr(self, f"_optimizer_{what}_{when}_hooks", OrderedDict())
        self._patch_step_function()

    def __repr__(self) -> str:
        """The inner optimizer, and how far it has come."""
        told = ", ".join(f"{name}={value!r}" for name, value in self._progress.items())
        return f"Lookahead({self.inner!r}, {told})"

    def _refuse_inside(self) -> None:
        if self._aside:
            raise RuntimeError(_INSIDE)

    def _params(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _taking_part(self) -> Iterator[Tensor]:
        """Parameters that have slow weights, or need them from now on."""
        return (p for p in self._params() if p.requires_grad or p.grad is not None or p in self._own)

    def _by_key(self, state: Mapping[str, Any]) -> Iterator[tuple[Any, Tensor]]:
        """Parameters by their keys in a state: what is in the same place of the groups."""
        keys = chain.from_iterable(group["params"] for group in state["param_groups"])
        return zip(keys, self._params(), strict=False)

    def _slow_steps(self) -> list[float]:
        """The slow step of each group."""
        default = self.defaults["slow_step"]
        return [CHECKS["slow_step"]("slow_step", group.get("slow_step", default)) for group in self.param_groups]

    def _share_progress(self) -> None:
        """Groups say how far the run is, because trainers keep no more of a state than state and groups."""
        for group in self.param_groups:
            group[_PROGRESS] = self._progress

    def _start_cycle(self) -> None:
        there = set(self._params())
        for p in [p for p in self._own if p not in there]:  # Another has taken its place.
            del self._own[p]
        if self._progress["inner_state"] == "reset" and self._progress["syncs"]:
            # Not at the sync, so that checkpoints have the same keys at any step.
            if isinstance(self.inner, Adagrad):  # Which makes its state when it is built, and never again.
                start = self.defaults["initial_accumulator_value"]
                for state in self.inner.state.values():
                    state["step"].zero_()
                    state["sum"].fill_(complex(start, start) if state["sum"].is_complex() else start)
            else:
                self.inner.state.clear()
        self._snapshot(list(self._taking_part()))

    def _snapshot(self, params: list[Tensor]) -> None:
        """Slow weights become what the parameters are now."""
        again = []
        for p in params:
            own = self._own.setdefault(p, {})
            slow = own.get(_SLOW)
            if slow is None or (slow.shape, slow.device, slow.dtype) != (p.shape, p.device, _wide(p.dtype)):
                own[_SLOW] = p.detach().to(_wide(p.dtype), copy=True)
            else:
                again.append(p)
        _take([self._own[p][_SLOW] for p in again], again)

    def _pulled_back(self, p: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Pairs of what the inner optimizer's averages of a parameter were after the last sync, and what they are."""
        own, pairs = self._own[p], []
        for name, value in self.inner.state.get(p, {}).items():
            is_average = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
            if is_average and value.shape == p.shape and (p.ndim or name not in _SCALARS):
                key = f"{_SLOW}_{name}"
                if key not in own:
                    own[key] = torch.zeros_like(value, dtype=_wide(value.dtype))
                pairs.append((own[key], value))
        return pairs


class _State(defaultdict[Tensor, dict[str, Any]]):
    """The whole state, for those who read it by parameter, drop entries, or put others there."""

    def __init__(self, inner: dict[Tensor, dict[str, Any]], own: dict[Tensor, dict[str, Tensor]]) -> None:
        super().__init__(dict, inner)
        for p, kept in own.items():
            super().__setitem__(p, _Entry(inner.get(p, {}), kept))
        self._parts = inner, own

    def __setitem__(self, p: Tensor, entry: dict[str, Any]) -> None:
        super().__setitem__(p, entry)
        inner, own = self._parts
        kept = {name: value for name, value in entry.items() if _is_ours(name, entry)}
        inner[p] = {name: value for name, value in entry.items() if name not in kept}
        own.pop(p, None)
        if kept and all(value.shape == p.shape for value in kept.values()):  # Else the next step begins anew.
            own[p] = kept

    def __delitem__(self, p: Tensor) -> None:
        super().__delitem__(p)
        for part in self._parts:
            part.pop(p, None)

    def pop(self, p: Tensor, *default: Any) -> Any:
        """Takes an entry out."""
        entry = super().pop(p, *default)
        for part in self._parts:
            part.pop(p, None)
        return entry

    def clear(self) -> None:
        """Takes all out."""
        super().clear()
        for part in self._parts:
            part.clear()


class _Entry(dict[str, Any]):
    """A parameter's whole state, for those who read it by name or put other tensors in place (on another device)."""

    def __init__(self, inner: dict[str, Any], own: dict[str, Tensor]) -> None:
        super().__init__({**inner, **own})
        self._parts = inner, own

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        inner, own = self._parts
        (own if name in own else inner)[name] = value


def _checked(progress: Mapping[str, Any]) -> dict[str, Any]:
    """What a group says of a run, all checked."""
    if missing := [name for name in ("sync_period", "inner_state", *_START) if name not in progress]:
        raise ValueError(f"the state lacks {missing[0]!r} of Lookahead")
    rule = rules.Lookahead(SGD(lr=0.0), progress["sync_period"], inner_state=progress["inner_state"])
    counters = {name: count(name, progress[name]) for name in _START}
    return {"sync_period": rule.sync_period, "inner_state": rule.inner_state, **counters}


def _is_ours(name: Any, entry: Mapping[Any, Any]) -> bool:
    """Whether a key of a parameter's entry is of Lookahead: slow weights, or what is beside state of that name."""
    return isinstance(name, str) and (name == _SLOW or (name[:5] == f"{_SLOW}_" and name[5:] in entry))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of slow weights."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _alike(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterable[tuple[list[Tensor], list[Tensor]]]:
    """Pairs as lists of one device and kind, for operations that take whole lists at once."""
    lists: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for pair in pairs:
        # Of a DTensor, the shard that is here: both are cut alike, and what is done to them is element by element.
        a, b = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in pair)
        alike = lists[a.device, a.dtype, b.dtype]
        alike[0].append(a)
        alike[1].append(b)
    return lists.values()


def _copy(to: list[Tensor], what: list[Tensor]) -> None:
    with torch.no_grad():
        for a, b in _alike(zip(to, what, strict=True)):
            torch._foreach_copy_(a, b)


def _take(slow: list[Tensor], fast: list[Tensor]) -> None:
    """Slow weights become the fast ones; of 16 bits, where these have changed, or they would lose their digits."""
    with torch.no_grad():
        for a, b in _alike(zip(slow, fast, strict=True)):
            if a[0].dtype != b[0].dtype:
                b = [torch.where(s.to(f.dtype) == f, s, f) for s, f in zip(a, b, strict=True)]
            torch._foreach_copy_(a, b)


def _meet(slow: list[Tensor], fast: list[Tensor], slow_step: float) -> None:
    """The sync, by torch's own form of it, which is exact at both ends."""
    if slow_step == 1:
        torch._foreach_copy_(slow, fast)
        return
    if slow_step > 0:
        ahead = fast if slow[0].dtype == fast[0].dtype else [f.to(s.dtype) for s, f in zip(slow, fast, strict=True)]
        torch._foreach_lerp_(slow, ahead, slow_step)
    torch._foreach_copy_(fast, slow)
