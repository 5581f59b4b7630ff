"""What tests of GPU arrays share: one device, and an optimizer on it beside one on the CPU."""

import os
from contextlib import suppress
from functools import lru_cache

import ml_dtypes
import numpy as np
import pytest

import lookstep as ls

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@lru_cache(maxsize=1)
def device():
    """The device that all tests share; a module of tests is skipped without one, or fails where there must be one."""
    with suppress(ImportError):
        # It brings LLVM, as Mesa does. To import it second, as torch does at any time, ends the process.
        import triton  # noqa: F401
    try:
        return ls.gpu.default_device()
    except (ImportError, RuntimeError) as error:
        if os.environ.get("REQUIRE_GPU_TESTS"):
            raise
        pytest.skip(f"no GPU: {error}", allow_module_level=True)


def is_exact():
    """Whether the adapter is Mesa's software one, which does each operation as the CPU does."""
    return "llvmpipe" in device().adapter.info["device"]


class Pair:
    """One run twice: over NumPy arrays, and over an arena or views of buffers of their own."""

    def __init__(self, rule, shapes, dtype="float32", grads_dtype=None, seed=0, apart=False, gpu=None, **options):
        self.rng = np.random.default_rng(seed)
        self.grads_dtype = DTYPES[grads_dtype or dtype]
        self.cpu = {k: self.rng.standard_normal(shape).astype(DTYPES[dtype]) for k, shape in shapes.items()}
        self.start = {k: v.astype("f8") for k, v in self.cpu.items()}
        self.moved = {k: np.zeros(v.shape) for k, v in self.cpu.items()}
        if apart:
            self.params = {k: view(v, dtype) for k, v in self.cpu.items()}
            self.grads = {
                k: view(np.zeros(v.shape, self.grads_dtype), grads_dtype or dtype) for k, v in self.cpu.items()
            }
        else:
            arena = ls.gpu.Arena(device(), shapes, dtype, grads_dtype=grads_dtype)
            self.params, self.grads = arena.params, arena.grads
        for k, v in self.cpu.items():
            ls.gpu.arrays.write(self.params[k], v)
        self.on_cpu = ls.Optimizer(self.cpu, rule, **options)
        self.on_gpu = ls.Optimizer(self.params, rule, **options, **(gpu or {}))

    def gradients(self):
        return {k: self.rng.standard_normal(v.shape).astype(self.grads_dtype) for k, v in self.cpu.items()}

    def upload(self, grads):
        for k, v in grads.items():
            ls.gpu.arrays.write(self.grads[k], v)

    def step(self, grads=None, missing=(), **keywords):
        grads = self.gradients() if grads is None else grads
        self.upload(grads)
        before = {k: v.astype("f8") for k, v in self.cpu.items()}
        self.on_cpu.step({k: None if k in missing else v for k, v in grads.items()}, **keywords)
        self.on_gpu.step({k: None if k in missing else v for k, v in self.grads.items()}, **keywords)
        with np.errstate(invalid="ignore"):
            for k, v in self.cpu.items():
                self.moved[k] += abs(v.astype("f8") - before[k])

    def download(self):
        return {k: ls.gpu.arrays.read(v) for k, v in self.params.items()}

    def check(self, exact=True):
        """Both have the same parameters: to the bit where the adapter computes as the CPU does."""
        for k, found in self.download().items():
            same(found, self.cpu[k], exact, self.on_cpu.steps + 1, self.moved[k], k)

    def check_state(self):
        """Both have the same state, counters and all."""
        ours, theirs = self.on_gpu.state_dict(), self.on_cpu.state_dict()
        for key in ("steps", "skipped", "cycles", "carry"):
            assert ours[key] == theirs[key], key
        for path, leaf in theirs["leaves"].items():
            assert leaf.keys() == ours["leaves"][path].keys()
            for name, value in leaf.items():
                found = ours["leaves"][path][name]
                if isinstance(value, np.ndarray):
                    same(found, value, True, self.on_cpu.steps + 1, np.abs(value.astype("f8")), f"{name} of {path}")
                else:
                    assert found == value, name


def same(found, wanted, exact, steps, moved, name):
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
    if exact and is_exact():
        # A NaN is any other NaN.
        nan = np.isnan(wanted.astype("f8"))
        assert (np.isnan(found.astype("f8")) == nan).all(), name
        assert found[~nan].tobytes() == wanted[~nan].tobytes(), name
        return
    eps = float(ml_dtypes.finfo(wanted.dtype).eps)
    tolerance = steps * (2 * eps * np.abs(wanted.astype("f8")) + 1e-6 * moved) + 1e-6 * (not exact)
    # Infinities are compared, and a NaN is any other NaN.
    ours, theirs = found.astype("f8"), wanted.astype("f8")
    with np.errstate(invalid="ignore"):
        near = (np.abs(ours - theirs) <= tolerance) | (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    assert near.all(), name


def buffer(nbytes, usage=None):
    """A buffer with the usages that are needed, or others."""
    import wgpu

    flags = wgpu.BufferUsage
    return device().create_buffer(
        size=nbytes, usage=flags.STORAGE | flags.COPY_SRC | flags.COPY_DST if usage is None else usage
    )


def view(array, dtype="float32", offset=0, spare=0):
    """A view of a new buffer with these numbers in it."""
    nbytes = -(-array.nbytes // 4) * 4
    found = ls.gpu.View(buffer(offset + max(nbytes, 4) + spare), dtype, array.shape, offset)
    ls.gpu.arrays.write(found, array)
    return found
