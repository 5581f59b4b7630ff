"""A run as NumPy arrays, and the way back: what is kept for leaves, read from chunks and written into them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .arrays import View, read, write
from .layout import Chunk, Kind, Part

_Array = np.ndarray[Any, Any]


class Store:
    """The leaves and the rows that are kept for them.

    Args:
        device: a `wgpu.GPUDevice`.
        views: the leaves.
        kinds: what is kept for each; nothing for a frozen one.
        parts: where their elements are.
    """

    def __init__(self, device: Any, views: Sequence[View], kinds: Sequence[Kind | None], parts: Sequence[Part]) -> None:
        """Holds them."""
        self._device = device
        self._views = views
        self._kinds = kinds
        self._parts = parts
        self._chunks: list[Chunk] = list({id(part.chunk): part.chunk for part in parts}.values())

    def kinds(self) -> list[list[tuple[str, str, list[int]]]]:
        """What is kept for each leaf: names, dtypes and shapes."""
        return [
            [(name, "float32", list(view.shape)) for name in kind.rows] if kind else []
            for view, kind in zip(self._views, self._kinds, strict=True)
        ]

    def params(self) -> list[_Array]:
        """Copies of the parameters."""
        return [read(view) for view in self._views]

    def rows(self) -> list[list[_Array]]:
        """Copies of all rows of each leaf."""
        found = [
            [np.zeros(view.size, np.float32) for _ in kind.rows] if kind else []
            for view, kind in zip(self._views, self._kinds, strict=True)
        ]
        copies = {id(chunk): chunk.read(self._device) for chunk in self._chunks}
        for part in self._parts:
            for array, row in zip(found[part.leaf], copies[id(part.chunk)], strict=True):
                array[part.start : part.start + part.size] = row[part.first : part.first + part.size]
        return [
            [array.reshape(view.shape) for array in arrays] for view, arrays in zip(self._views, found, strict=True)
        ]

    def check(self, arrays: Sequence[Sequence[_Array]]) -> None:
        """Refuses arrays that are not those of these leaves.

        Raises:
            ValueError: if there are more or fewer, or one has another shape or size.
        """
        if len(arrays) != len(self._views):
            raise ValueError("state is of another optimizer")
        for view, kind, found in zip(self._views, self._kinds, arrays, strict=True):
            count = 1 + (len(kind.rows) if kind else 0)
            if len(found) != count or any(array.shape != view.shape for array in found):
                raise ValueError("state is of another optimizer")

    def write(self, arrays: Sequence[Sequence[_Array]]) -> None:
        """Takes parameters and rows, which have been checked."""
        rows = {id(chunk): np.zeros((len(chunk.kind.rows), chunk.stride), np.float32) for chunk in self._chunks}
        for part in self._parts:
            into = rows[id(part.chunk)][:, part.first : part.first + part.size]
            for row, array in zip(into, arrays[part.leaf][1:], strict=True):
                row[...] = array.reshape(-1)[part.start : part.start + part.size]
        for view, (own, *_) in zip(self._views, arrays, strict=True):
            write(view, own)
        for chunk in self._chunks:
            if chunk.rows is not None:
                self._device.queue.write_buffer(chunk.rows, 0, rows[id(chunk)])

    def state(self) -> list[dict[str, _Array]]:
        """Each leaf's state arrays, by name."""
        return [
            dict(zip(kind.rows[: kind.states], map(locked, arrays), strict=False)) if kind else {}
            for kind, arrays in zip(self._kinds, self.rows(), strict=True)
        ]

    def slow(self) -> list[_Array]:
        """The slow weights of each leaf, which has some."""
        return [
            arrays[kind.slow] if kind and kind.slow is not None else read(view)
            for view, kind, arrays in zip(self._views, self._kinds, self.rows(), strict=True)
        ]


def locked(array: _Array) -> _Array:
    """The same, read-only."""
    array.flags.writeable = False
    return array


def counters_of(state: Mapping[str, Any]) -> tuple[int, tuple[tuple[int, int], ...], list[tuple[int, Any]]]:
    """Steps, cycles, and each leaf's own steps and what the rule carries for it."""
    leaves = [(steps, tuple(carry)) for steps, carry in state["leaves"]]
    return state["steps"], tuple((done, syncs) for done, syncs in state["cycles"]), leaves
