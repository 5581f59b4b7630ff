"""The header of a safetensors file: what the format allows, and a parser that takes nothing else."""

import json
import math
import re
from itertools import pairwise
from reprlib import repr as shortened
from typing import Any, NamedTuple

import numpy as np

from .plain import distinct, no_number, reason

HEADER_LIMIT = 8 << 20
TENSOR_LIMIT = 1 << 15
METADATA_LIMIT = 1 << 20
NAME_LIMIT = 1 << 12
"""What a header may hold, in bytes and in tensors: more than an optimizer needs, within a second and 64 MiB."""

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}
"""How NumPy holds each dtype. It has none for BF16, whose bits are read as uint16."""


class Tensor(NamedTuple):
    """What a header says of a tensor: its dtype's name in the format, its shape, and where in the data it lies."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


# The header is cut into entries before JSON sees them, each of bounded size: a parser that took it whole would build
# whatever it holds, at tens of times its size, before the first check. Nothing here can backtrack.
_SPACE = rb"[ \t\n\r]*+"
_OPEN = re.compile(rb"\{" + _SPACE)
_KEY = re.compile(rb'"((?:[^"\\\x00-\x1f]++|\\.)*+)"' + _SPACE + rb":" + _SPACE)
_TENSOR = re.compile(rb"\{[^{}]*+\}")
_METADATA = re.compile(rb'\{(?:[^"{}\[\]]++|"(?:[^"\\]++|\\.)*+")*+\}')
_NEXT = re.compile(_SPACE + rb"(?:,()|\})" + _SPACE)

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def parse(header: bytes, size: int, tensors_limit: int = TENSOR_LIMIT) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a header, all checked.

    Args:
        header: the bytes between the header's length and the data.
        size: how many bytes of data there are.
        tensors_limit: how many tensors there may be.

    Raises:
        ValueError: if there is anything in it that the format does not have, or that is beyond the limits.

    Example:
        >>> parse(b'{"w":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}', 12)
        ({'w': Tensor(dtype='F32', shape=(3,), begin=0, end=12)}, {})
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] | None = None
    at = _match(_OPEN, header, 0, "'{'").end()
    more = header[at : at + 1] != b"}"
    if not more:
        at = _match(_NEXT, header, at, "'}'").end()
    while more:
        key = _match(_KEY, header, at, "a name and a colon")
        name = _string(key[1])
        if name == "__metadata__":
            if metadata is not None:
                raise ValueError('"__metadata__" is there twice')
            value = _match(_METADATA, header, key.end(), "metadata as an object of strings")
            metadata = _metadata(value[0])
        else:
            _check_name(name)
            if name in tensors:
                raise ValueError(f"tensor {_quoted(name)} is there twice")
            if len(tensors) == tensors_limit:
                raise ValueError(f"it has more than {tensors_limit} tensors")
            value = _match(_TENSOR, header, key.end(), f"what tensor {_quoted(name)} is, as an object")
            try:
                tensors[name] = _tensor(value[0])
            except (ValueError, RecursionError) as error:
                raise ValueError(f"tensor {_quoted(name)} {reason(error)}") from None
        after = _match(_NEXT, header, value.end(), "',' or '}'")
        at, more = after.end(), after[1] is not None
    if at < len(header):
        raise ValueError(f"its header goes on after its end, at byte {at}")
    _check_layout(tensors, size)
    return tensors, metadata or {}


def _match(pattern: re.Pattern[bytes], header: bytes, at: int, wanted: str) -> re.Match[bytes]:
    match = pattern.match(header, at)
    if match is None:
        raise ValueError(f"its header must have {wanted} at byte {at}, got {header[at : at + 20]!r}")
    return match


def _string(raw: bytes) -> str:
    """The string that a JSON literal stands for; its raw bytes come without quotes."""
    if len(raw) > NAME_LIMIT:
        raise ValueError(f"it has a name of {len(raw)} bytes; the limit is {NAME_LIMIT}")
    try:
        text = raw.decode()
        if "\\" in text:
            text = _JSON.decode(f'"{text}"')
            text.encode()  # An escape can spell half a character, which UTF-8 cannot.
    except UnicodeError:
        raise ValueError(f"the name {raw[:100]!r} is not valid UTF-8") from None
    except ValueError as error:
        raise ValueError(f"the name {raw[:100]!r} {reason(error)}") from None
    return text


def _quoted(name: str) -> str:
    """The name for an error, of a length and in letters that can be shown."""
    name = name if len(name) <= 100 else name[:100] + "..."
    return f'"{name}"' if name.isprintable() else ascii(name)


def _check_name(name: str) -> None:
    """Refuses names that would be trouble on a terminal or, for those who take them for paths, in a file system."""
    if _CONTROL.search(name):
        raise ValueError(f"the tensor name {_quoted(name)} has a control character")
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or (len(parts) > 1 and not parts[0]):
        raise ValueError(f"the tensor name {_quoted(name)} is a path out of its folder")


_JSON = json.JSONDecoder(object_pairs_hook=distinct, parse_float=no_number, parse_constant=no_number)


def _metadata(raw: bytes) -> dict[str, str]:
    if len(raw) > METADATA_LIMIT:
        raise ValueError(f"its metadata has {len(raw)} bytes; the limit is {METADATA_LIMIT}")
    try:
        metadata: dict[str, str] = _JSON.decode(raw.decode())
        for key, value in metadata.items():
            if not isinstance(value, str):
                raise ValueError(f"has {shortened(key)} as {type(value).__name__}, where all must be strings")
            (key + value).encode()
    except UnicodeError:
        raise ValueError("its metadata is not valid UTF-8") from None
    except ValueError as error:
        raise ValueError(f"its metadata {reason(error)}") from None
    return metadata


def _tensor(raw: bytes) -> Tensor:
    """One tensor's entry, right in itself; errors go on from the tensor's name."""
    if len(raw) > NAME_LIMIT:
        raise ValueError(f"is described in {len(raw)} bytes; the limit is {NAME_LIMIT}")
    try:
        entry = _JSON.decode(raw.decode())
    except UnicodeError:
        raise ValueError("is not described in valid UTF-8") from None
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"must have dtype, shape and data_offsets, got {shortened(list(entry))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"has dtype {shortened(dtype)}; supported: {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > 64:
        raise ValueError(f"has shape {shortened(shape)}, which must be a list of at most 64 integers")
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"has data_offsets {shortened(offsets)}, which must be a list of 2 integers")
    numbers = shape + offsets
    # By type, since `True` is an integer to Python.
    if {*map(type, numbers)} != {int} or min(numbers) < 0 or max(numbers) >= 2**63:
        raise ValueError(
            f"has shape {shortened(shape)} and data_offsets {shortened(offsets)}, "
            "which must be integers from 0 to 2**63 - 1"
        )
    begin, end = offsets
    itemsize = DTYPES[dtype].itemsize
    nbytes = math.prod(shape) * itemsize
    # NumPy holds the extents of an array without elements to the same limit.
    if (nbytes or math.prod(filter(None, shape)) * itemsize) >= 2**63:
        raise ValueError(f"has shape {str(shape)[:200]}, which overflows")
    if nbytes != end - begin:
        raise ValueError(f"has data_offsets {offsets}, but {dtype} of shape {shape} takes {nbytes} bytes")
    return Tensor(dtype, tuple(shape), begin, end)


def _check_layout(tensors: dict[str, Tensor], size: int) -> None:
    """Tensors lie side by side, from the first byte of the data to the last."""
    placed = sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end))
    for (before, first), (name, then) in pairwise([("", Tensor("", (), 0, 0)), *placed]):
        if then.begin < first.end:
            raise ValueError(f"tensors {_quoted(before)} and {_quoted(name)} overlap")
        if then.begin > first.end:
            raise ValueError(f"there is a hole of {then.begin - first.end} bytes before tensor {_quoted(name)}")
    if (end := placed[-1][1].end if placed else 0) != size:
        raise ValueError(f"its tensors take {end} bytes of data but it has {size}")
