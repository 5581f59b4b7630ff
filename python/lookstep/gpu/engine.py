"""The engine of GPU arrays: what `_core.Engine` is for NumPy arrays, over buffers of wgpu.

A step is one dispatch for each run of leaves that lie together and share hyper-parameters and steps: with an `Arena`,
one for all. The host knows from its counters which cycles begin and end, and picks the shader that does just that. What
depends on the step is computed in float64 by the core, for many steps at once, and lies in slots of a uniform buffer
that are written once, so that any number of steps may be recorded before one is submitted.

Where gradients decide (see `decisions.py`), two passes come before that.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import wgpu

from .arrays import View, read, views_of
from .checks import check_apart, check_grad, check_into, check_params, check_unmapped, check_usage
from .course import NO_CARRY, Counters, Course, Event, History, check_groups
from .decisions import MOST_ROWS, Decisions, LossScale
from .device import COPY_DST, COPY_SRC, STORAGE, Device, make_buffer
from .layout import Kind, parts_of
from .pieces import Piece, bind, pieces_of, place
from .slots import SLOTS, Slots
from .state import Store, counters_of, locked

_Array = np.ndarray[Any, Any]
_INSIDE = "params hold the slow weights: leave slow_weights() first, so that the fast ones come back"


class Stats(NamedTuple):
    """How far a run has come, as the GPU has it; what is not taken is `None`."""

    steps: int
    syncs: int
    skipped: int
    grad_norm: float | None
    slow_step: float | None
    loss_scale: float | None


class _Known(NamedTuple):
    """What was last read of what the GPU decided."""

    skipped: int
    grad_norm: float | None
    loss_scale: float | None


class _Taken(NamedTuple):
    """Gradients that were checked, and what a step with them goes over."""

    grads: tuple[Any, ...]
    pieces: list[Piece]
    buffers: list[Any]
    sums: int
    recorded: dict[Any, Any]
    """Dispatches by what they are for, with the buffers that they were made for."""


_MOST_TAKEN = 4
"""Trees of gradients that may be stepped with in turns, and are known again."""
_NO_OTHERS: Sequence[Any] = ()
_UNKNOWN = _Known(0, None, None)


class Engine:
    """Leaves on a GPU, their state, and the counters that move with them; arguments as for `_core.Engine`.

    Raises:
        TypeError: if a leaf is no GPU array.
        ValueError: if a buffer, a rule or an option is refused.
        MemoryError: if the device has no room for the state.
    """

    def __init__(
        self,
        names: Sequence[str],
        params: Sequence[Any],
        of_group: Sequence[int],
        groups: Sequence[Mapping[str, Any]],
        cycles: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
    ) -> None:
        """Checks the buffers, and makes the state for them."""
        _check_options(options)
        self.views = list(views_of(params, iter(names)))
        self._device = check_params(names, self.views)
        self._names = list(names)
        self._cycles = list(cycles)
        self._optimal = bool(options["optimal"])
        self._master = bool(options["master_weights"])
        self._limit = options["max_grad_value"]
        self._groups = list(groups)
        self._of_group = list(of_group)
        self._kinds = self._kinds_of(groups)
        row = check_groups(self._cycles, groups, 1.0)
        self._parts = parts_of(self._device, self.views, self._kinds)
        self._store = Store(self._device, self.views, self._kinds, self._parts)
        self._slots = Slots(self._device, row)
        decides = options["max_grad_norm"] is not None or options["nonfinite"] == "skip" or self._optimal
        self._decisions = Decisions(self._device, options, row) if decides or options["loss_scale"] else None
        self._drops = self._decisions is not None and self._decisions.drops
        self._limits_norm = options["max_grad_norm"] is not None
        self._scales: LossScale | None = options["loss_scale"]
        self._measured = False
        self._origin = 0
        self._known = _UNKNOWN
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._shown: list[Any] | None = None
        self._stilled: Sequence[Piece] = ()
        self._entries = 0
        self._abandoned = 0
        self._scale = 1.0
        self._horizon = 1
        self._slow_step: float | None = None
        self._begin(Counters(0, ((0, 0),) * len(cycles), ()), [(0, NO_CARRY)] * len(names))

    def _kinds_of(self, groups: Sequence[Mapping[str, Any]]) -> list[Kind | None]:
        """What is kept for each leaf; nothing for a frozen one."""
        found: dict[Any, Kind] = {}
        kinds: list[Kind | None] = []
        for view, index in zip(self.views, self._of_group, strict=True):
            group = groups[index]
            key = group["kernel"], view.dtype.name
            if not group["frozen"] and key not in found:
                found[key] = Kind.of(group["kernel"], view.dtype, self._cycles, self._optimal, self._master)
            kinds.append(None if group["frozen"] else found[key])
        return kinds

    # Counters.

    def _begin(self, start: Counters, of_leaf: Sequence[tuple[int, Any]], moved: Sequence[bool] | None = None) -> None:
        """Goes on from counters, and from each leaf's own steps and what the rule carries for it."""
        moved = moved or [True] * len(of_leaf)
        of_leaf = [(steps, tuple(carry)) for steps, carry in of_leaf]
        found: dict[Any, int] = {}
        for leaf, (own, moves) in enumerate(zip(of_leaf, moved, strict=True)):
            if self._kinds[leaf] is not None:
                found.setdefault((self._of_group[leaf], moves, own), len(found))
        self._history_of = [
            found.get((self._of_group[leaf], moves, own), -1)
            for leaf, (own, moves) in enumerate(zip(of_leaf, moved, strict=True))
        ]
        self._still = of_leaf
        self._moved = list(moved)
        histories = [History(group, moves) for group, moves, _ in found]
        start = start._replace(histories=tuple(own for *_, own in found))
        self._plan(histories, start)
        self._taken: list[_Taken] = []
        self._use(_Taken((), [], [], 0, {}))

    def _plan(self, histories: Sequence[History], start: Counters) -> None:
        """Goes on from `start`, with nothing foreseen."""
        # Where steps may be dropped, the scale comes with the call and not with the step.
        scale = 1.0 if self._drops else self._scale
        self._course = Course(self._cycles, self._optimal, self._groups, histories, scale, start)
        self._at, self._horizon = 0, 1
        self._event_bytes = len(histories) * self._slots.stride
        if self._decisions is not None:
            self._decisions.begin(self._origin, len(histories))

    def _now(self) -> Counters:
        """The counters; where steps may be dropped, as they were last read."""
        return self._course.counters(0 if self._drops else self._at)

    def _settle(self) -> None:
        """Where steps may be dropped, reads which were: what comes next depends on it."""
        if self._drops:
            self._read_stats()
            if self._at:
                raise RuntimeError(
                    f"{self._at} steps were recorded and have not run: submit them first, since this call depends on "
                    "which of them the GPU drops"
                )

    def _of_leaf(self, now: Counters | None = None) -> list[tuple[int, Any]]:
        """Each leaf's own steps, and what the rule carries for it."""
        histories = (now or self._now()).histories
        return [self._still[leaf] if index < 0 else histories[index] for leaf, index in enumerate(self._history_of)]

    @property
    def steps(self) -> int:
        """Steps applied so far."""
        return self._course.steps(0 if self._drops else self._at)

    @property
    def next_step(self) -> int:
        """The number of the next step, counted from 0, where none is dropped."""
        return self._course.steps(self._at)

    @property
    def syncs(self) -> int:
        """Syncs of the innermost cycle so far."""
        cycles = self._now().cycles
        return cycles[0][1] if cycles else 0

    @property
    def skipped(self) -> int:
        """Steps that were dropped, as last read."""
        return self._known.skipped

    @property
    def grad_norm(self) -> float | None:
        """The norm of the gradients of the last step that was read, where it was taken."""
        return self._known.grad_norm

    @property
    def slow_step(self) -> float | None:
        """The slow step of the last sync."""
        return self._slow_step

    @property
    def control(self) -> Any:
        """The buffer of what the GPU decides; none where it decides nothing."""
        return None if self._decisions is None else self._decisions.buffer

    def stats(self) -> Stats:
        """The counters, as the GPU has them: it waits for it, where it decides."""
        with _Call(self, inside=True):
            return self._read_stats()

    def _read_stats(self) -> Stats:
        if self._decisions is not None:
            found = self._decisions.read()
            takes_norm = found.calls and (self._limits_norm or self._drops)
            scale = found.loss_scale if self._scales else None
            self._known = _Known(found.skipped, found.norm if takes_norm else None, scale)
            if self._optimal and self._measured and not self._drops:
                self._slow_step = found.slow_step
            if self._drops:
                applied = (found.events - self._origin) & 0xFFFFFFFF
                self._slow_step = self._last_slow_step(applied, found.slow_step)
                self._course.forget(applied)
                self._origin += applied
                self._at = (self._decisions.calls - found.calls) & 0xFFFFFFFF
        return Stats(self.steps, self.syncs, self.skipped, self.grad_norm, self.slow_step, self._known.loss_scale)

    def _last_slow_step(self, applied: int, measured: float) -> float | None:
        """The slow step of the last sync among the first calls."""
        last = next((event for event in reversed(self._course.events[:applied]) if event[1]), None)
        if last is None:
            return self._slow_step
        return measured if last[2] else self._groups[0]["slow_steps"][0]

    # A step.

    def step(
        self,
        grads: Sequence[Any],
        scale: float = 1.0,
        hyper: Any = None,
        zero_grads: bool = False,
        into: Any = None,
    ) -> None:
        """Moves every leaf by its gradient, and syncs where that ends a cycle; with `into`, records that alone."""
        _take(self, False)
        try:
            if into is not None:
                check_into(into, self._device)
            grads = tuple(grads)
            if not self._has_taken(grads):
                self._take_grads(grads)
            for buffer in self._buffers:
                if buffer.map_state != "unmapped":
                    self._refuse_mapped(grads)
            if self._drops and self._at < len(self._course.events):
                hyper = None  # That step was foreseen, with the same numbers.
            if hyper is not None or scale != self._scale:
                self._set(self._groups if hyper is None else _with_hyper(self._groups, hyper), scale)
            if self._at == len(self._course.events):
                self._foresee(1 if hyper is not None else self._horizon)
            event = self._course.events[self._at]
            if self._decisions is None:
                byte = self._first + self._at * self._event_bytes
                self._run("step", self._pieces, byte, event, zero_grads, into)
            else:
                self._decide(event, zero_grads, into)
            self._at += 1
            if event[1] and not self._drops:
                self._note_slow_step(event)
        finally:
            self._lock.release()

    def sync(self, hyper: Any = None) -> None:
        """Ends the cycle now, where one has begun."""
        with _Call(self):
            self._check_unmapped()
            self._settle()
            if hyper is not None:
                self._set(_with_hyper(self._groups, hyper), self._scale)
            now = self._now()
            if not now.cycles or not now.cycles[0][0]:
                return
            byte, event, after = self._once("sync")
            self._run("step", self._still_pieces(), byte, event, False, None)
            self._begin(after, self._of_leaf(after), self._moved)
            self._note_slow_step(event)

    def _note_slow_step(self, event: Event) -> None:
        self._measured = event[2]
        if event[1] and not event[2]:
            self._slow_step = self._groups[0]["slow_steps"][0]

    def _has_taken(self, grads: tuple[Any, ...]) -> bool:
        """Whether these are the gradients of the last step."""
        return _are_same(self._grads, grads)

    def _take_grads(self, grads: tuple[Any, ...]) -> None:
        """Checks gradients, and makes pieces for them."""
        known = next((taken for taken in self._taken if _are_same(taken.grads, grads)), None)
        if known is not None:
            self._use(known)
            return
        views = self._grad_views(grads)
        moved = [view is not None or kind is None for view, kind in zip(views, self._kinds, strict=True)]
        if moved != self._moved:
            self._settle()
            self._begin(self._now(), self._of_leaf(), moved)
        pieces = list(pieces_of(self._parts, self.views, views, self._history_of))
        place(self._device, pieces, len(self._course.histories), self._limit or 0.0)
        buffers = [view.buffer for view in [*self.views, *views] if view is not None]
        different = list({id(buffer): buffer for buffer in buffers}.values())
        taken = _Taken(grads, pieces, different, sum(piece.sums for piece in pieces), {})
        if self._decisions is not None:
            self._decisions.make_room(taken.sums)
        self._taken = [*self._taken[1 - _MOST_TAKEN :], taken]
        self._use(taken)

    def _use(self, taken: _Taken) -> None:
        """Goes on with these gradients."""
        self._grads, self._pieces, self._buffers, self._sums, self._recorded = taken

    def _grad_views(self, grads: Sequence[Any]) -> list[View | None]:
        """Each leaf's gradient, checked; none for a frozen leaf."""
        if len(grads) != len(self._names):
            raise ValueError(f"grads has {len(grads)} leaves but params has {len(self._names)}")
        names = ["grads" + name.removeprefix("params") for name in self._names]
        views: list[View | None] = []
        for name, grad, param in zip(names, grads, self.views, strict=True):
            if grad is None:
                views.append(None)
                continue
            (view,) = views_of([grad], iter([name]))
            # A bare buffer has its parameter's shape where it has as many elements.
            if view is not grad and view.size == param.size:
                view = View(view.buffer, view.dtype, param.shape)
            check_grad(name, view, param)
            views.append(view)
        given = [(name, view) for name, view in zip(names, views, strict=True) if view is not None]
        check_apart([*zip(self._names, self.views, strict=True), *given])
        return [None if kind is None else view for view, kind in zip(views, self._kinds, strict=True)]

    def _still_pieces(self) -> list[Piece]:
        """Pieces for what needs no gradients."""
        pieces = list(pieces_of(self._parts, self.views, [None] * len(self.views), self._history_of))
        place(self._device, pieces, len(self._course.histories), 0.0)
        self._stilled = pieces
        return pieces

    def _set(self, groups: Sequence[Mapping[str, Any]], scale: float) -> None:
        """Takes other hyper-parameters or another scale from the next step on."""
        check_groups(self._cycles, groups, scale)
        _check_scale(scale)
        is_same = groups is self._groups
        self._groups, self._scale = list(groups), scale
        if not self._drops:
            self._forget(self._now())
        elif not is_same and self._at == len(self._course.events):
            self._course.groups = self._groups
        elif not is_same:
            self._settle()
            self._forget(self._now())

    def _forget(self, now: Counters) -> None:
        """Leaves out what was foreseen."""
        if not self._drops:
            self._slots.give_back((len(self._course.events) - self._at) * len(self._course.histories))
        self._plan(self._course.histories, now)

    def _foresee(self, count: int) -> None:
        """Writes the rows of steps to come; as many more each time, while nothing else comes between."""
        count = max(1, min(count, SLOTS // max(1, len(self._course.histories))))
        self._horizon = 2 * count
        if self._drops:
            assert self._decisions is not None
            if self._at >= MOST_ROWS:
                self._read_stats()
            rows = self._course.foresee(count, self._decisions.row)
            with self._course.unless_failed(count):
                self._decisions.append(rows, self._origin)
            return
        self._course.forget(self._at)
        self._at = 0
        rows = self._course.foresee(count, self._slots.stride)
        with self._course.unless_failed(count):
            self._first = self._slots.write(rows) if rows else 0

    def _once(self, call: str) -> tuple[int, Event, Counters]:
        """Writes the rows of a call that was not foreseen; returns the byte of the first."""
        self._settle()
        self._forget(self._now())
        rows, event, after = self._course.once(call, 0, self._slots.stride)
        return self._slots.write(rows) if rows else 0, event, after

    def _run(self, kind: str, pieces: Sequence[Piece], byte: int, event: Event, zeroes: bool, into: Any) -> None:
        """Records the dispatches of an event, and submits them where they have no other place to go."""
        is_step = pieces is self._pieces
        todo = self._known_dispatches(kind, event, zeroes) if is_step else self._dispatches(kind, pieces, event, zeroes)
        if not todo:
            return
        encoder, pass_ = _opened(into, self._device)
        for pipeline, group, shift, size in todo:
            pass_.set_pipeline(pipeline)
            pass_.set_bind_group(0, group, (byte + shift,))
            pass_.dispatch_workgroups(*size)
        _close(encoder, pass_, into, self._device)

    def _decide(self, event: Event, zeroes: bool, into: Any) -> None:
        """Records the passes of a step in which the GPU decides."""
        decisions = self._decisions
        assert decisions is not None
        low = self._groups[0]["slow_steps"][0] if self._optimal else 0.0
        call = decisions.call(self._scale, self._sums, event[2] and not self._drops, low)
        first = call if self._drops else self._first + self._at * self._event_bytes
        course = (0, 0, False) if self._drops else event
        # Also where there are no gradients: what was summed there before must not count.
        sums = self._known_dispatches("reduce", course, zeroes)
        steps = self._known_dispatches("step", course, zeroes)
        encoder, pass_ = _opened(into, self._device)
        for (pipeline, group, shift, _), piece in zip(sums, self._pieces, strict=True):
            pass_.set_pipeline(pipeline)
            pass_.set_bind_group(0, group, (first + shift,))
            pass_.dispatch_workgroups(piece.sums)
        decisions.record(pass_, call)
        for pipeline, group, shift, size in steps:
            pass_.set_pipeline(pipeline)
            pass_.set_bind_group(0, group, (first + shift,))
            pass_.dispatch_workgroups(*size)
        _close(encoder, pass_, into, self._device)
        decisions.count()

    def _known_dispatches(self, kind: str, event: Event, zeroes: bool) -> list[Any]:
        """Those of a step, made once for as long as all buffers stay."""
        buffers: tuple[Any, ...] = (self._slots.buffer,)
        if self._decisions is not None:
            buffers = (*buffers, self._decisions.slots.buffer, *self._decisions.others())
        known = self._recorded.get((kind, event, zeroes))
        if known is None or known[0] != buffers:
            known = buffers, self._dispatches(kind, self._pieces, event, zeroes)
            self._recorded[kind, event, zeroes] = known
        todo: list[Any] = known[1]
        return todo

    def _dispatches(self, kind: str, pieces: Sequence[Piece], event: Event, zeroes: bool) -> list[Any]:
        """Of each dispatch, its pipeline and bind group, where its row is from the first, and its workgroups."""
        decides = kind in ("step", "reduce") and self._decisions is not None and pieces is not self._stilled
        picks = decides and self._drops
        stride = 0 if picks else self._slots.stride
        return [
            (
                self._pipeline(piece, kind, event, zeroes, decides),
                self._bound(piece, zeroes, decides),
                # To take slow weights away needs nothing of a row, and groups may be others by then.
                0 if kind == "leave" else piece.history * stride,
                piece.groups,
            )
            for piece in pieces
            if piece.grads is not None or event[:2] != (0, 0) or kind != "step" or (picks and self._cycles)
        ]

    def _pipeline(self, piece: Piece, kind: str, event: Event, zeroes: bool, decides: bool) -> Any:
        """The pipeline for a piece."""
        of = piece.chunk.kind
        picks = decides and self._drops
        form = {
            "kind": kind,
            "optimal": self._optimal,
            "master": self._master,
            "params": of.dtype.name,
            "grads": piece.grads and piece.grads.dtype.name,
            "zeroes": zeroes,
            "written": piece.written,
            "limit": self._limit is not None,
            "control": decides,
            "course": None if picks else event[:2],
            "measures": event[2],
            "quads": piece.quads,
            "words": self._decisions.row // 4 if picks and self._decisions else 0,
        }
        kinds = _kinds(piece, zeroes, decides, picks)
        return Device.of(self._device).pipeline(self._device, kinds, of.kernel, self._cycles, form)

    def _bound(self, piece: Piece, zeroes: bool, decides: bool) -> Any:
        """The bind group of a piece."""
        picks = decides and self._drops
        slots, others = self._slots, _NO_OTHERS
        if decides and self._decisions is not None:
            slots = self._decisions.slots if picks else self._slots
            others = self._decisions.others()
        key = slots.buffer, zeroes, *others
        if piece.bound_for != key:
            kinds = _kinds(piece, zeroes, decides, picks)
            piece.bound = bind(self._device, piece, kinds, slots.buffer, slots.stride, others)
            piece.bound_for = key
        return piece.bound

    def _check_unmapped(self) -> None:
        for name, view in zip(self._names, self.views, strict=True):
            check_unmapped(name, view)

    def _refuse_mapped(self, grads: Sequence[Any]) -> None:
        self._check_unmapped()
        self._grad_views(grads)

    def set_groups(self, of_group: Sequence[int], groups: Sequence[Mapping[str, Any]]) -> None:
        """Takes other groups from the next step on, with the same arrays for each leaf."""
        with _Call(self, inside=True):
            self._settle()
            of_leaf = self._of_leaf()
            self._set(groups, self._scale)
            self._of_group = list(of_group)
            self._begin(self._now(), of_leaf, self._moved)

    # Slow weights.

    def slow_weights(self, params: Any) -> "SlowWeights":
        """A context in which params hold the slow weights; entering it gives `params`."""
        return SlowWeights(self, params)

    def _has_slow(self) -> bool:
        """Whether slow weights differ from fast ones."""
        if self._cycles:
            return any(done for done, _ in self._now().cycles)
        return any(kind.evaluates for kind in self._kinds if kind)

    def _enter(self) -> int:
        """Puts the slow weights into params; returns which entry this is."""
        with _Call(self):
            self._check_unmapped()
            self._settle()
            saved: list[Any] = []
            if self._has_slow():
                self._check_copies()
                pieces = self._shown_pieces()
                saved = [(piece, self._saved(piece)) for piece in pieces]
                self._show(pieces, "enter")
            self._shown = saved
            self._entries += 1
            return self._entries

    def _leave(self) -> None:
        """Puts the fast weights back."""
        assert self._shown is not None
        self._check_unmapped()
        if self._shown:
            if self._cycles:
                self._show([piece for piece, _ in self._shown], "leave")
            encoder = self._device.create_command_encoder()
            for piece, saved in self._shown:
                if saved is not None:
                    byte, nbytes = _bytes(piece)
                    encoder.copy_buffer_to_buffer(saved, 0, piece.chunk.buffer, byte, nbytes)
            self._device.queue.submit([encoder.finish()])
        self._shown = None

    def _shown_pieces(self) -> list[Piece]:
        """Pieces of what can be shown: a leaf that the rule has not moved has no state to judge it by."""
        histories = self._now().histories
        pieces = self._still_pieces()
        return [
            piece for piece in pieces if self._cycles or (histories[piece.history][0] and piece.chunk.kind.evaluates)
        ]

    def _saved(self, piece: Piece) -> Any:
        """A copy of the parameters of a piece, where they cannot change places with slow weights."""
        if self._cycles and piece.chunk.kind.dtype.itemsize == 4:
            return None
        byte, nbytes = _bytes(piece)
        saved = make_buffer(self._device, nbytes, COPY_SRC | COPY_DST, "the fast weights")
        encoder = self._device.create_command_encoder()
        encoder.copy_buffer_to_buffer(piece.chunk.buffer, byte, saved, 0, nbytes)
        self._device.queue.submit([encoder.finish()])
        return saved

    def _check_copies(self) -> None:
        for name, view, kind in zip(self._names, self.views, self._kinds, strict=True):
            if kind and not (self._cycles and view.dtype.itemsize == 4):
                check_usage(name, view, COPY_SRC | COPY_DST, "so that fast weights can be put aside")

    def _show(self, pieces: Sequence[Piece], kind: str) -> None:
        byte, event, _ = self._once("look")
        self._run(kind, pieces, byte, event, False, None)

    # A run as arrays.

    def slow(self) -> list[_Array]:
        """Read-only copies of each leaf's slow weights as they are now."""
        with _Call(self, inside=True):
            self._check_readable()
            self._settle()
            if self._shown is not None or not self._has_slow():
                found = self._store.params()
            elif self._cycles:
                found = self._store.slow()
            else:
                found = self._averages()
            return [locked(array) for array in found]

    def _averages(self) -> list[_Array]:
        """The weights to evaluate, in full; leaves that have no others, as they are."""
        found = self._store.params()
        for leaf, kind in enumerate(self._kinds):
            if kind and kind.evaluates:
                found[leaf] = found[leaf].astype(np.float32)
        into = [None if self._kinds[i] is None else self._room(view) for i, view in enumerate(self.views)]
        pieces = list(pieces_of(self._parts, self.views, into, self._history_of))
        place(self._device, pieces, len(self._course.histories), 0.0)
        histories = self._now().histories
        moved = [piece for piece in pieces if histories[piece.history][0] and piece.chunk.kind.evaluates]
        if moved:
            byte, event, _ = self._once("look")
            for piece in moved:
                piece.written = True
            self._run("average", moved, byte, event, False, None)
        for leaf in {leaf for piece in moved for leaf in piece.leaves}:
            view = into[leaf]
            assert view is not None
            found[leaf] = read(view)
        return found

    def _room(self, view: View) -> View:
        size = max(4 * view.size, 4)
        return View(make_buffer(self._device, size, STORAGE | COPY_SRC, "averages"), "float32", view.shape)

    def state(self) -> list[dict[str, _Array]]:
        """Read-only copies of each leaf's state arrays, by name."""
        with _Call(self, inside=True):
            return self._store.state()

    def kinds(self) -> list[list[tuple[str, str, list[int]]]]:
        """What is kept for each leaf: names, dtypes and shapes."""
        return self._store.kinds()

    def dump(self) -> tuple[list[list[_Array]], dict[str, Any]]:
        """Copies of each leaf's parameter and of what is kept for it, and the counters."""
        with _Call(self):
            self._check_readable()
            self._settle()
            arrays = [[own, *rows] for own, rows in zip(self._store.params(), self._store.rows(), strict=True)]
            now = self._now()
            counters = {
                "steps": now.steps,
                "skipped": self.skipped,
                "cycles": list(now.cycles),
                "carry": NO_CARRY,
                "leaves": self._of_leaf(),
            }
            if self._decisions is not None and self._scales:
                found = self._decisions.read()
                counters["loss_scale"] = [found.loss_scale, found.good]
            return arrays, counters

    def restore(
        self,
        arrays: Sequence[Sequence[_Array]],
        counters: Mapping[str, Any],
        of_group: Sequence[int],
        groups: Sequence[Mapping[str, Any]],
    ) -> None:
        """Takes what `dump` gives, of this engine or of the CPU's."""
        with _Call(self):
            self._check_readable(COPY_DST)
            self._store.check(arrays)
            steps, cycles, of_leaf = counters_of(counters)
            self._set(groups, self._scale)
            self._store.write(arrays)
            self._of_group = list(of_group)
            self._take_decisions(counters)
            self._begin(Counters(steps, cycles, ()), of_leaf)
            self._slow_step, self._measured = None, False

    def _take_decisions(self, counters: Mapping[str, Any]) -> None:
        """Takes what the GPU counts by itself."""
        self._known = _Known(counters["skipped"], None, None)
        if self._decisions is not None:
            # Steps that were recorded and never ran are forgotten with all else.
            found = self._decisions.read()
            self._origin, self._decisions.calls = found.events, found.calls
            scale, good = found.loss_scale, found.good
            if self._scales:
                scale, good = counters.get("loss_scale", (scale, good))
            skipped = min(counters["skipped"], 2**32 - 1)
            self._decisions.write(found._replace(loss_scale=scale, inverse=1 / scale, good=good, skipped=skipped))

    def _check_readable(self, usage: int = COPY_SRC) -> None:
        self._check_unmapped()
        for name, view in zip(self._names, self.views, strict=True):
            odd = view.nbytes % 4 != 0
            check_usage(name, view, usage | COPY_SRC * odd, "so that it can be copied")


class SlowWeights:
    """A context in which params hold the slow weights, and the slow weights' rows the fast ones."""

    def __init__(self, engine: Engine, params: Any) -> None:
        """Has not been entered."""
        self._engine = engine
        self._params = params
        self._entry = 0

    def __enter__(self) -> Any:
        """Shows the slow weights."""
        self._entry = self._engine._enter()
        return self._params

    def __exit__(self, *_: object) -> None:
        """Puts the fast weights back."""
        engine = self._engine
        with _Call(engine, inside=True):
            if self._entry != engine._entries or engine._shown is None:
                raise RuntimeError("params hold the fast weights: slow_weights() was not entered")
            engine._abandoned = self._entry
            engine._leave()

    def __del__(self) -> None:
        """A context that was entered by hand, and forgotten."""
        if self._entry:
            self._engine._abandoned = self._entry


class _Call:
    """One call on an engine at a time, in the process that made it."""

    __slots__ = ("_engine", "_inside")

    def __init__(self, engine: Engine, inside: bool = False) -> None:
        """For calls that params may hold the slow weights in, or not."""
        self._engine = engine
        self._inside = inside

    def __enter__(self) -> None:
        """Takes the engine."""
        _take(self._engine, self._inside)

    def __exit__(self, *_: object) -> None:
        """Gives it back."""
        self._engine._lock.release()


def _take(engine: Engine, inside: bool) -> None:
    """Takes the engine for a call that params may hold the slow weights in, or not."""
    if engine._process != os.getpid():
        raise RuntimeError("this optimizer's GPU belongs to the process that was forked: build another one here")
    if not engine._lock.acquire(blocking=False):
        raise RuntimeError("this optimizer is in the middle of another call")
    if engine._shown is not None and not inside:
        try:
            # A context that could not put them back when it ended gets another chance.
            if engine._abandoned != engine._entries:
                raise RuntimeError(_INSIDE)
            engine._leave()
        except BaseException:
            engine._lock.release()
            raise


def _opened(into: Any, device: Any) -> tuple[Any, Any]:
    """An encoder and a pass to record into."""
    if isinstance(into, wgpu.GPUComputePassEncoder):
        return None, into
    encoder = device.create_command_encoder() if into is None else into
    return encoder, encoder.begin_compute_pass()


def _close(encoder: Any, pass_: Any, into: Any, device: Any) -> None:
    """Ends what `_opened` began, and submits what has no other place to go."""
    if encoder is not None:
        pass_.end()
    if into is None:
        device.queue.submit([encoder.finish()])


def _kinds(piece: Piece, zeroes: bool, decides: bool, picks: bool) -> tuple[str, ...]:
    """The kinds of the bindings of a piece."""
    grads = "" if piece.grads is None else "storage" if zeroes or piece.written else "read-only-storage"
    own = "uniform*", "uniform", "storage", grads, "storage" if piece.chunk.rows is not None else ""
    return (*own, "read-only-storage", "read-only-storage" if picks else "", "storage") if decides else own


def _bytes(piece: Piece) -> tuple[int, int]:
    """Where the parameters of a piece are, and how many bytes they have in whole words."""
    itemsize = piece.chunk.kind.dtype.itemsize
    return piece.chunk.offset + piece.first * itemsize, -(-piece.size * itemsize // 4) * 4


def _are_same(grads: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    try:
        return grads == others
    except ValueError:  # NumPy's arrays are not compared as a whole.
        return False


def _with_hyper(groups: Sequence[Mapping[str, Any]], hyper: Any) -> list[dict[str, Any]]:
    """Groups with other hyper-parameters and slow steps."""
    return [
        {**group, "hyper": numbers, "slow_steps": slow_steps}
        for group, (numbers, slow_steps) in zip(groups, hyper, strict=True)
    ]


def _check_scale(scale: float) -> None:
    if not (scale == 0 or 2.0**-126 <= scale < 2.0**128):
        raise ValueError(f"scale must be 0 or a number that float32 holds in full, got {scale!r}")


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuses what only the CPU engine does."""
    if options["nonfinite"] == "raise":
        raise ValueError(
            'nonfinite="raise" would have to wait for the GPU at every step: take "skip", which the GPU decides '
            "itself, and look at read_stats()"
        )
    if options["loss_scale"] is not None and not isinstance(options["loss_scale"], LossScale):
        raise TypeError(f"loss_scale must be a lookstep.gpu.LossScale, got {type(options['loss_scale']).__name__}")
    for name in ("centralize", "state_dtype"):
        if options[name] is not None:
            raise ValueError(f"{name} is for NumPy arrays: GPU arrays have no shader for it")
