"""Reads and writes safetensors files (https://huggingface.co/docs/safetensors), strictly and with NumPy alone.

A file is the length of its header in 8 bytes, little-endian; the header, a JSON object from each tensor's name to its
dtype, shape and place in the data; and the data. Nothing in it is ever run.
"""

import json
import os
import stat
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np

from .atomic import StrPath, replacing
from .header import DTYPES, HEADER_LIMIT, TENSOR_LIMIT, Tensor, parse

Array: TypeAlias = np.ndarray[Any, Any]

_NAMES = {dtype.name: name for name, dtype in DTYPES.items() if name != "BF16"} | {"bfloat16": "BF16"}


class Reader:
    """An open safetensors file.

    To open it is to check all that its header says, and allocates nothing for the data: compare `tensors` with what you
    expect before you `read` them.

    Args:
        path: the file.
        limit: the longest header to accept, in bytes.
        tensors: the most tensors to accept; 32,768 are always accepted.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is not a safetensors file, in every detail, or its header is beyond the limits.

    Attributes:
        tensors: by name, each tensor's dtype and shape, in the order of the header.
        metadata: the file's own strings, by name.

    Example:
        >>> import os, tempfile
        >>> import numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "run.safetensors")
        ...     write(path, {"w": np.arange(3.0)}, {"made by": "hand"})
        ...     with Reader(path) as file:
        ...         print(file.metadata, file.tensors["w"].shape, file.read("w"))
        {'made by': 'hand'} (3,) [0. 1. 2.]
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    def __init__(self, path: StrPath, *, limit: int = HEADER_LIMIT, tensors: int = TENSOR_LIMIT) -> None:
        """Reads and checks the header."""
        self._path = os.fspath(path)
        self._file = open(path, "rb", opener=_open_at_once)
        try:
            header, self._start, size = self._header(limit)
            self.tensors, self.metadata = parse(header, size - self._start, max(tensors, TENSOR_LIMIT))
        except (ValueError, RecursionError) as error:
            self.close()
            raise ValueError(f"{self._path} cannot be read as safetensors: {error}") from None
        except BaseException:
            self.close()
            raise

    def _header(self, limit: int) -> tuple[bytes, int, int]:
        """The header, where the data starts, and the file's size."""
        status = os.fstat(self._file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        size = status.st_size
        if size < 8:
            raise ValueError(f"it is truncated, with {size} bytes where the header's length takes 8")
        length = int.from_bytes(self._file.read(8), "little")
        if length > limit:
            raise ValueError(f"its header's length of {length} bytes is over the limit of {limit}")
        if length > size - 8:
            raise ValueError(f"its header's length is {length} bytes but only {size - 8} follow")
        header = self._file.read(length)
        if len(header) < length:
            raise ValueError("it is truncated")
        return header, 8 + length, size

    def read(self, name: str) -> Array:
        """Reads one tensor into a new array, little-endian; the bits of BF16 as uint16.

        Raises:
            KeyError: if there is no tensor of that name.
            OSError, ValueError: if the file has become unreadable or shorter since.
        """
        tensor = self.tensors[name]
        array = np.empty(tensor.shape, DTYPES[tensor.dtype])
        self._file.seek(self._start + tensor.begin)
        if self._file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
            raise ValueError(f'{self._path} is truncated within tensor "{name}"')
        return array

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        """Returns the reader, for a block at whose end the file is closed."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the file."""
        self.close()


def write(
    path: StrPath, tensors: Mapping[str, Array | tuple[str, Array]], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file, whole or not at all; the same input gives the same bytes.

    Args:
        path: the file to make or replace; see `atomic.replacing`.
        tensors: arrays by name, of any layout. Bits that NumPy has no dtype for go with their dtype's name, as in
            `("BF16", bits)` for uint16 bits.
        metadata: the file's own strings, by name.

    Raises:
        TypeError: if a name is no string, or an array's dtype is not supported.
        ValueError: if `Reader` would refuse the file, for a name or for its size.
        OSError: if the file cannot be written; what was there before is intact.

    Example:
        See `Reader`.
    """
    named = [(name, *_named(name, value)) for name, value in tensors.items()]
    # Widest first, so that every tensor is aligned to its own dtype.
    named.sort(key=lambda entry: (-DTYPES[entry[1]].itemsize, entry[0]))
    header: dict[str, Any] = {"__metadata__": dict(sorted(_strings(metadata).items()))} if metadata else {}
    end = 0
    for name, dtype, array in named:
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": (begin, end)}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass")
    text += b" " * (-len(text) % 8)
    try:
        parse(text, end, len(header))  # What cannot be read back is not written.
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} cannot be saved as safetensors: {error}") from None
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, array in named:
            file.write(_bytes(array))


def _named(name: Any, value: Any) -> tuple[str, Array]:
    """A tensor's dtype name, and its array."""
    if not isinstance(name, str):
        raise TypeError(f"tensor names must be str, got {type(name).__name__} {name!r}")
    if name == "__metadata__":
        raise ValueError('no tensor can be called "__metadata__"')
    given, array = value if isinstance(value, tuple) else (None, value)
    if not isinstance(array, np.ndarray):
        raise TypeError(f'tensor "{name}" must be a NumPy array, got {type(array).__name__}')
    found = _NAMES.get(array.dtype.name)
    if found is None:
        raise TypeError(f'tensor "{name}" has dtype {array.dtype}; supported: {", ".join(_NAMES)}')
    if given not in (None, found) and (given, found) != ("BF16", "U16"):
        raise TypeError(f'tensor "{name}" has dtype {array.dtype}, which does not hold {given}')
    return given or found, array


def _strings(metadata: Mapping[str, str]) -> Mapping[str, str]:
    for item in metadata.items():
        for text in item:
            if not isinstance(text, str):
                raise TypeError(f"metadata must be str, got {type(text).__name__} {text!r}")
    return metadata


def _bytes(array: Array) -> memoryview:
    """The array's bytes as the file has them, without a copy where it lies so."""
    if array.dtype.name == "bfloat16":
        array = array.view(np.uint16)
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data


def _open_at_once(path: str, flags: int) -> int:
    """Opens a file without waiting for a writer, where it is a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
