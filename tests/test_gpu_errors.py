"""What is refused on the GPU is refused before any call of it, and leaves everything as it was."""

import os
import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest

import lookstep as ls
from gpu_arrays import Pair, buffer, device, view

device()
wgpu = pytest.importorskip("wgpu")
USAGE = wgpu.BufferUsage
SHAPES = {"w": (4, 2), "b": (3,)}


def ones(*shape):
    return np.ones(shape, "f4")


def digest(pair):
    state = pair.on_gpu.state_dict()
    arrays = [x for leaf in state["leaves"].values() for x in leaf.values() if isinstance(x, np.ndarray)]
    counters = {key: value for key, value in state.items() if key != "leaves"}
    grads = [ls.gpu.arrays.read(g) for g in pair.grads.values()]
    return sha256(b"".join(x.tobytes() for x in [*arrays, *grads]) + repr(counters).encode()).hexdigest()


def refused(pair, error, match, **changed):
    """A step with other gradients is refused, and leaves everything as it was."""
    before = digest(pair)
    with pytest.raises(error, match=match):
        pair.on_gpu.step({**pair.grads, **changed})
    assert digest(pair) == before
    pair.step()
    pair.check()


@pytest.fixture
def pair():
    found = Pair(ls.Lookahead(ls.Adam(lr=0.1), 3), SHAPES)
    found.step()
    return found


def test_a_parameter_needs_storage():
    other = buffer(64, USAGE.COPY_SRC | USAGE.COPY_DST)
    with pytest.raises(ValueError, match=r'params\["w"\] must be in a buffer with usage STORAGE'):
        ls.Optimizer({"w": other}, ls.SGD())


def test_what_is_saved_needs_copies():
    opt = ls.Optimizer({"w": buffer(64, USAGE.STORAGE)}, ls.Lookahead(ls.SGD()))
    opt.step({"w": buffer(64)})
    with pytest.raises(ValueError, match=r'params\["w"\] must be in a buffer with usage COPY_SRC'):
        opt.state_dict()
    other = ls.Optimizer({"w": buffer(64)}, ls.Lookahead(ls.SGD()))
    with pytest.raises(ValueError, match=r'params\["w"\] must be in a buffer with usage COPY_DST'):
        opt.load_state_dict(other.state_dict())


def test_a_gradient_needs_storage(pair):
    other = ls.gpu.View(buffer(64, USAGE.COPY_DST), "float32", (3,))
    refused(pair, ValueError, r'grads\["b"\] must be in a buffer with usage STORAGE', b=other)


def test_a_buffer_must_not_be_mapped():
    mapped = device().create_buffer(size=64, usage=USAGE.STORAGE, mapped_at_creation=True)
    with pytest.raises(ValueError, match=r'params\["w"\] is in a buffer that is mapped: unmap it'):
        ls.Optimizer({"w": mapped}, ls.SGD())
    opt = ls.Optimizer({"w": buffer(64)}, ls.SGD())
    with pytest.raises(ValueError, match=r'grads\["w"\] is in a buffer that is mapped'):
        opt.step({"w": mapped})
    mapped.unmap()
    opt.step({"w": mapped})


def test_arrays_must_be_on_one_device(pair):
    other = device().adapter.request_device_sync()
    elsewhere = other.create_buffer(size=64, usage=USAGE.STORAGE | USAGE.COPY_SRC | USAGE.COPY_DST)
    refused(pair, ValueError, r'grads\["b"\] is on another device', b=ls.gpu.View(elsewhere, "float32", (3,)))
    with pytest.raises(ValueError, match=r'params\["b"\] is on another device than params\["a"\]'):
        ls.Optimizer({"a": buffer(64), "b": elsewhere}, ls.SGD())
    before = digest(pair)
    with pytest.raises(ValueError, match="into is of another device"):
        pair.on_gpu.step(pair.grads, into=other.create_command_encoder())
    assert digest(pair) == before


def test_a_view_lies_within_its_buffer_at_a_multiple_of_4():
    with pytest.raises(ValueError, match=r"float32 of shape \(20,\) from byte 0 on needs 80 bytes"):
        ls.gpu.View(buffer(64), "float32", (20,))
    with pytest.raises(ValueError, match="multiple of 4 bytes"):
        ls.gpu.View(buffer(64), "float16", (2,), offset=2)
    with pytest.raises(TypeError, match=r"must be a wgpu\.GPUBuffer, got ndarray"):
        ls.gpu.View(ones(3), "float32", (3,))
    with pytest.raises(TypeError, match="shape must be"):
        ls.gpu.View(buffer(64), "float32", 1.5)
    with pytest.raises(AttributeError, match="read-only"):
        ls.gpu.View(buffer(64), "float32", (3,)).offset = 8


@pytest.mark.parametrize("dtype", ["float64", "int32", "complex64", ">f4"])
def test_other_formats_are_refused(dtype):
    with pytest.raises(TypeError, match="dtype must be one of float32, float16, bfloat16"):
        ls.gpu.View(buffer(64), dtype, (2,))


def test_arrays_must_not_overlap(pair):
    one = buffer(64)
    a, b = ls.gpu.View(one, "float32", (4,)), ls.gpu.View(one, "float32", (4,), 12)
    with pytest.raises(ValueError, match=r'params\["b"\] shares memory with params\["a"\]'):
        ls.Optimizer({"a": a, "b": b}, ls.SGD())
    with pytest.raises(ValueError, match=r"shares memory"):
        ls.Optimizer([one, one], ls.SGD())
    refused(pair, ValueError, r'grads\["b"\] shares memory with params\["b"\]', b=pair.params["b"])


def test_gradients_are_not_broadcast(pair):
    refused(pair, ValueError, r'grads\["w"\] has shape \(2, 4\) but its parameter has \(4, 2\)', w=view(ones(2, 4)))
    refused(pair, ValueError, r'grads\["b"\] has shape \(4,\)', b=view(ones(4)))
    refused(pair, TypeError, r'grads\["b"\] must be a wgpu.GPUBuffer or a lookstep.gpu.View', b=ones(3))


def test_arrays_of_both_kinds_do_not_mix():
    with pytest.raises(TypeError, match=r'params\["b"\] must be a wgpu.GPUBuffer'):
        ls.Optimizer({"a": buffer(64), "b": ones(3)}, ls.SGD())
    with pytest.raises(TypeError, match=r'params\["b"\] must be a NumPy array|grads'):
        ls.Optimizer({"b": ones(3)}, ls.SGD()).step({"b": buffer(12)})


@pytest.mark.parametrize("rule", [ls.LAMB(), ls.LARS(), ls.Prodigy()])
def test_rules_that_add_up_over_leaves_are_refused(rule):
    with pytest.raises(ValueError, match=r"adds up over whole leaves.*NumPy arrays"):
        ls.Optimizer(buffer(64), rule)


def test_options_of_the_cpu_are_refused():
    with pytest.raises(ValueError, match=r'would have to wait for the GPU.*"skip"'):
        ls.Optimizer(buffer(64), ls.SGD(), nonfinite="raise")
    with pytest.raises(ValueError, match="state_dtype is for NumPy arrays"):
        ls.Optimizer(buffer(64), ls.Adam(), state_dtype="int8")
    with pytest.raises(ValueError, match="centralize is for NumPy arrays"):
        ls.Optimizer(buffer(64), ls.Adam(), centralize=0)
    with pytest.raises(TypeError, match=r"loss_scale must be a lookstep\.gpu\.LossScale, got float"):
        ls.Optimizer(buffer(64), ls.Adam(), loss_scale=2.0)


def test_options_of_the_gpu_are_refused_on_the_cpu():
    opt = ls.Optimizer(ones(3), ls.SGD())
    with pytest.raises(ValueError, match="for GPU arrays"):
        opt.step(ones(3), zero_grads=True)
    with pytest.raises(ValueError, match="for GPU arrays"):
        opt.step(ones(3), into=device().create_command_encoder())
    with pytest.raises(ValueError, match="loss_scale is for GPU arrays"):
        ls.Optimizer(ones(3), ls.SGD(), loss_scale=ls.gpu.LossScale())
    with pytest.raises(TypeError, match="read_stats is for GPU arrays"):
        opt.read_stats()


def test_steps_are_recorded_into_encoders_alone(pair):
    before = digest(pair)
    with pytest.raises(
        TypeError, match=r"into must be a wgpu\.GPUCommandEncoder or a wgpu\.GPUComputePassEncoder, got str"
    ):
        pair.on_gpu.step(pair.grads, into="encoder")
    with pytest.raises(TypeError, match="zero_grads must be True or False"):
        pair.on_gpu.step(pair.grads, zero_grads=1)
    for scale in (1e-42, 1e39, -1.0, float("nan")):
        with pytest.raises(ValueError, match="scale must be"):
            pair.on_gpu.step(pair.grads, scale=scale)
    assert digest(pair) == before


def test_a_bad_schedule_moves_nothing():
    pair = Pair(ls.SGD(lr=lambda step: 0.1 if step < 2 else -1.0), SHAPES)
    pair.step()
    pair.step()
    before = [x.tobytes() for x in pair.download().values()]
    with pytest.raises(ValueError, match="at step 2"):
        pair.on_gpu.step(pair.grads)
    assert [x.tobytes() for x in pair.download().values()] == before
    assert pair.on_gpu.steps == 2


def test_hyper_parameters_that_overflow_are_refused():
    with pytest.raises(ValueError, match="too large for float32"):
        ls.Optimizer(buffer(64), ls.SGD(lr=1e39))


def test_buffers_are_not_copied_along(pair):
    import copy
    import pickle

    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            copied(pair.on_gpu)


def test_memory_that_is_not_there_is_an_error():
    limit = device().limits["max-buffer-size"]
    with pytest.raises(ValueError, match="more than a buffer of this device may hold"):
        ls.gpu.Arena(device(), (limit,))


def test_memory_that_runs_out_is_a_memory_error():
    class Full:
        def create_buffer(self, **_):
            raise wgpu.GPUOutOfMemoryError("no")

    with pytest.raises(MemoryError, match="the GPU has no 8 bytes for the optimizer's state"):
        ls.gpu.device.make_buffer(Full(), 8, 0, "the optimizer's state")


def run(script, **environment):
    """Runs a script in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_importing_the_package_imports_no_wgpu():
    assert run("import sys, lookstep; print('wgpu' in sys.modules, 'lookstep.gpu' in sys.modules)") == "False False\n"


def test_without_wgpu_the_error_says_what_to_install():
    script = """
import sys
sys.modules["wgpu"] = None
import lookstep as ls
try:
    ls.gpu
except ImportError as error:
    print(error)
"""
    assert run(script) == 'GPU arrays need wgpu: pip install "lookstep[gpu]"\n'


def test_without_an_adapter_the_error_says_what_to_install():
    script = """
import lookstep as ls
try:
    ls.gpu.default_device()
except RuntimeError as error:
    print(error)
"""
    found = run(script, VK_ICD_FILENAMES="/nowhere", VK_DRIVER_FILES="/nowhere", WGPU_BACKEND_TYPE="Vulkan")
    assert "mesa-vulkan-drivers" in found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_is_refused():
    script = """
import os
import numpy as np
import lookstep as ls
arena = ls.gpu.Arena(ls.gpu.default_device(), (3,))
opt = ls.Optimizer(arena.params, ls.SGD())
opt.step(arena.grads)
child = os.fork()
if child == 0:
    calls = lambda: opt.step(arena.grads), opt.read_stats, arena.download, lambda: ls.Optimizer(arena.params, ls.SGD())
    for call in calls:
        try:
            call()
        except RuntimeError as error:
            print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
opt.step(arena.grads)
print(opt.steps)
"""
    optimizer = "this optimizer's GPU belongs to the process that was forked: build another one here\n"
    device = "this GPU device belongs to the process that was forked: make another one here\n"
    assert run(script) == 2 * optimizer + 2 * device + "2\n"


def test_a_map_that_is_pending_is_refused_and_not_waited_for():
    script = """
import wgpu
import lookstep as ls
device = ls.gpu.default_device()


arena = ls.gpu.Arena(device, (3,))
opt = ls.Optimizer(arena.params, ls.SGD())
opt.step(arena.grads)
arena.grads.buffer._map_state = "pending"
try:
    opt.step(arena.grads)
except ValueError as error:
    print(error)
print(opt.steps)
"""
    assert run(script) == "grads is in a buffer that is pending: unmap it first\n1\n"
