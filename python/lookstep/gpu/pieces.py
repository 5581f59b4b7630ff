"""What one dispatch goes over: parts of leaves that lie together, as their gradients do, and were moved together."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .arrays import View
from .device import COPY_DST, UNIFORM, Device, make_buffer
from .layout import Chunk, Part

THREADS = 64
MOST_GROUPS = 65535
"""Workgroups along one axis of a dispatch."""
CHUNK = 1 << 14
"""Elements that are added up apart from others: see wgsl/sums.wgsl."""
PARTIAL = 32
"""Bytes of their sums."""
_SLOT = 256


@dataclass
class Piece:
    """A run of elements, and how it is bound."""

    chunk: Chunk
    history: int
    grads: View | None
    """The gradients of its first leaf; `given` is the byte of the first."""
    given: int
    first: int
    """The first element, in the chunk."""
    size: int
    room: int
    """Elements from the first on that nobody else has, nor their gradients."""
    leaves: list[int]
    partial: int = 0
    """Where its sums go."""
    quads: bool = False
    lanes: int = 1
    groups: tuple[int, int] = (0, 0)
    written: bool = False
    """Whether its gradients are in a buffer that is written."""
    uniform: Any = None
    bound: Any = None
    """The bind group, and what it was made for."""
    bound_for: Any = None

    @property
    def sums(self) -> int:
        """How many sums it has."""
        return -(-self.size // CHUNK)


def pieces_of(
    parts: Sequence[Part], views: Sequence[View], grads: Sequence[View | None], history_of: Sequence[int]
) -> Iterator[Piece]:
    """The pieces of a step with these gradients, or with none."""
    piece: Piece | None = None
    for part in parts:
        grad, history = grads[part.leaf], history_of[part.leaf]
        given = 0 if grad is None else grad.offset + part.start * grad.dtype.itemsize
        room = part.room if grad is None else min(part.room, grad.room // grad.dtype.itemsize - part.start)
        if piece and _follows(piece, part, grad, given, history):
            piece.size = part.first - piece.first + part.size
            piece.room = part.first - piece.first + room
            piece.leaves.append(part.leaf)
            continue
        if piece:
            yield _finished(piece)
        piece = Piece(part.chunk, history, grad, given, part.first, part.size, room, [part.leaf])
    if piece:
        yield _finished(piece)


def _follows(piece: Piece, part: Part, grad: View | None, given: int, history: int) -> bool:
    """Whether a part continues a piece, its gradients too."""
    same = piece.chunk is part.chunk and piece.history == history and piece.first + piece.room == part.first
    if not same or (piece.grads is None) != (grad is None):
        return False
    if piece.grads is None or grad is None:
        return True
    itemsize = grad.dtype.itemsize
    beside = piece.given + (part.first - piece.first) * itemsize == given
    return beside and piece.grads.buffer is grad.buffer and piece.grads.dtype == grad.dtype


def _finished(piece: Piece) -> Piece:
    """With four elements a thread where all lies on a boundary of four."""
    padded = -(-piece.size // 4) * 4
    starts = [piece.chunk.offset // piece.chunk.kind.dtype.itemsize + piece.first, piece.first]
    itemsizes = [piece.chunk.kind.dtype.itemsize]
    if piece.grads is not None:
        itemsizes.append(piece.grads.dtype.itemsize)
        starts.append(piece.given // itemsizes[-1])
        piece.written = piece.grads.buffer is piece.chunk.buffer
    piece.quads = padded <= piece.room and all(start % 4 == 0 for start in starts)
    if piece.quads:
        piece.size = padded
    piece.lanes = 4 if piece.quads else 2 if min(itemsizes) < 4 else 1
    return piece


def place(device: Any, pieces: Sequence[Piece], histories: int, limit: float) -> None:
    """Writes what shaders need to know of each piece into uniforms of its own."""
    if not pieces:
        return
    limits = Device.of(device)
    slot = max(_SLOT, limits.uniform_align)
    buffer = make_buffer(device, slot * len(pieces), UNIFORM | COPY_DST, "what a step needs to know")
    data, partial = bytearray(), 0
    most = min(limits.groups, MOST_GROUPS)
    for index, piece in enumerate(pieces):
        piece.partial = partial
        partial += piece.sums
        groups = -(-piece.size // (piece.lanes * THREADS))
        rows = -(-groups // most)
        piece.groups = -(-groups // rows), rows
        p_first = _within(limits, piece.chunk.offset, piece.first, piece.chunk.kind.dtype.itemsize)
        g_first = 0 if piece.grads is None else _within(limits, piece.given, 0, piece.grads.dtype.itemsize)
        data += struct.pack(
            "<10IfI",
            piece.size,
            p_first,
            g_first,
            piece.first,
            piece.chunk.stride,
            piece.groups[0] * THREADS,
            piece.history,
            histories,
            piece.partial,
            0,
            limit,
            0,
        ).ljust(slot, b"\0")
        piece.uniform = {"buffer": buffer, "offset": slot * index, "size": 48}
    device.queue.write_buffer(buffer, 0, bytes(data))


def _within(limits: Device, offset: int, first: int, itemsize: int) -> int:
    """The first element, counted from where its binding begins."""
    byte = offset + first * itemsize
    return (byte - byte // limits.storage_align * limits.storage_align) // itemsize


def bind(device: Any, piece: Piece, kinds: tuple[str, ...], slots: Any, slot: int, others: Sequence[Any]) -> Any:
    """The bind group of a piece: `slots` is a buffer of which `slot` bytes are seen at a time, `others` come last."""
    limits = Device.of(device)
    entries = [
        {"binding": 0, "resource": {"buffer": slots, "offset": 0, "size": slot}},
        {"binding": 1, "resource": piece.uniform},
    ]
    chunk = piece.chunk
    itemsize = chunk.kind.dtype.itemsize
    arrays: list[Any] = [(2, chunk.buffer, chunk.offset + piece.first * itemsize, piece.size * itemsize)]
    if piece.grads is not None:
        arrays.append((3, piece.grads.buffer, piece.given, piece.size * piece.grads.dtype.itemsize))
    if chunk.rows is not None:
        arrays.append((4, chunk.rows, 0, chunk.rows.size))
    for binding, buffer, byte, nbytes in arrays:
        offset = byte // limits.storage_align * limits.storage_align
        size = -(-(byte + nbytes - offset) // 4) * 4
        entries.append({"binding": binding, "resource": {"buffer": buffer, "offset": offset, "size": size}})
    for binding, buffer in enumerate(others, 5):
        if buffer is not None:
            entries.append({"binding": binding, "resource": {"buffer": buffer, "offset": 0, "size": buffer.size}})
    return device.create_bind_group(layout=limits.layout(device, kinds), entries=entries)
