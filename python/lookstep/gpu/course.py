"""What a run does from here on, as far as the host can foresee it: which cycles begin and end, and at which steps."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from .._core import foresee

Carry = tuple[float, float, float]
NO_CARRY = (0.0, 0.0, 0.0)

Event = tuple[int, int, bool]
"""How many cycles begin and end with a call, and whether it measures the slow step in place of the rule."""


class History(NamedTuple):
    """Leaves of one group that were moved by the same steps."""

    group: int
    moved: bool
    """Whether they have gradients."""


class Counters(NamedTuple):
    """How far a run has come."""

    steps: int
    cycles: Sequence[tuple[int, int]]
    """Of each cycle, steps since its last sync, and syncs."""
    histories: Sequence[tuple[int, Carry]]
    """Of each history, its steps, and what the rule carries."""


class Course:
    """The calls that follow each other from some counters on, where none is dropped.

    Args:
        cycles: the levels of Lookahead, as `Plan.cycles` describes them.
        optimal: whether the innermost slow step is measured.
        groups: as `Plan.described` describes them.
        histories: what the calls move.
        scale: what gradients are multiplied by.
        start: the counters before the first call.
    """

    def __init__(
        self,
        cycles: Sequence[Mapping[str, Any]],
        optimal: bool,
        groups: Sequence[Mapping[str, Any]],
        histories: Sequence[History],
        scale: float,
        start: Counters,
    ) -> None:
        """Foresees nothing yet."""
        self.cycles = cycles
        self.optimal = optimal
        self.groups = groups
        self.histories = histories
        self.scale = scale
        self.events: list[Event] = []
        self._counters: list[Any] = [start]

    def counters(self, index: int) -> Counters:
        """The counters before call `index`."""
        return Counters(*self._counters[index])

    def steps(self, index: int) -> int:
        """The steps before call `index`."""
        steps: int = self._counters[index][0]
        return steps

    def forget(self, count: int) -> None:
        """Leaves out the first calls."""
        del self.events[:count], self._counters[:count]

    def foresee(self, count: int, stride: int) -> bytes:
        """Adds calls; returns the rows of uniforms of all histories, call by call, each of `stride` bytes at least."""
        rows: bytes
        rows, events, after = self._ask("step", self.counters(-1), count, stride)
        self.events += events
        self._counters += after
        return rows

    @contextmanager
    def unless_failed(self, count: int) -> Iterator[None]:
        """Takes the last calls back where their rows could not be written."""
        try:
            yield
        except BaseException:
            del self.events[-count:], self._counters[-count:]
            raise

    def once(self, call: str, index: int, stride: int) -> tuple[bytes, Event, Counters]:
        """The rows of a "sync" or a "look" in place of call `index`, what it does, and the counters after it."""
        rows, (event,), (after,) = self._ask(call, self.counters(index), 1, stride)
        return rows, event, Counters(*after)

    def _ask(self, call: str, now: Counters, count: int, stride: int) -> Any:
        histories = [
            (self.groups[history.group], history.moved, steps, carry)
            for history, (steps, carry) in zip(self.histories, now.histories, strict=True)
        ]
        start = now.steps, now.cycles
        return foresee(call, self.cycles, start, histories, self.scale, self.optimal, count, stride)


def check_groups(cycles: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], scale: float) -> int:
    """The bytes of the longest row of these groups.

    Raises:
        ValueError: if a hyper-parameter is too large for float32.
    """
    start = 0, [(0, 0)] * len(cycles)
    rows = [foresee("look", cycles, start, [(group, True, 0, NO_CARRY)], scale, False, 1, 0)[0] for group in groups]
    return max(map(len, rows))
