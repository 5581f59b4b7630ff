"""Uniforms that are written once: a recorded step reads what it was recorded with, whenever it is submitted."""

from typing import Any

from .device import COPY_DST, UNIFORM, Device, make_buffer

SLOTS = 256


class Slots:
    """Slots of a uniform buffer, taken one after the other; when all are taken, a new buffer takes the old one's place.

    Args:
        device: a `wgpu.GPUDevice`.
        nbytes: of a slot.
    """

    def __init__(self, device: Any, nbytes: int) -> None:
        """Makes no buffer yet."""
        align = max(256, Device.of(device).uniform_align)
        self.stride = -(-nbytes // align) * align
        self.buffer: Any = None
        self._device = device
        self._count = 0
        self._next = 0

    def write(self, data: bytes) -> int:
        """Writes slots; returns the byte of the first."""
        count = len(data) // self.stride
        if self.buffer is None or self._next + count > self._count:
            self._count, self._next = max(SLOTS, count), 0
            nbytes = self._count * self.stride
            self.buffer = make_buffer(self._device, nbytes, UNIFORM | COPY_DST, "what a step needs to know")
        byte = self._next * self.stride
        self._device.queue.write_buffer(self.buffer, byte, data)
        self._next += count
        return byte

    def give_back(self, count: int) -> None:
        """Takes back the last slots that were written, of which none was recorded."""
        self._next -= count
