"""The demonstration's network on a GPU: forward, backward and optimizer are compute shaders, and nothing is read back.

What `lookstep.digits` does in NumPy. Needs `pip install "lookstep[demo,gpu]"`.
"""

from collections.abc import Iterable
from importlib.resources import files
from typing import Any

import numpy as np
import wgpu

from ..digits import BATCH, Array, Params
from ..optimizer import Optimizer
from .arrays import Arena

SHADER = files(__package__).joinpath("digits.wgsl")
SLOT = 256
"""Bytes of a minibatch, and of its losses: what offsets of bindings are multiples of on every device."""


class MLP:
    """The network of `lookstep.digits.MLP`, with all its minibatches, in buffers of a device."""

    def __init__(self, device: Any, params: Params, x: Array, y: Array, order: Array) -> None:
        """Uploads all that training needs.

        Args:
            device: a `wgpu.GPUDevice`.
            params: first weights, in the order that the shader binds them.
            x: images, of shape (digits, 64) and dtype float32.
            y: what they show.
            order: the rows of each minibatch, of shape (steps, 32).
        """
        storage, copies = wgpu.BufferUsage.STORAGE, wgpu.BufferUsage.COPY_SRC
        self.device = device
        self.steps = len(order)
        self.arena = Arena(device, {name: param.shape for name, param in params.items()})
        self.arena.upload(params)
        batches = np.concatenate([order, y[order]], axis=1).astype(np.uint32)
        # With zeros: wgpu takes what is written at dynamic offsets for uninitialised, and clears it at the first read.
        self._losses = device.create_buffer_with_data(data=bytes(SLOT * self.steps), usage=storage | copies)
        # Of a digit: outputs of 32 units, gradients in their inputs, and gradients in those of 10 classes.
        data = [
            {"buffer": device.create_buffer_with_data(data=np.ascontiguousarray(x), usage=storage)},
            {"buffer": device.create_buffer_with_data(data=batches, usage=storage), "size": SLOT},
            {"buffer": device.create_buffer(size=4 * BATCH * (32 + 32 + 10), usage=storage)},
            {"buffer": self._losses, "size": SLOT},
        ]

        read, write = "read-only-storage", "storage"
        shared = self._layout([read, read, write, write], dynamic=(1, 3))
        self._data = self._bind(shared, data)
        module = device.create_shader_module(code=SHADER.read_text(encoding="utf-8"))
        self._stages = []
        for name, access, tree, groups in (
            ("forward", read, self.arena.params, BATCH),
            ("gradients", write, self.arena.grads, 64 + 1 + 32 + 1),
        ):
            own = self._layout([access] * len(params))
            pipeline = device.create_compute_pipeline(
                layout=device.create_pipeline_layout(bind_group_layouts=[shared, own]),
                compute={"module": module, "entry_point": name},
            )
            views = [{"buffer": v.buffer, "offset": v.offset, "size": v.nbytes} for v in tree.values()]
            self._stages.append((pipeline, self._bind(own, views), groups))

    def _layout(self, kinds: list[str], dynamic: tuple[int, ...] = ()) -> Any:
        return self.device.create_bind_group_layout(
            entries=[
                {
                    "binding": i,
                    "visibility": wgpu.ShaderStage.COMPUTE,
                    "buffer": {"type": kind, "has_dynamic_offset": i in dynamic},
                }
                for i, kind in enumerate(kinds)
            ]
        )

    def _bind(self, layout: Any, resources: list[dict[str, Any]]) -> Any:
        entries = [{"binding": i, "resource": resource} for i, resource in enumerate(resources)]
        return self.device.create_bind_group(layout=layout, entries=entries)

    def backward(self, work: Any, step: int) -> None:
        """Records a minibatch's gradients, which go to `arena.grads`.

        Args:
            work: a compute pass.
            step: which minibatch.
        """
        for pipeline, own, groups in self._stages:
            work.set_pipeline(pipeline)
            work.set_bind_group(0, self._data, [SLOT * step] * 2)
            work.set_bind_group(1, own)
            work.dispatch_workgroups(groups)

    def losses(self) -> Array:
        """The mean loss of each minibatch when it was trained on: waits for the device."""
        slots = np.frombuffer(self.device.queue.read_buffer(self._losses), np.float32)
        losses: Array = slots.reshape(self.steps, -1)[:, :BATCH].mean(1)
        return losses


def train(mlp: MLP, opt: Optimizer[Any], steps: Iterable[int]) -> None:
    """Trains on some of the minibatches, all in one submission; does not wait for the device."""
    encoder = mlp.device.create_command_encoder()
    work = encoder.begin_compute_pass()
    for step in steps:
        mlp.backward(work, step)
        opt.step(mlp.arena.grads, into=work)
    work.end()
    mlp.device.queue.submit([encoder.finish()])
