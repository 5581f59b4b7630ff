"""What the GPU decides from gradients, without a readback.

It is clipping by norm, whether a step is dropped, the loss scale, and the best slow step.

Three passes make a step then. The first adds up a fixed number of elements at a time; the second, of one workgroup,
adds those sums up and writes what it decides into the control buffer; the third is the step, which reads that.

Where steps may be dropped, the host does not know which step comes next. The rows of uniforms of all that it can be are
in a table then, of which the GPU picks one by its own count of the steps that it applied.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from ..hyper import Check, Checked, above_zero, at_least_one, positive_integer, within_one
from .device import COPY_DST, COPY_SRC, STORAGE, Device, make_buffer
from .pieces import PARTIAL
from .slots import SLOTS, Slots

_CALL = struct.Struct("<f4I4f3I")
_CONTROL = struct.Struct("<5f6I2f")
_NBYTES = 64
MOST_ROWS = 1 << 16
"""Steps that the host may be ahead of what it has read, before it reads again."""
SMALLEST, LARGEST = 2.0**-30, 2.0**60
"""Between these, loss scales stay."""
_SKIPS, _CLIPS, _SCALES, _PICKS, _MEASURES = 1, 2, 4, 8, 16
_KINDS = "uniform*", "storage", "storage", "read-only-storage"


def _scale(name: str, value: Any) -> float:
    scale = above_zero(name, value)
    if not SMALLEST <= scale <= LARGEST:
        raise ValueError(f"{name} must be in [2**-30, 2**60], got {value!r}")
    return scale


def _growth(name: str, value: Any) -> float:
    growth = at_least_one(name, value)
    if growth > LARGEST:
        raise ValueError(f"{name} must be in [1, 2**60], got {value!r}")
    return growth


@dataclass(frozen=True)
class LossScale(Checked):
    """A loss scale that follows gradients of few bits.

    Where one is not finite, the step is dropped, and the scale shrinks; after a while without, it grows.

    The shader that makes the gradients multiplies the loss by the scale, which is the first float32 of
    `Optimizer.control`; the step takes it out again. Powers of two cost no digits.

    Args:
        initial: the first scale, in [2^-30, 2^60], between which it stays.
        growth: what it is multiplied by after `interval` steps without a dropped one, in [1, 2^60].
        backoff: what it is multiplied by after a dropped step, in (0, 1).
        interval: see `growth`, an integer >= 1.

    Raises:
        TypeError, ValueError: if one is not that.

    Example:
        >>> import lookstep as ls
        >>> ls.gpu.LossScale(initial=2.0**10)
        LossScale(initial=1024.0, growth=2.0, backoff=0.5, interval=2000)
    """

    initial: float = 2.0**16
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000

    _checks: ClassVar[Mapping[str, Check]] = {
        "initial": _scale,
        "growth": _growth,
        "backoff": within_one,
        "interval": positive_integer,
    }


class Control(NamedTuple):
    """What the control buffer holds: see `Control` in control.wgsl."""

    loss_scale: float
    inverse: float
    used: float
    norm: float
    clip: float
    applied: int
    events: int
    event: int
    calls: int
    skipped: int
    good: int
    slow_step: float
    rest: float


class Decisions:
    """The control buffer, and what the passes before a step need.

    Args:
        device: a `wgpu.GPUDevice`.
        options: as for the engine.
        row: bytes of the longest row of uniforms.
    """

    def __init__(self, device: Any, options: Mapping[str, Any], row: int) -> None:
        """Makes the control buffer."""
        self._device = device
        self._max_norm = options["max_grad_norm"]
        self._scales: LossScale | None = options["loss_scale"]
        self.drops = options["nonfinite"] == "skip" or self._scales is not None
        self.optimal = bool(options["optimal"])
        self.row = row
        self.calls = 0
        self.buffer = make_buffer(device, _NBYTES, STORAGE | COPY_SRC | COPY_DST, "control")
        self.slots = Slots(device, _CALL.size)
        self.table: Any = None
        self.partials: Any = None
        self._capacity = 0
        self._base = 0
        self._rows = bytearray()
        self._histories = 1
        self._known: dict[bytes, int] = {}
        self._known_in: Any = None
        self._bound: Any = None
        initial = self._scales.initial if self._scales else 1.0
        self.write(Control(initial, 1 / initial, 1.0, 0.0, 1.0, 1, 0, 0, 0, 0, 0, 1.0, 0.0))

    def write(self, control: Control) -> None:
        """Writes the control buffer."""
        self._device.queue.write_buffer(self.buffer, 0, _CONTROL.pack(*control).ljust(_NBYTES, b"\0"))

    def read(self) -> Control:
        """Reads the control buffer; it waits for the GPU."""
        return Control(*_CONTROL.unpack_from(self._device.queue.read_buffer(self.buffer)))

    def begin(self, base: int, histories: int) -> None:
        """Forgets all rows: the next one is that of step `base`."""
        self._base, self._histories = base, histories
        self._rows = bytearray()
        self._capacity = 0

    def append(self, rows: bytes, lowest: int) -> None:
        """Adds rows of steps to the table, of which those before `lowest` cannot be any more."""
        if not rows:
            return
        stride = self.row * self._histories
        at, base, kept = len(self._rows), self._base, self._rows + rows
        if len(kept) > self._capacity * stride:
            del kept[: (lowest - base) * stride]
            at, base = 0, lowest
            capacity = max(SLOTS, 2 * len(kept) // stride)
            self.table = make_buffer(self._device, capacity * stride, STORAGE | COPY_DST, "rows of uniforms")
            self._capacity = capacity
        self._rows, self._base = kept, base
        self._device.queue.write_buffer(self.table, at, bytes(kept[at:]))

    def make_room(self, sums: int) -> None:
        """Sees to it that there is room for so many sums."""
        if self.partials is None or self.partials.size < sums * PARTIAL:
            self.partials = make_buffer(self._device, max(sums, 1) * PARTIAL, STORAGE, "sums")

    def call(self, scale: float, sums: int, measures: bool, low: float) -> int:
        """Where the uniform of such a call is, in `slots`."""
        scales = self._scales or LossScale()
        options = (
            _SKIPS * self.drops
            + _CLIPS * (self._max_norm is not None)
            + _SCALES * (self._scales is not None)
            + _PICKS * self.drops
            + _MEASURES * measures
        )
        words = self.row * self._histories // 4
        data = _CALL.pack(
            scale,
            self._base & 0xFFFFFFFF,
            words,
            sums,
            options,
            self._max_norm or 0.0,
            low,
            scales.growth,
            scales.backoff,
            min(scales.interval, 2**32 - 1),
            0,
            0,
        )
        if self._known_in is not self.slots.buffer or data not in self._known:
            byte = self.slots.write(data.ljust(self.slots.stride, b"\0"))
            if self._known_in is not self.slots.buffer:
                self._known, self._known_in = {}, self.slots.buffer
            self._known[data] = byte
        return self._known[data]

    def record(self, pass_: Any, byte: int) -> None:
        """Records the pass that decides."""
        device = Device.of(self._device)
        table = self.table or self._nothing()
        key = self.slots.buffer, self.partials, table
        if self._bound is None or self._bound[0] != key:
            resources = [
                {"buffer": self.slots.buffer, "offset": 0, "size": self.slots.stride},
                *(
                    {"buffer": buffer, "offset": 0, "size": buffer.size}
                    for buffer in (self.buffer, self.partials, table)
                ),
            ]
            entries = [{"binding": i, "resource": resource} for i, resource in enumerate(resources)]
            layout = device.layout(self._device, _KINDS)
            self._bound = key, self._device.create_bind_group(layout=layout, entries=entries)
        pass_.set_pipeline(device.pipeline(self._device, _KINDS, "", (), {}))
        pass_.set_bind_group(0, self._bound[1], (byte,))
        pass_.dispatch_workgroups(1)

    def count(self) -> None:
        """Counts a call that was recorded whole."""
        self.calls = (self.calls + 1) & 0xFFFFFFFF

    def _nothing(self) -> Any:
        self.table = make_buffer(self._device, 16, STORAGE, "no table")
        return self.table

    def others(self) -> Sequence[Any]:
        """What pieces are bound to besides their own."""
        return self.buffer, self.table if self.drops else None, self.partials
