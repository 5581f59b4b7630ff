"""Any number of threads gives the same bits; they come late, sleep when idle, and survive forks."""

import ctypes
import hashlib
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import lookstep as ls

BIG = 1 << 19
TASKS = Path("/proc/self/task")

linux = pytest.mark.skipif(not TASKS.exists(), reason="threads are counted as Linux does")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def leaves(dtype="f4"):
    """One tensor that is cut, many that are put together, empty ones, and some that are not contiguous."""
    rng = np.random.default_rng(0)
    shapes = [(BIG + 77,), *[(37, 5)] * 300, (0,), (), (1 << 14,), ((1 << 14) + 1,), (600, 700)]
    all_leaves = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    all_leaves[-1] = all_leaves[-1].T
    all_leaves.append(rng.standard_normal((400, 800)).astype(dtype)[:, ::2])
    return all_leaves


def digest(opt):
    state = opt.state_dict()
    all_bytes = hashlib.sha256()
    for leaf in state["leaves"].values():
        for key in sorted(leaf):
            all_bytes.update(np.ascontiguousarray(leaf[key]).tobytes())
    all_bytes.update(repr(opt.grad_norm).encode())
    return all_bytes.hexdigest()


def run(threads, rule, steps=4, dtype="f4", **options):
    params, grads = leaves(dtype), leaves(dtype)
    opt = ls.Optimizer(params, rule, threads=threads, **options)
    for _ in range(steps):
        opt.step(grads)
    return digest(opt)


CASES = {
    "lookahead": (ls.Lookahead(ls.RAdam(lr=0.1), sync_period=3), {}),
    "clipped": (ls.AdamW(lr=0.1), {"max_grad_norm": 1.0}),
    "lamb": (ls.LAMB(lr=0.1), {}),
    "prodigy": (ls.Prodigy(lr=1.0), {}),
    "optimal": (ls.Lookahead(ls.SGD(lr=0.1), sync_period=2, slow_step=ls.OptimalSlowStep(0.1)), {}),
    "centralized": (ls.SGD(lr=0.1), {"centralize": -1}),
    "bfloat16 state": (ls.Adam(lr=0.1), {"state_dtype": "bfloat16"}),
    "int8 state": (ls.Adam(lr=0.1), {"state_dtype": "int8"}),
    "bfloat16": (ls.Adam(lr=0.1), {"dtype": ml_dtypes.bfloat16, "master_weights": True}),
    "float16": (ls.Lookahead(ls.Adam(lr=0.1), sync_period=2), {"dtype": "f2"}),
    "float64": (ls.Lookahead(ls.AdamW(lr=0.1), inner_state="pullback", sync_period=2), {"dtype": "f8"}),
}


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_threads_gives_the_same_bits(case):
    rule, options = CASES[case]
    alone = run(1, rule, **options)
    assert all(run(threads, rule, **options) == alone for threads in (2, 3, 8))


def test_slow_weights_are_those_of_one_thread():
    def slow(threads):
        params, grads = leaves(), leaves()
        opt = ls.Optimizer(params, ls.Lookahead(ls.SGD(lr=0.1)), threads=threads)
        opt.step(grads)
        with opt.slow_weights():
            return [p.copy() for p in params], params, opt

    (inside, params, opt), (alone, _, _) = slow(4), slow(1)
    assert all(map(np.array_equal, inside, alone))
    assert all((p == s - np.float32(0.1) * g).all() for p, s, g in zip(params, opt.slow, leaves(), strict=True))


def test_a_run_goes_on_with_other_threads(tmp_path):
    rule = ls.Lookahead(ls.Adam(lr=0.1), sync_period=5)
    straight = run(1, rule, steps=7)
    params, grads = leaves(), leaves()
    opt = ls.Optimizer(params, rule, threads=4)
    for _ in range(3):
        opt.step(grads)
    opt.save(tmp_path / "run.safetensors")
    opt = ls.Optimizer.load(tmp_path / "run.safetensors", leaves(), threads=2)
    for _ in range(4):
        opt.step(grads)
    assert digest(opt) == straight


@pytest.mark.parametrize("value", [0, -1])
def test_threads_are_one_or_more(value):
    with pytest.raises(ValueError, match="threads must be an integer >= 1"):
        ls.Optimizer(np.zeros(3), ls.SGD(lr=0.1), threads=value)


@pytest.mark.parametrize("value", ["2", 1.5, True])
def test_threads_are_an_integer(value):
    with pytest.raises(TypeError, match="threads must be an integer >= 1"):
        ls.Optimizer(np.zeros(3), ls.SGD(lr=0.1), threads=value)


COUNT = f"""
import os
import platform
import numpy as np, lookstep as ls
count = lambda: len(os.listdir("{TASKS}"))
before = count()
opt = ls.Optimizer(np.zeros({BIG}), ls.SGD(lr=0.1), threads=THREADS)
small = ls.Optimizer(np.zeros(100_000), ls.SGD(lr=0.1), threads=THREADS)
small.step(np.ones(100_000))
assert count() == before, "no thread before a step needs one"
opt.step(np.ones({BIG}))
print(count() - before)
"""


def threads_started(threads="None", **environment):
    command = [sys.executable, "-c", COUNT.replace("THREADS", threads)]
    environment = {key: value for key, value in os.environ.items() if key != "LOOKSTEP_NUM_THREADS"} | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else done.stderr


@linux
def test_threads_are_as_many_as_the_argument_or_the_variable_says():
    assert threads_started("3") == 2
    assert threads_started("1") == 0
    assert threads_started(LOOKSTEP_NUM_THREADS="4") == 3
    assert threads_started("2", LOOKSTEP_NUM_THREADS="4") == 1
    for wrong in ("0", "many", "-2", "1.5"):
        assert "ValueError: LOOKSTEP_NUM_THREADS must be an integer >= 1" in threads_started(LOOKSTEP_NUM_THREADS=wrong)


@linux
def test_threads_are_no_more_than_the_cpus_that_the_process_may_use():
    cpus = os.sched_getaffinity(0)
    assert 0 <= threads_started() < len(cpus)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        assert threads_started() == 0
    finally:
        os.sched_setaffinity(0, cpus)


def test_nothing_spins_when_idle():
    run(4, ls.SGD(lr=0.1))
    time.sleep(0.05)
    start = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - start < 0.1


def test_optimizers_in_several_threads_share_the_pool():
    expected, digests = run(1, ls.Adam(lr=0.1)), []
    threads = [threading.Thread(target=lambda: digests.append(run(3, ls.Adam(lr=0.1)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert digests == [expected] * 4


RESIZED = f"""
import threading, time
import numpy as np, lookstep as ls
p, g = np.zeros({32 * BIG}, "f4"), np.ones({32 * BIG}, "f4")
opt = ls.Optimizer(p, ls.Adam(), threads=1)
thread = threading.Thread(target=lambda: opt.step(g))
thread.start()
while thread.is_alive():
    try:
        g.resize(16, refcheck=False)
    except ValueError:
        time.sleep(0.001)
thread.join()
print(opt.steps)
"""


def test_a_gradient_cannot_be_taken_away_while_it_is_read():
    """It was a crash: another thread may resize it as soon as the interpreter lock is released."""
    done = subprocess.run([sys.executable, "-c", RESIZED], capture_output=True, text=True)
    # Either the resize came first, and the gradient has another shape; or it is refused as long as the step takes.
    assert done.returncode == 0
    assert done.stdout.strip() in ("0", "1")
    assert done.stdout.strip() == "1" or "grads has shape (16,)" in done.stderr


def step_on(opt, grads, queue):
    opt.step(grads)
    queue.put(digest(opt))


@forks
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_goes_on_with_threads_of_its_own():
    """Its parent's are not there; neither are its own in its children."""
    params, grads = leaves(), leaves()
    opt = ls.Optimizer(params, ls.Adam(lr=0.1), threads=2)
    opt.step(grads)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def child():
        step_on(opt, grads, queue)
        grandchild = context.Process(target=step_on, args=(opt, grads, queue))
        grandchild.start()
        grandchild.join()

    process = context.Process(target=child)
    process.start()
    seen = [queue.get(timeout=60) for _ in range(2)]
    process.join(timeout=60)
    assert process.exitcode == 0
    assert seen == [run(1, ls.Adam(lr=0.1), steps=steps) for steps in (2, 3)]
    opt.step(grads)
    assert digest(opt) == seen[0], "the parent goes on too"


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_an_optimizer_goes_to_another_process(method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    params, grads = leaves(), leaves()
    opt = ls.Optimizer(params, ls.Adam(lr=0.1), threads=2)
    opt.step(grads)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=step_on, args=(opt, grads, queue))
    process.start()
    seen = queue.get(timeout=120)
    process.join(timeout=60)
    assert seen == run(1, ls.Adam(lr=0.1), steps=2)


UPWARD = {"x86_64": 0x800, "AMD64": 0x800, "aarch64": 0x400000}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library is glibc's")
@pytest.mark.skipif(platform.machine() not in UPWARD, reason="its rounding modes are not known here")
@pytest.mark.parametrize("threads", [1, 3])
def test_the_callers_rounding_mode_is_not_the_steps_and_stays_its_own(threads):
    libm = ctypes.CDLL("libm.so.6")
    expected = run(1, ls.Lookahead(ls.AdamW(lr=0.1), sync_period=2))
    params, grads = leaves(), leaves()
    opt = ls.Optimizer(params, ls.Lookahead(ls.AdamW(lr=0.1), sync_period=2), threads=threads)
    upward, nearest = UPWARD[platform.machine()], libm.fegetround()
    modes = []
    for _ in range(4):
        try:
            libm.fesetround(upward)
            opt.step(grads)
            modes.append(libm.fegetround())
        finally:
            libm.fesetround(nearest)
    assert (digest(opt), modes) == (expected, [upward] * 4)
