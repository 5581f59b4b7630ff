"""GPU arrays: the same rules give the same bits as on the CPU."""

import numpy as np
import pytest

import lookstep as ls
from cases import CASES
from gpu_arrays import DTYPES, Pair, buffer, device, view
from lookstep.schedules import Linear

device()

SHAPES = {"w": (37, 5), "b": (64,), "c": (3,)}
SUMMED = ls.LAMB, ls.LARS, ls.Prodigy
ELEMENTWISE = {name: case for name, case in CASES.items() if not isinstance(case.rule, SUMMED)}
every_rule = pytest.mark.parametrize("rule", [case.rule for case in ELEMENTWISE.values()], ids=ELEMENTWISE.keys())
CYCLES = {
    "keep": lambda rule: ls.Lookahead(rule, 3),
    "every-step": lambda rule: ls.Lookahead(rule, 1, 0.3),
    "reset": lambda rule: ls.Lookahead(rule, 2, inner_state="reset"),
    "pullback": lambda rule: ls.Lookahead(rule, 2, 0.2, inner_state="pullback", outer=ls.HeavyBall(0.5)),
    "nested": lambda rule: ls.Lookahead(ls.Lookahead(rule, 2, outer=ls.Nesterov(0.9)), 2, 0.7, inner_state="pullback"),
}


@every_rule
def test_every_rule_steps_as_on_the_cpu(rule):
    pair = Pair(rule, SHAPES)
    for _ in range(6):
        pair.step()
        pair.check()
    pair.check_state()


@every_rule
def test_every_rule_syncs_as_on_the_cpu(rule):
    # One of them in turn, so that each rule has one and each has many rules.
    number = list(ELEMENTWISE).index(next(name for name, case in ELEMENTWISE.items() if case.rule is rule))
    cycles = list(CYCLES.values())[number % len(CYCLES)]
    pair = Pair(cycles(rule), SHAPES)
    for _ in range(9):
        pair.step()
        pair.check()
    pair.check_state()


@pytest.mark.parametrize("cycles", CYCLES.values(), ids=CYCLES.keys())
@pytest.mark.parametrize("rule", [ls.AdamW(lr=0.1), ls.ScheduleFreeAdamW(lr=0.1)], ids=["adamw", "schedule-free"])
def test_every_kind_of_cycle_syncs_as_on_the_cpu(cycles, rule):
    pair = Pair(cycles(rule), SHAPES)
    for i in range(14):
        pair.step()
        pair.check()
        if i == 8:
            pair.on_cpu.sync()
            pair.on_gpu.sync()
            pair.check()
    pair.check_state()
    assert (pair.on_gpu.steps, pair.on_gpu.syncs) == (pair.on_cpu.steps, pair.on_cpu.syncs)


@pytest.mark.parametrize("slow_step", [0.0, 0.2, 0.5, 0.8, 1 - 1e-12, 1.0])
def test_every_slow_step_is_the_cpus(slow_step):
    pair = Pair(ls.Lookahead(ls.SGD(lr=0.1), 1, slow_step), SHAPES)
    for _ in range(3):
        pair.step()
        pair.check()


@pytest.mark.parametrize("master_weights", [False, True], ids=["", "master"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grads_dtype", DTYPES)
def test_formats_of_16_bits_are_the_cpus(dtype, grads_dtype, master_weights):
    rule = ls.Lookahead(ls.ScheduleFreeSGD(lr=0.01), 3, inner_state="pullback")
    pair = Pair(rule, SHAPES, dtype, grads_dtype, master_weights=master_weights)
    for i in range(7):
        pair.step()
        pair.check()
        if i == 3:
            # Somebody writes a parameter: what is kept of it in full becomes that.
            pair.cpu["b"][5] = 3.0
            ls.gpu.arrays.write(pair.params["b"], pair.cpu["b"])
    pair.check_state()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_16_bits_is_read_and_rounded_as_on_the_cpu(dtype):
    number = DTYPES[dtype]
    shapes = {"w": (1 << 16,)}
    pair = Pair(ls.SGD(lr=1.0), shapes, dtype, "float32")
    bits = np.arange(1 << 16, dtype=np.uint16)
    start = bits.view(number) if dtype != "float32" else bits.astype("f4")
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(start.astype("f8"))
    pair.cpu["w"][...] = np.where(finite, start, number(0))
    ls.gpu.arrays.write(pair.params["w"], pair.cpu["w"])
    rng = np.random.default_rng(0)
    for scale in (1e-3, 1e-6, 1.0):
        # Around what halves the last digit, ties among them.
        digits = np.abs(pair.cpu["w"].astype("f4")) * np.float32(2.0**-9)
        grads = {"w": (digits * rng.choice([0.5, 1.0, 1.5, scale], 1 << 16)).astype("f4")}
        pair.step(grads)
        pair.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 63, 64, 65, 129])
def test_any_size_and_offset_is_stepped_and_nothing_beside_it(size, dtype):
    number = DTYPES[dtype]
    rng = np.random.default_rng(size)
    for offset in (0, 4, 256, 300):
        numbers = rng.standard_normal(size).astype(number)
        around = np.arange(150, dtype=np.uint32) + 7
        holder = buffer(600 + 2 * size + 2 * size % 4 + offset)
        device().queue.write_buffer(holder, 0, around)
        # An odd number of 16 bits is beside half a word that is somebody else's.
        p = ls.gpu.View(holder, dtype, (size,), offset)
        ls.gpu.arrays.write(p, numbers)
        before = bytes(device().queue.read_buffer(holder))
        g = rng.standard_normal(size).astype(number)
        grad = view(g, dtype, offset=offset % 256)
        opt = ls.Optimizer({"p": p}, ls.Lookahead(ls.Adam(lr=0.1), 2))
        cpu = numbers.copy()
        ref = ls.Optimizer({"p": cpu}, ls.Lookahead(ls.Adam(lr=0.1), 2))
        for _ in range(4):
            opt.step({"p": grad})
            ref.step({"p": g})
        after = bytes(device().queue.read_buffer(holder))
        end = offset + numbers.nbytes
        assert after[:offset] == before[:offset]
        assert after[end:] == before[end:]
        np.testing.assert_array_equal(ls.gpu.arrays.read(p), cpu)


def test_ten_steps_in_one_submission_are_ten_submissions():
    rule = ls.Lookahead(ls.NAdam(lr=Linear(0.1, 0.01, steps=20)), 3)
    one, ten = (Pair(rule, SHAPES) for _ in range(2))
    grads = one.gradients()
    one.upload(grads)
    ten.upload(grads)
    encoder = device().create_command_encoder()
    for _ in range(5):
        one.on_gpu.step(one.grads, into=encoder)
    within = encoder.begin_compute_pass()
    for _ in range(5):
        one.on_gpu.step(one.grads, into=within)
    within.end()
    before = one.download()
    device().queue.submit([encoder.finish()])
    for _ in range(10):
        ten.on_gpu.step(ten.grads)
        ten.on_cpu.step(grads)
    ten.check()
    for k, found in one.download().items():
        assert found.tobytes() == ten.download()[k].tobytes()
        assert (before[k] == one.start[k]).all()
    assert one.on_gpu.steps == 10


def test_uniforms_are_never_written_again_while_steps_wait():
    # More steps than a block of uniforms has room for.
    pair = Pair(ls.Lookahead(ls.Adam(lr=0.01), 5), {"w": (5,)})
    grads = pair.gradients()
    pair.upload(grads)
    encoder = device().create_command_encoder()
    within = encoder.begin_compute_pass()
    for i in range(600):
        scale = 0.5 if i % 7 == 0 else 1.0
        pair.on_gpu.step(pair.grads, scale=scale, into=within)
        pair.on_cpu.step(grads, scale=scale)
    within.end()
    device().queue.submit([encoder.finish()])
    pair.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("apart", [False, True], ids=["arena", "apart"])
def test_gradients_are_zero_afterwards_where_that_is_asked_for(dtype, apart):
    pair = Pair(ls.AdamW(lr=0.1), SHAPES, "float32", dtype, apart=apart)
    for _ in range(2):
        grads = pair.gradients()
        pair.upload(grads)
        pair.on_cpu.step(grads)
        pair.on_gpu.step(pair.grads, zero_grads=True)
        pair.check()
        assert all(not ls.gpu.arrays.read(g).view(np.uint8).any() for g in pair.grads.values())


def test_params_and_grads_may_lie_in_one_buffer():
    rng = np.random.default_rng(0)
    holder = buffer(2048)
    p, g = ls.gpu.View(holder, "float32", (50,), 0), ls.gpu.View(holder, "float32", (50,), 1024)
    numbers, grads = rng.standard_normal((2, 50)).astype("f4")
    ls.gpu.arrays.write(p, numbers)
    ls.gpu.arrays.write(g, grads)
    ls.Optimizer(p, ls.Adam(lr=0.1)).step(g)
    ls.Optimizer(numbers, ls.Adam(lr=0.1)).step(grads)
    np.testing.assert_array_equal(ls.gpu.arrays.read(p), numbers)


def test_a_bare_buffer_is_a_leaf():
    p, g = buffer(40), buffer(40)
    device().queue.write_buffer(p, 0, np.ones(10, "f4"))
    device().queue.write_buffer(g, 0, np.ones(10, "f4"))
    opt = ls.Optimizer(p, ls.SGD(lr=0.5))
    opt.step(g)
    assert np.frombuffer(device().queue.read_buffer(p), "f4").tolist() == [0.5] * 10


@pytest.mark.parametrize("grads_dtype", DTYPES)
def test_an_arena_is_one_dispatch(grads_dtype):
    shapes = {str(i): (i + 1, 3) for i in range(20)}
    pair = Pair(ls.Lookahead(ls.AdamW(), 3), shapes, grads_dtype=grads_dtype)
    pair.step()
    pair.check()
    assert len(pair.on_gpu._engine._pieces) == 1


def test_groups_and_missing_gradients_are_the_cpus():
    groups = [("b$", {"weight_decay": 0.0, "lr": 0.3, "slow_step": 0.9}), ("c", {"frozen": True})]
    pair = Pair(ls.Lookahead(ls.AdamW(lr=0.1, weight_decay=0.5), 3), SHAPES, groups=groups)
    for i in range(9):
        pair.step(missing=("c", "w") if i in (2, 4, 5) else ("c",))
        pair.check()
    pair.check_state()
    pair.on_cpu.lr = pair.on_gpu.lr = 0.02
    pair.step(missing=("c",))
    pair.check()


def test_maximize_scale_and_clipping_by_value_are_the_cpus():
    pair = Pair(ls.Adam(lr=0.1, maximize=True), SHAPES, max_grad_value=0.7)
    for _ in range(3):
        pair.step(scale=0.3)
        pair.check()


def test_denormals_infinities_and_nans_are_the_cpus():
    grads = np.array([0, -0.0, 1e-30, 1e-22, 1e20, -3e38, np.inf, -np.inf, np.nan, 1.0], "f4")
    for name in (
        "sgd-momentum",
        "adamw",
        "adam-amsgrad",
        "rmsprop-centered",
        "rprop",
        "lion",
        "signum",
        "adamax",
        "yogi",
    ):
        for eps in (None, 0.0):
            rule = CASES[name].rule
            if eps is not None and hasattr(rule, "eps"):
                rule = type(rule)(lr=0.1, eps=eps)
            pair = Pair(rule, {"w": (10,)})
            for _ in range(3):
                pair.step({"w": grads})
                pair.check()
                pair.check_state()
            pair.step({"w": np.ones(10, "f4")})
            pair.check()


def test_slow_weights_are_shown_and_taken_away():
    for rule in (
        ls.Lookahead(ls.AdamW(lr=0.1), 3),
        ls.ScheduleFreeSGD(lr=0.1),
        ls.ASGD(lr=0.1, t0=1.0),
        ls.SGD(lr=0.1),
    ):
        for dtype in DTYPES:
            pair = Pair(rule, SHAPES, dtype)
            with pair.on_gpu.slow_weights():
                pair.check()
            for _ in range(4):
                pair.step()
            for ours, theirs in zip(pair.on_gpu.slow.values(), pair.on_cpu.slow.values(), strict=True):
                assert ours.tobytes() == theirs.tobytes()
                assert not ours.flags.writeable
            with pair.on_cpu.slow_weights(), pair.on_gpu.slow_weights() as params:
                assert params is pair.params
                pair.check()
                with pytest.raises(RuntimeError, match="slow weights"):
                    pair.on_gpu.step(pair.grads)
            pair.check()
            pair.step()
            pair.check()


def test_fast_weights_come_back_when_the_body_raises():
    pair = Pair(ls.Lookahead(ls.SGD(lr=0.1), 3), SHAPES)
    pair.step()
    with pytest.raises(KeyError), pair.on_gpu.slow_weights():
        raise KeyError
    pair.check()


def test_state_is_read_by_name():
    pair = Pair(ls.Adam(lr=0.1), SHAPES)
    pair.step()
    for path, arrays in pair.on_cpu.state.items():
        found = pair.on_gpu.state[path]
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].shape == array.shape
            assert found[name].tobytes() == array.tobytes()


def test_a_run_moves_between_engines_with_the_same_bits(tmp_path):
    rule = ls.Lookahead(ls.ScheduleFreeAdamW(lr=0.1, warmup_steps=5), 3, inner_state="pullback")
    for dtype in DTYPES:
        pair = Pair(rule, SHAPES, dtype)
        for _ in range(4):
            pair.step()
        ours, theirs = tmp_path / "gpu.safetensors", tmp_path / "cpu.safetensors"
        pair.on_gpu.save(ours)
        pair.on_cpu.save(theirs)
        assert ours.read_bytes() == theirs.read_bytes()
        for _ in range(3):
            pair.step()
        pair.on_gpu = ls.Optimizer.load(theirs, pair.params)
        pair.on_cpu = ls.Optimizer.load(ours, pair.cpu)
        assert pair.on_gpu.steps == 4
        for _ in range(5):
            pair.step()
        pair.check()
        pair.check_state()


def test_an_arena_uploads_and_downloads():
    arena = ls.gpu.Arena(device(), [(2, 3), {"b": (), "empty": (0, 2)}], "float16")
    numbers = [np.ones((2, 3), "f2"), {"b": np.array(2, "f2"), "empty": np.zeros((0, 2), "f2")}]
    arena.upload(numbers)
    found = arena.download()
    assert found[0].tolist() == numbers[0].tolist()
    assert found[1]["b"] == 2
    assert found[1]["empty"].shape == (0, 2)
    with pytest.raises(ValueError, match=r'params\["1/b"\] has shape'):
        arena.upload([numbers[0], {"b": np.ones(2, "f2"), "empty": numbers[1]["empty"]}])
    bare = ls.gpu.Arena(device(), (3,))
    bare.upload(np.ones(3, "f4"))
    assert bare.download().tolist() == [1, 1, 1]
