"""The demo's second face: its shaders against NumPy, its training against the CPU's, its report."""

import os
import subprocess
import sys

import numpy as np
import pytest

plain = pytest.importorskip("lookstep.digits", reason="the demo's packages are not installed")

import gpu_arrays  # noqa: E402

DEVICE = gpu_arrays.device()

from lookstep.gpu import demo, digits  # noqa: E402
from lookstep.gpu.arrays import read  # noqa: E402


@pytest.fixture(scope="module")
def task():
    return demo.Task.make(seed=5, epochs=2)


@pytest.fixture
def networks(task):
    """The network in NumPy and on the device, with biases that are not zero."""
    mlp = task.network()
    rng = np.random.default_rng(1)
    for name in ("b1", "b2"):
        mlp.params[name][...] = rng.normal(size=mlp.params[name].shape)
    return mlp, digits.MLP(DEVICE, mlp.params, task.digits.x, task.digits.y, task.order)


def backward(mlp, step):
    encoder = mlp.device.create_command_encoder()
    work = encoder.begin_compute_pass()
    mlp.backward(work, step)
    work.end()
    mlp.device.queue.submit([encoder.finish()])
    return {name: read(view) for name, view in mlp.arena.grads.items()}


@pytest.mark.parametrize("step", [0, 7, 83])
def test_gradients_and_losses_are_those_of_numpy(networks, task, step):
    mlp, gpu = networks
    x, y = task.digits.x[task.order[step]], task.digits.y[task.order[step]]
    want, got = mlp.backward(x, y), backward(gpu, step)
    assert want.keys() == got.keys()
    for name in want:
        # Sums of 32 terms, of which each side rounds every one.
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=32 * 2**-24 * np.abs(want[name]).max())
    assert gpu.losses()[step] == pytest.approx(plain.evaluate(mlp.params, x, y)[0], rel=1e-6)


def test_gradients_have_the_same_bits_in_each_run(networks):
    _, gpu = networks
    first = backward(gpu, 3)
    for _ in range(5):
        again = backward(gpu, 3)
        assert all(first[name].tobytes() == again[name].tobytes() for name in first)


@pytest.mark.parametrize("family", plain.FAMILIES, ids=lambda family: family.name)
def test_training_is_that_of_numpy(task, family):
    rule = demo.Lookahead(family.rule(family.right), sync_period=demo.SYNC_PERIOD, slow_step=demo.SLOW_STEP)
    numpy, gpu = demo.train_in_numpy(task, rule), demo.train_on_gpu(task, rule, DEVICE)
    np.testing.assert_allclose(gpu.losses[:20], numpy.losses[:20], rtol=1e-4)
    np.testing.assert_allclose(gpu.losses, numpy.losses, rtol=0.02, atol=0.002)
    assert gpu.fast == pytest.approx(numpy.fast, abs=0.01)
    assert gpu.slow == pytest.approx(numpy.slow, abs=0.01)
    assert gpu.losses[-10:].mean() < 0.8 * gpu.losses[:10].mean()


def test_the_demo_on_a_gpu_writes_a_report(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "lookstep", "demo", "--gpu", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert DEVICE.adapter_info["device"] in done.stdout
    page = (tmp_path / "gpu.html").read_text(encoding="utf-8")
    assert 'src="gpu.png"' in page
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    assert "nan" not in page
    assert "{" not in page.partition("</style>")[2]


@pytest.mark.skipif(sys.platform != "linux", reason="names a back end that Linux does not have")
def test_the_demo_says_that_there_is_no_adapter(tmp_path):
    command = [sys.executable, "-m", "lookstep", "demo", "--gpu", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"WGPU_BACKEND_TYPE": "D3D12"})
    assert done.returncode == 1
    assert "mesa-vulkan-drivers" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_demo_names_wgpu_where_it_is_not_installed():
    code = "import sys; sys.modules['wgpu'] = None; from lookstep.__main__ import main; main(['demo', '--gpu'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert 'pip install "lookstep[demo,gpu]"' in done.stderr
