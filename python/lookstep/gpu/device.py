"""Devices: finding one, and what each is asked once."""

import os
from typing import Any

import wgpu

from .._core import decide, shader

STORAGE = wgpu.BufferUsage.STORAGE
COPY_SRC = wgpu.BufferUsage.COPY_SRC
COPY_DST = wgpu.BufferUsage.COPY_DST
UNIFORM = wgpu.BufferUsage.UNIFORM

_OURS = "_lookstep_device"
"""Where a device of wgpu keeps what we made for it: so both go at once."""


def default_device() -> Any:
    """A `wgpu.GPUDevice` on the fastest adapter, with no feature and no limit asked for.

    Any device of wgpu will do: this is for programs that have none yet.

    Raises:
        RuntimeError: if there is no adapter.

    Example:
        >>> import lookstep as ls
        >>> device = ls.gpu.default_device()
        >>> device.create_command_encoder() is None
        False
    """
    try:
        adapter = wgpu.gpu.request_adapter_sync(power_preference="high-performance")
    except RuntimeError as error:
        raise RuntimeError(_NO_ADAPTER) from error
    if adapter is None:
        raise RuntimeError(_NO_ADAPTER)
    return adapter.request_device_sync()


_NO_ADAPTER = (
    "there is no GPU adapter: install your GPU's Vulkan, Metal or DirectX 12 driver, or Mesa's software Vulkan "
    "(apt install mesa-vulkan-drivers)"
)


class Device:
    """What is made once for each device of wgpu: its limits, layouts and pipelines.

    Args:
        device: a `wgpu.GPUDevice`.
    """

    def __init__(self, device: Any) -> None:
        """Reads the limits."""
        self._process = os.getpid()
        limits = device.limits
        self.binding = int(limits["max-storage-buffer-binding-size"])
        self.buffer = int(limits["max-buffer-size"])
        self.groups = int(limits["max-compute-workgroups-per-dimension"])
        self.storage_align = int(limits["min-storage-buffer-offset-alignment"])
        self.uniform_align = int(limits["min-uniform-buffer-offset-alignment"])
        self._layouts: dict[Any, tuple[Any, Any]] = {}
        self._pipelines: dict[Any, Any] = {}

    @classmethod
    def of(cls, device: Any) -> "Device":
        """The one of a device.

        Raises:
            RuntimeError: in a forked child of the process that it was made in.
        """
        found: Device | None = getattr(device, _OURS, None)
        if found is None:
            found = cls(device)
            setattr(device, _OURS, found)
        if found._process != os.getpid():
            raise RuntimeError("this GPU device belongs to the process that was forked: make another one here")
        return found

    def layout(self, device: Any, kinds: tuple[str, ...]) -> Any:
        """The layout of a bind group, of kinds such as "uniform" by binding; "" is none."""
        return self._layout(device, kinds)[0]

    def _layout(self, device: Any, kinds: tuple[str, ...]) -> tuple[Any, Any]:
        if kinds not in self._layouts:
            entries = [
                {
                    "binding": binding,
                    "visibility": wgpu.ShaderStage.COMPUTE,
                    "buffer": {"type": kind.removesuffix("*"), "has_dynamic_offset": kind.endswith("*")},
                }
                for binding, kind in enumerate(kinds)
                if kind
            ]
            group = device.create_bind_group_layout(entries=entries)
            self._layouts[kinds] = group, device.create_pipeline_layout(bind_group_layouts=[group])
        return self._layouts[kinds]

    def pipeline(self, device: Any, kinds: tuple[str, ...], kernel: str, cycles: Any, form: dict[str, Any]) -> Any:
        """The pipeline of a shader; `kernel` is empty for the one that decides."""
        key = kinds, kernel, str(cycles), tuple(form.items())
        if key not in self._pipelines:
            text = shader(kernel, cycles, form) if kernel else decide()
            module = device.create_shader_module(code=text)
            layout = self._layout(device, kinds)[1]
            compute = {"module": module, "entry_point": "main"}
            self._pipelines[key] = device.create_compute_pipeline(layout=layout, compute=compute)
        return self._pipelines[key]


def device_of(resource: Any) -> Any:
    """The device that a buffer or an encoder belongs to; wgpu has no public name for it."""
    return resource._device


def make_buffer(device: Any, size: int, usage: int, what: str) -> Any:
    """A new buffer of zeroes.

    Raises:
        MemoryError: if the device has no room for it, naming what it is for.
    """
    try:
        return device.create_buffer(size=size, usage=usage)
    except wgpu.GPUOutOfMemoryError as error:
        raise MemoryError(f"the GPU has no {size} bytes for {what}") from error
