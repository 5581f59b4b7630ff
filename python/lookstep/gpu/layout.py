"""Where leaves lie: chunks that can be bound, each with rows of its own, and the parts of leaves in them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._core import layout
from .arrays import View
from .device import COPY_DST, COPY_SRC, STORAGE, Device, make_buffer

MOST_BYTES = 2**31 - 256
"""Of a binding, whatever a device allows: some count bytes in 31 bits."""
_STEP = 256
"""Chunks end at multiples of so many elements, so that the next one can be bound."""


@dataclass
class Kind:
    """What is kept for leaves of one kernel and dtype."""

    kernel: str
    dtype: np.dtype[Any]
    rows: list[str]
    states: int
    """How many of the rows are the rule's state."""
    slow: int | None
    """Which row has the slow weights."""
    evaluates: bool
    """Whether the rule is judged by other weights than the parameters."""

    @classmethod
    def of(
        cls, kernel: str, dtype: np.dtype[Any], cycles: Sequence[Mapping[str, Any]], optimal: bool, master: bool
    ) -> "Kind":
        """Asks the core.

        Raises:
            ValueError: if the rule adds up over leaves, which shaders do not.
        """
        rows, states, slow, elementwise, evaluates = layout(kernel, cycles, optimal, master and dtype.itemsize < 4)
        if not elementwise:
            raise ValueError(
                "the rule adds up over whole leaves before it moves them, as LAMB, LARS and Prodigy do, which GPU "
                "arrays have no shader for: it steps NumPy arrays"
            )
        return cls(kernel, dtype, rows, states, slow, evaluates)


class Chunk:
    """A run of elements of a buffer that is bound as a whole, and the rows that are kept for it, one by one."""

    def __init__(self, device: Any, kind: Kind, buffer: Any, offset: int, size: int) -> None:
        """Makes the rows."""
        self.kind = kind
        self.buffer = buffer
        self.offset = offset
        self.size = size
        self.stride = -(-size // 4) * 4
        nbytes = 4 * self.stride * len(kind.rows)
        usage = STORAGE | COPY_SRC | COPY_DST
        self.rows = make_buffer(device, nbytes, usage, "the optimizer's state") if nbytes else None

    def read(self, device: Any) -> np.ndarray[Any, Any]:
        """A copy of all rows; it waits for the GPU."""
        shape = len(self.kind.rows), self.stride
        if self.rows is None:
            return np.zeros(shape, np.float32)
        return np.frombuffer(device.queue.read_buffer(self.rows), np.float32).reshape(shape)


@dataclass
class Part:
    """A run of elements of a leaf in one chunk."""

    leaf: int
    chunk: Chunk
    first: int
    """The first, in the chunk,"""
    start: int
    """and in the leaf."""
    size: int
    room: int
    """Elements from the first on that nobody else has."""


def parts_of(device: Any, views: Sequence[View], kinds: Sequence[Kind | None]) -> list[Part]:
    """The parts of all leaves that have a kind, in the order in which they lie."""
    parts: list[Part] = []
    for run in _runs(views, kinds):
        kind = kinds[run[0]]
        assert kind is not None
        parts += _cut(device, kind, views, run)
    return parts


def _runs(views: Sequence[View], kinds: Sequence[Kind | None]) -> Iterator[list[int]]:
    """Leaves of a kind that follow each other without a gap."""
    order: dict[Any, int] = {}
    for view in views:
        order.setdefault(view.buffer, len(order))
    leaves = [leaf for leaf, kind in enumerate(kinds) if kind is not None and views[leaf].size]
    leaves.sort(key=lambda leaf: (order[views[leaf].buffer], views[leaf].offset))
    run: list[int] = []
    for leaf in leaves:
        if run:
            last, view = views[run[-1]], views[leaf]
            follows = last.buffer is view.buffer and last.offset + last.room == view.offset
            # A leaf is cut at even elements: of its gradients, two may share a word.
            follows = follows and (view.offset - views[run[0]].offset) // view.dtype.itemsize % 2 == 0
            if not follows or kinds[run[-1]] is not kinds[leaf]:
                yield run
                run = []
        run.append(leaf)
    if run:
        yield run


def _cut(device: Any, kind: Kind, views: Sequence[View], run: Sequence[int]) -> Iterator[Part]:
    """Chunks for a run of leaves, each no larger than can be bound."""
    limits = Device.of(device)
    most = (min(limits.binding, limits.buffer, MOST_BYTES) - _STEP) // (4 * max(len(kind.rows), 1)) // _STEP * _STEP
    itemsize = kind.dtype.itemsize
    begin = views[run[0]].offset
    end = views[run[-1]].offset + views[run[-1]].room
    total = (end - begin) // itemsize
    for at in range(0, total, most):
        size = min(most, total - at)
        chunk = Chunk(device, kind, views[run[0]].buffer, begin + at * itemsize, size)
        for leaf in run:
            first = (views[leaf].offset - begin) // itemsize - at
            start = max(0, -first)
            stop = min(views[leaf].size, size - first)
            if start < stop:
                room = min(views[leaf].room // itemsize, size - first) - start
                yield Part(leaf, chunk, first + start, start, stop - start, room)
