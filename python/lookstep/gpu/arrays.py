"""Arrays on the GPU: views of buffers, and buffers for a whole tree of them."""

import math
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import wgpu

from ..tree import Structure
from .device import COPY_DST, COPY_SRC, STORAGE, Device, device_of, make_buffer

DTYPES = ("float32", "float16", "bfloat16")
ALIGN = 256

Shapes: TypeAlias = Any
"""A shape, or a list, tuple or dict of trees of shapes."""


class View:
    """An array in a buffer: contiguous, in C order.

    Args:
        buffer: a `wgpu.GPUBuffer` with usage STORAGE; parameters that are to be saved need COPY_SRC, and those that are
            loaded COPY_DST.
        dtype: "float32", "float16" or "bfloat16" (which needs `ml_dtypes`), or NumPy's name for it.
        shape: the array's shape; an integer is a shape of one axis.
        offset: the byte of the first element, a multiple of 4.

    Raises:
        TypeError: if `buffer` is none, or the dtype is another.
        ValueError: if the array does not lie within the buffer, or the offset is no multiple of 4.

    Example:
        >>> import lookstep as ls
        >>> arena = ls.gpu.Arena(ls.gpu.default_device(), {"w": (2, 3)})
        >>> view = ls.gpu.View(arena.params["w"].buffer, "float32", (3,), offset=12)
        >>> view.shape, view.nbytes
        ((3,), 12)
    """

    __slots__ = ("__weakref__", "buffer", "dtype", "nbytes", "offset", "room", "shape", "size")

    buffer: Any
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    size: int
    """Elements."""
    nbytes: int
    """Bytes."""
    room: int
    """Bytes from the first element on that nobody else has: an arena's views are followed by some that are nothing."""

    def __init__(self, buffer: Any, dtype: Any, shape: int | Sequence[int], offset: int = 0) -> None:
        """Checks that the array lies within the buffer."""
        if not isinstance(buffer, wgpu.GPUBuffer):
            raise TypeError(f"buffer must be a wgpu.GPUBuffer, got {type(buffer).__name__}")
        dtype, shape = dtype_of(dtype), _shape(shape)
        if not isinstance(offset, Integral) or isinstance(offset, bool):
            raise TypeError(f"offset must be an integer, got {type(offset).__name__} {offset!r}")
        size = math.prod(shape)
        nbytes = size * dtype.itemsize
        if offset < 0 or offset % 4:
            raise ValueError(f"offset must be a multiple of 4 bytes and >= 0, got {offset}")
        # A binding has whole words.
        if offset + _up(nbytes, 4) > buffer.size:
            raise ValueError(
                f"{dtype.name} of shape {shape} from byte {offset} on needs {offset + _up(nbytes, 4)} bytes, "
                f"but the buffer has {buffer.size}"
            )
        values = (buffer, dtype, shape, int(offset), size, nbytes, nbytes)
        for name, value in zip(("buffer", "dtype", "shape", "offset", "size", "nbytes", "room"), values, strict=True):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses: a view is what it was made as."""
        raise AttributeError(f"a View is read-only: make a new one instead of setting {name}")

    @property
    def ndim(self) -> int:
        """How many axes there are."""
        return len(self.shape)

    def __repr__(self) -> str:
        """The dtype, shape and place."""
        return f"View({self.dtype.name}, {self.shape}, offset={self.offset})"


def dtype_of(dtype: Any) -> np.dtype[Any]:
    """NumPy's type for a name or type.

    Raises:
        TypeError: if shaders do not compute with it.
        ImportError: if it is bfloat16, and `ml_dtypes` is not there.
    """
    if isinstance(dtype, str) and dtype == "bfloat16":
        try:
            from ml_dtypes import bfloat16
        except ImportError as error:
            raise ImportError("bfloat16 needs ml_dtypes: pip install ml_dtypes") from error
        dtype = bfloat16
    try:
        found: np.dtype[Any] = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}") from None
    if found.name not in DTYPES or not found.isnative:
        hint = "; WGSL has no float64" if found.name == "float64" else ""
        raise TypeError(f"dtype must be one of {', '.join(DTYPES)}, got {found.name}{hint}")
    return found


def _shape(shape: Any) -> tuple[int, ...]:
    axes = (shape,) if isinstance(shape, Integral) else shape
    if not isinstance(axes, Sequence) or any(not isinstance(n, Integral) or isinstance(n, bool) for n in axes):
        raise TypeError(f"shape must be an integer or a sequence of them, got {shape!r}")
    if any(n < 0 for n in axes):
        raise ValueError(f"shape must not be negative, got {shape!r}")
    return tuple(map(int, axes))


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


class Arena:
    """Two buffers for a whole tree of arrays: one of parameters, one of gradients. A step over them is one dispatch.

    Views begin at multiples of 256 bytes. The bytes between them are zero, and have to stay so.

    Args:
        device: a `wgpu.GPUDevice`; no feature and no limit is needed.
        tree_of_shapes: a shape, or a list or dict of such, to any depth. A tuple is a shape where it holds integers
            alone, also none.
        dtype: of the parameters: "float32", "float16" or "bfloat16".
        grads_dtype: of the gradients; `None` for the parameters' own.

    Attributes:
        params: the tree of views of parameters.
        grads: the same of gradients.

    Raises:
        TypeError: if a leaf is no shape, or the dtype another.
        ValueError: if there is no leaf, or more than a buffer of the device may hold.
        MemoryError: if the device has no room.

    Example:
        >>> import numpy as np
        >>> import lookstep as ls
        >>> arena = ls.gpu.Arena(ls.gpu.default_device(), {"w": (2, 2), "b": (3,)})
        >>> arena.upload({"w": np.ones((2, 2), "f4"), "b": np.zeros(3, "f4")})
        >>> arena.download()["w"].sum()
        np.float32(4.0)
    """

    def __init__(self, device: Any, tree_of_shapes: Shapes, dtype: Any = "float32", *, grads_dtype: Any = None) -> None:
        """Makes both buffers."""
        kinds = [dtype_of(dtype), dtype_of(dtype if grads_dtype is None else grads_dtype)]
        tree = _boxed(tree_of_shapes)
        self._structure = Structure(tree if isinstance(tree, list | tuple | dict) else np.empty(0))  # A bare shape.
        shapes = [leaf.shape for leaf in self._structure.leaves(tree, "tree_of_shapes")]
        self.device = device
        # As many elements apart in both, whatever the formats: a step goes over all of them at once.
        elements = ALIGN // min(kind.itemsize for kind in kinds)
        rooms = [_up(math.prod(shape), elements) for shape in shapes]
        self.params = self._views(kinds[0], shapes, rooms, "params")
        self.grads = self._views(kinds[1], shapes, rooms, "grads")

    def _views(self, dtype: np.dtype[Any], shapes: list[tuple[int, ...]], elements: list[int], what: str) -> Any:
        rooms = [n * dtype.itemsize for n in elements]
        size, most = max(sum(rooms), ALIGN), Device.of(self.device).buffer
        if size > most:
            raise ValueError(f"{what} of {size} bytes are more than a buffer of this device may hold, {most}")
        buffer = make_buffer(self.device, size, STORAGE | COPY_SRC | COPY_DST, what)
        views, offset = [], 0
        for shape, room in zip(shapes, rooms, strict=True):
            view = View(buffer, dtype, shape, offset)
            object.__setattr__(view, "room", room)
            views.append(view)
            offset += room
        return self._structure.build(views)

    def upload(self, arrays: Any) -> None:
        """Writes arrays into the parameters.

        Args:
            arrays: a tree of NumPy arrays of the arena's structure, shapes and dtype.

        Raises:
            TypeError, ValueError: if one is another; nothing is written then.
        """
        pairs = []
        names = self._structure.names
        for name, view, array in zip(names, self._leaves(), self._structure.leaves(arrays, "arrays"), strict=True):
            if not isinstance(array, np.ndarray):
                raise TypeError(f"{name} must be a NumPy array, got {type(array).__name__}")
            if array.dtype != view.dtype:
                raise TypeError(f"{name} has dtype {array.dtype.name} but the arena has {view.dtype.name}")
            if array.shape != view.shape:
                raise ValueError(f"{name} has shape {array.shape} but the arena has {view.shape}")
            pairs.append((view, array))
        for view, array in pairs:
            write(view, array)

    def download(self) -> Any:
        """The parameters: a tree of new NumPy arrays. It waits for the GPU."""
        return self._structure.build([read(view) for view in self._leaves()])

    def _leaves(self) -> Any:
        return self._structure.leaves(self.params, "params")


class _Box:
    """A shape as a leaf."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape


def _boxed(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _boxed(value) for key, value in tree.items()}
    if isinstance(tree, tuple) and all(isinstance(n, Integral) for n in tree):
        return _Box(_shape(tree))
    if isinstance(tree, list | tuple):
        make = getattr(tree, "_make", type(tree))
        return make([_boxed(value) for value in tree])
    raise TypeError(f"a shape must be a tuple of integers, got {type(tree).__name__} {tree!r}")


def read(view: View) -> np.ndarray[Any, Any]:
    """A copy of an array in a view; it waits for the GPU."""
    if not view.size:
        return np.zeros(view.shape, view.dtype)
    queue = _queue(view)
    data = queue.read_buffer(view.buffer, view.offset, _up(view.nbytes, 4))
    return np.frombuffer(data, view.dtype, view.size).reshape(view.shape).copy()


def write(view: View, array: np.ndarray[Any, Any]) -> None:
    """Writes an array of the view's dtype and shape into it; the half word after an odd number of elements stays."""
    if not view.size:
        return
    queue = _queue(view)
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if view.nbytes % 4:
        last = view.offset + view.nbytes - 2
        data = np.append(data, np.frombuffer(queue.read_buffer(view.buffer, last, 4), np.uint8)[2:])
    queue.write_buffer(view.buffer, view.offset, data)


def _queue(view: View) -> Any:
    device = device_of(view.buffer)
    Device.of(device)  # It is this process's.
    return device.queue


def views_of(leaves: Sequence[Any], names: Iterator[str]) -> Iterator[View]:
    """Each leaf as a view: a bare buffer is float32, its whole size, in one axis.

    Raises:
        TypeError: if a leaf is neither.
    """
    for leaf, name in zip(leaves, names, strict=True):
        if isinstance(leaf, View):
            yield leaf
        elif isinstance(leaf, wgpu.GPUBuffer):
            yield View(leaf, "float32", leaf.size // 4)
        else:
            raise TypeError(f"{name} must be a wgpu.GPUBuffer or a lookstep.gpu.View, got {type(leaf).__name__}")
