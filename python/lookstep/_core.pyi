from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar, final

import numpy as np

__all__ = ["Engine", "SlowWeights", "__version__", "decide", "foresee", "kernels", "layout", "shader"]
__version__: str

_Array = np.ndarray[Any, Any]
_P = TypeVar("_P")
_Hyper = Sequence[tuple[Mapping[str, float], Sequence[float]]]

_Cycles = Sequence[Mapping[str, Any]]
_Carry = tuple[float, float, float]
_History = tuple[Mapping[str, Any], bool, int, _Carry]
_Counted = tuple[int, list[tuple[int, int]], list[tuple[int, _Carry]]]

def decide() -> str: ...
def foresee(
    call: str,
    cycles: _Cycles,
    start: tuple[int, Sequence[tuple[int, int]]],
    histories: Sequence[_History],
    scale: float,
    optimal: bool,
    count: int,
    stride: int,
) -> tuple[bytes, list[tuple[int, int, bool]], list[_Counted]]: ...
def layout(
    name: str, cycles: _Cycles, optimal: bool, master: bool
) -> tuple[list[str], int, int | None, bool, bool]: ...
def shader(name: str, cycles: _Cycles, form: Mapping[str, Any]) -> str: ...
def kernels() -> dict[str, tuple[list[str], list[str]]]: ...

@final
class Engine:
    def __new__(
        cls,
        names: Sequence[str],
        params: Sequence[Any],
        of_group: Sequence[int],
        groups: Sequence[Mapping[str, Any]],
        cycles: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
    ) -> Engine: ...
    def step(self, grads: list[Any] | tuple[Any, ...], scale: float = 1.0, hyper: _Hyper | None = None) -> None: ...
    def sync(self, hyper: _Hyper | None = None) -> None: ...
    def slow_weights(self, params: _P) -> SlowWeights[_P]: ...
    def set_groups(self, of_group: Sequence[int], groups: Sequence[Mapping[str, Any]]) -> None: ...
    @property
    def steps(self) -> int: ...
    @property
    def syncs(self) -> int: ...
    @property
    def skipped(self) -> int: ...
    @property
    def grad_norm(self) -> float | None: ...
    @property
    def slow_step(self) -> float | None: ...
    def slow(self) -> list[_Array]: ...
    def state(self) -> list[dict[str, _Array]]: ...
    def kinds(self) -> list[list[tuple[str, str, list[int]]]]: ...
    def dump(self) -> tuple[list[list[_Array]], dict[str, Any]]: ...
    def restore(
        self,
        arrays: Sequence[Sequence[_Array]],
        counters: Mapping[str, Any],
        of_group: Sequence[int],
        groups: Sequence[Mapping[str, Any]],
    ) -> None: ...

@final
class SlowWeights(Generic[_P]):
    def __enter__(self) -> _P: ...
    def __exit__(self, *_exception: object) -> None: ...
