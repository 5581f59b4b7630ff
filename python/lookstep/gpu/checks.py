"""What buffers are refused for, before any call of the GPU: an error at a submission would end the process."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import wgpu

from .arrays import View
from .device import COPY_DST, COPY_SRC, STORAGE, Device, device_of

_USAGES = {STORAGE: "STORAGE", COPY_SRC: "COPY_SRC", COPY_DST: "COPY_DST"}


def check_usage(name: str, view: View, usage: int, why: str) -> None:
    """Refuses a buffer that was made for other uses."""
    for flag, flag_name in _USAGES.items():
        if usage & flag and not view.buffer.usage & flag:
            raise ValueError(f"{name} must be in a buffer with usage {flag_name}, {why}")


def check_unmapped(name: str, view: View) -> None:
    """Refuses a buffer that is mapped, or is about to be."""
    if view.buffer.map_state != "unmapped":
        raise ValueError(f"{name} is in a buffer that is {view.buffer.map_state}: unmap it first")


def check_params(names: Sequence[str], views: Sequence[View]) -> Any:
    """Refuses parameters that shaders cannot step; returns their device."""
    device = device_of(views[0].buffer)
    Device.of(device)  # It is this process's.
    for name, view in zip(names, views, strict=True):
        if device_of(view.buffer) is not device:
            raise ValueError(f"{name} is on another device than {names[0]}")
        check_usage(name, view, STORAGE, "so that shaders can write it")
        check_unmapped(name, view)
    check_apart([(name, view) for name, view in zip(names, views, strict=True)])
    return device


def check_grad(name: str, grad: View, param: View) -> None:
    """Refuses a gradient that does not go with its parameter."""
    if device_of(grad.buffer) is not device_of(param.buffer):
        raise ValueError(f"{name} is on another device than its parameter")
    check_usage(name, grad, STORAGE, "so that shaders can read it")
    check_unmapped(name, grad)
    if grad.shape != param.shape:
        raise ValueError(
            f"{name} has shape {grad.shape} but its parameter has {param.shape}; gradients are not broadcast"
        )


def check_apart(found: Iterable[tuple[str, View]]) -> None:
    """Refuses arrays that share memory, of which the later one is named first."""
    by_buffer: dict[Any, list[tuple[int, int, int, str]]] = {}
    for number, (name, view) in enumerate(found):
        if view.nbytes:
            # Elements of 16 bits are written in pairs.
            end = view.offset + -(-view.nbytes // 4) * 4
            by_buffer.setdefault(view.buffer, []).append((view.offset, end, number, name))
    for ranges in by_buffer.values():
        ranges.sort()
        for (_, end, *one), (start, _, *other) in pairwise(ranges):
            if start < end:
                (_, earlier), (_, later) = sorted([one, other])
                raise ValueError(f"{later} shares memory with {earlier}: give each bytes of its own")


def check_into(into: Any, device: Any) -> None:
    """Refuses what steps cannot be recorded into."""
    if not isinstance(into, wgpu.GPUCommandEncoder | wgpu.GPUComputePassEncoder):
        raise TypeError(
            f"into must be a wgpu.GPUCommandEncoder or a wgpu.GPUComputePassEncoder, got {type(into).__name__}"
        )
    if device_of(into) is not device:
        raise ValueError("into is of another device than params")
