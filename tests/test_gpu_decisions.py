"""What the GPU decides without a readback is what the CPU decides."""

import struct

import numpy as np
import pytest

import lookstep as ls
from gpu_arrays import Pair, device

device()

SHAPES = {"w": (37, 5), "b": (64,), "c": (3,)}
RULES = {
    "adamw": ls.AdamW(lr=0.1),
    "lookahead": ls.Lookahead(ls.SGD(lr=0.1, momentum=0.9), 3),
    "nested": ls.Lookahead(
        ls.Lookahead(ls.ScheduleFreeAdamW(lr=0.01), 2, inner_state="reset"), 2, outer=ls.HeavyBall(0.3)
    ),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def check_stats(pair):
    found, cpu = pair.on_gpu.read_stats(), pair.on_cpu
    assert (found.steps, found.syncs, found.skipped) == (cpu.steps, cpu.syncs, cpu.skipped)
    assert (pair.on_gpu.steps, pair.on_gpu.syncs, pair.on_gpu.skipped) == (cpu.steps, cpu.syncs, cpu.skipped)
    for ours, theirs in ((found.grad_norm, cpu.grad_norm), (found.slow_step, cpu.slow_step)):
        assert (ours is None) == (theirs is None)
        assert theirs is None or ours == pytest.approx(theirs, rel=1e-5, nan_ok=True)


@every_rule
def test_steps_that_are_not_finite_are_dropped_to_the_bit(rule):
    pair = Pair(rule, SHAPES, nonfinite="skip")
    for i in range(16):
        grads = pair.gradients()
        if i in (3, 7, 8):
            grads["b"][5] = np.nan if i == 3 else -np.inf
        pair.step(grads)
        pair.check()
        if i % 4 == 3:
            check_stats(pair)
        if i == 9:
            pair.on_gpu.lr = pair.on_cpu.lr = 0.05
        if i == 11:
            pair.on_gpu.sync()
            pair.on_cpu.sync()
    pair.check_state()
    assert pair.on_gpu.skipped == 3


@every_rule
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_clipping_by_norm_is_the_cpus(rule, nonfinite):
    pair = Pair(rule, SHAPES, max_grad_norm=0.5, max_grad_value=0.8, nonfinite=nonfinite)
    for i in range(8):
        grads = pair.gradients()
        if i == 4 and nonfinite == "skip":
            grads["w"][0] = np.inf
        pair.step(grads, scale=0.7)
        pair.check(exact=False)
        check_stats(pair)


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1.0, 1e15, 1e30])
def test_norms_neither_overflow_nor_vanish(size):
    pair = Pair(ls.SGD(lr=1.0), {"w": (1000,)}, max_grad_norm=1e-2)
    grads = {"w": (pair.gradients()["w"] * size).astype("f4")}
    pair.step(grads)
    pair.check(exact=False)
    assert pair.on_gpu.read_stats().grad_norm == pytest.approx(pair.on_cpu.grad_norm, rel=1e-5)


def test_a_norm_beyond_float32_still_clips():
    pair = Pair(ls.SGD(lr=1.0), {"w": (1000,)}, max_grad_norm=1.0)
    pair.step({"w": np.full(1000, 3e38, "f4")})
    pair.check(exact=False)
    assert pair.on_gpu.read_stats().grad_norm == np.inf


def test_a_nan_propagates_through_the_norm():
    pair = Pair(ls.SGD(lr=1.0), {"w": (10,)}, max_grad_norm=1.0)
    grads = pair.gradients()
    grads["w"][3] = np.nan
    pair.step(grads)
    assert np.isnan(pair.download()["w"]).all()
    assert np.isnan(pair.cpu["w"]).all()


def test_norms_of_many_chunks_have_one_order():
    norms = set()
    for _ in range(2):
        pair = Pair(ls.SGD(lr=1.0), {"w": (100_001,), "b": (40_000,)}, max_grad_norm=1.0)
        pair.step()
        pair.check(exact=False)
        norms.add(pair.on_gpu.read_stats().grad_norm)
        assert pair.on_gpu.grad_norm == pytest.approx(pair.on_cpu.grad_norm, rel=2e-6)
    assert len(norms) == 1


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_the_best_slow_step_is_the_cpus(nonfinite):
    rule = ls.Lookahead(ls.SGD(lr=0.3), 2, ls.OptimalSlowStep(low=0.1))
    pair = Pair(rule, SHAPES, nonfinite=nonfinite)
    for i in range(12):
        pair.step({k: v.copy() for k, v in pair.cpu.items()})
        pair.check(exact=False)
        if i % 3 != 1:
            check_stats(pair)


def test_a_loss_scale_follows_the_gradients():
    scale, good = 1024.0, 0
    pair = Pair(ls.AdamW(lr=0.1), SHAPES, gpu={"loss_scale": ls.gpu.LossScale(scale, interval=2)})
    for i in range(12):
        grads, is_bad = pair.gradients(), i in (2, 5, 6)
        pair.upload({k: v * np.float32(np.inf if is_bad else scale) for k, v in grads.items()})
        pair.on_gpu.step(pair.grads)
        if is_bad:
            scale, good = scale / 2, 0
        else:
            pair.on_cpu.step(grads)
            good += 1
            if good == 2:
                scale, good = scale * 2, 0
        data = device().queue.read_buffer(pair.on_gpu.control)
        assert struct.unpack_from("<f", data) == (scale,)
        pair.check()
    assert pair.on_gpu.read_stats().loss_scale == scale
    assert pair.on_gpu.steps == 9


def test_a_loss_scale_goes_on_where_it_was(tmp_path):
    pair = Pair(ls.SGD(lr=0.1), SHAPES, gpu={"loss_scale": ls.gpu.LossScale(64.0, interval=3)})
    for _ in range(4):
        pair.on_gpu.step(pair.grads)
    path = tmp_path / "run.safetensors"
    pair.on_gpu.save(path)
    again = ls.Optimizer.load(path, pair.params, loss_scale=ls.gpu.LossScale(8.0, interval=3))
    assert again.read_stats().loss_scale == 128.0
    again.step(pair.grads)
    again.step(pair.grads)
    assert again.read_stats().loss_scale == 256.0
    assert again.read_stats().steps == 6


def test_what_was_skipped_is_saved_and_goes_on():
    pair = Pair(ls.Lookahead(ls.Adam(lr=0.1), 3), SHAPES, nonfinite="skip")
    for i in range(5):
        grads = pair.gradients()
        if i == 1:
            grads["w"][0] = np.nan
        pair.step(grads)
    state = pair.on_gpu.state_dict()
    assert state["skipped"] == 1
    pair.on_gpu.load_state_dict(state)
    pair.on_cpu.load_state_dict(pair.on_cpu.state_dict())
    pair.step()
    pair.check()
    check_stats(pair)


def test_many_steps_are_recorded_before_any_is_dropped():
    rule = ls.Lookahead(ls.NAdam(lr=ls.schedules.Cosine(0.1, steps=400)), 5)
    pair = Pair(rule, SHAPES, nonfinite="skip", max_grad_norm=1e6)
    good, bad = (ls.gpu.Arena(device(), SHAPES).grads for _ in range(2))
    grads = pair.gradients()
    pair.grads = good
    pair.upload(grads)
    pair.grads = bad
    pair.upload({k: v * np.float32(np.nan) for k, v in grads.items()})
    encoder = device().create_command_encoder()
    within = encoder.begin_compute_pass()
    for i in range(300):
        pair.on_gpu.step(bad if i % 3 == 0 else good, into=within)
    within.end()
    with pytest.raises(RuntimeError, match="300 steps were recorded"):
        pair.on_gpu.sync()
    device().queue.submit([encoder.finish()])
    for _ in range(200):
        pair.on_cpu.step(grads)
    pair.check()
    assert pair.on_gpu.read_stats()[:3] == (200, 40, 100)


def test_the_table_begins_anew_where_too_much_is_unknown(monkeypatch):
    monkeypatch.setattr("lookstep.gpu.engine.MOST_ROWS", 8)
    pair = Pair(ls.Lookahead(ls.Adam(lr=0.01), 3), SHAPES, nonfinite="skip")
    for i in range(700):
        grads = pair.gradients() if i % 50 == 0 else None
        if grads is not None:
            pair.upload(grads)
            last = grads
        pair.on_gpu.step(pair.grads)
        pair.on_cpu.step(last)
    pair.check()
    check_stats(pair)


def test_gradients_of_a_dropped_step_are_made_zero_as_well():
    pair = Pair(ls.SGD(lr=0.1), SHAPES, nonfinite="skip")
    grads = pair.gradients()
    grads["b"][0] = np.nan
    pair.upload(grads)
    pair.on_gpu.step(pair.grads, zero_grads=True)
    pair.check()
    assert all(not ls.gpu.arrays.read(g).any() for g in pair.grads.values())


def test_leaves_without_gradients_are_left_alone_where_the_gpu_decides():
    pair = Pair(ls.Lookahead(ls.Adam(lr=0.1), 2), SHAPES, nonfinite="skip", groups=[("c", {"lr": 0.3})])
    for i in range(8):
        pair.step(missing=("w",) if i in (2, 3, 4) else ())
        pair.check()
    pair.check_state()


def test_where_nothing_is_decided_there_is_no_control_buffer():
    pair = Pair(ls.SGD(lr=0.1), SHAPES)
    pair.step()
    assert pair.on_gpu.control is None
    assert pair.on_gpu.read_stats() == (1, 0, 0, None, None, None)


def test_sums_of_gradients_that_are_gone_do_not_count():
    shapes, rule, groups = {"a": (3,), "b": (3,)}, ls.SGD(lr=1.0), [("b", {"lr": 0.5})]
    pair = Pair(rule, shapes, nonfinite="skip", max_grad_norm=4.0, groups=groups)
    ones, huge = np.ones(3, "f4"), np.full(3, 1e4, "f4")
    for b in (np.full(3, np.nan, "f4"), huge):
        pair.step({"a": ones, "b": b})
        pair.step({"a": ones, "b": b}, missing=["b"])
        stats = pair.on_gpu.read_stats()
        assert stats.grad_norm == pytest.approx(3**0.5)
        assert (stats.steps, stats.skipped) == (pair.on_cpu.steps, pair.on_cpu.skipped)


@pytest.mark.parametrize("options", [{}, {"nonfinite": "skip"}, {"max_grad_norm": 1e9}], ids=["", "skip", "clip"])
def test_trees_of_gradients_may_take_turns(options):
    pair = Pair(ls.Lookahead(ls.Adam(), 2), SHAPES, **options)
    trees = [pair.grads, *(ls.gpu.Arena(device(), SHAPES).grads for _ in range(5))]
    for step in range(14):
        pair.grads = trees[step % 2 if step < 6 else step % 6]
        pair.step()
        pair.check(exact="max_grad_norm" not in options)


def test_a_loss_scale_that_nobody_follows_is_not_taken(tmp_path):
    arena, ones = ls.gpu.Arena(device(), (4,)), np.ones(4, "f4")
    scaled = ls.Optimizer(arena.params, ls.SGD(lr=1.0), nonfinite="skip", loss_scale=ls.gpu.LossScale(1024.0))
    scaled.save(tmp_path / "run")
    opt = ls.Optimizer.load(tmp_path / "run", arena.params)
    ls.gpu.arrays.write(arena.grads, ones)
    opt.step(arena.grads)
    assert (arena.download() == -1).all()


def test_a_recorded_step_that_is_thrown_away_is_forgotten_by_a_load():
    arena = ls.gpu.Arena(device(), (4,))
    opt = ls.Optimizer(arena.params, ls.Adam(), nonfinite="skip")
    state = opt.state_dict()
    opt.step(arena.grads, into=device().create_command_encoder())
    with pytest.raises(RuntimeError, match="submit them first"):
        opt.state_dict()
    opt.load_state_dict(state)
    opt.step(arena.grads)
    assert opt.read_stats().steps == 1


@pytest.mark.parametrize("scale", [[2.0**61, 0], [1e-300, 0], [1.0, 2**32]])
def test_hostile_loss_scales_are_refused_before_anything_is_written(scale):
    arena = ls.gpu.Arena(device(), (4,))
    opt = ls.Optimizer(arena.params, ls.SGD(lr=1.0), loss_scale=ls.gpu.LossScale())
    state = opt.state_dict()
    state["leaves"][""]["params"] += 1
    with pytest.raises(ValueError, match="loss"):
        opt.load_state_dict(state | {"loss_scale": scale})
    assert (arena.download() == 0).all()


@pytest.mark.parametrize("options", [{"initial": 1e300}, {"initial": 1e-45}, {"growth": 1e300}])
def test_loss_scales_are_numbers_of_float32(options):
    with pytest.raises(ValueError, match=r"must be in \["):
        ls.gpu.LossScale(**options)


def test_a_sync_of_a_scheduled_slow_step_counts_applied_steps():
    rule = ls.Lookahead(ls.SGD(lr=1.0), 100, slow_step=ls.schedules.Linear(1.0, 0.0, steps=10))
    pair = Pair(rule, {"w": (4,)}, nonfinite="skip")
    for _ in range(6):
        pair.step()
    pair.on_cpu.sync()
    pair.on_gpu.sync()
    pair.check()
    assert pair.on_gpu.read_stats().slow_step == pair.on_cpu.slow_step


def test_groups_may_change_while_slow_weights_are_shown():
    names = {name: (3,) for name in "abc"}
    pair = Pair(ls.Lookahead(ls.SGD(lr=1.0)), names, groups=[("b", {"lr": 0.5}), ("c", {"lr": 0.25})])
    for _ in range(2):
        pair.step()
    for _ in range(90):
        with pair.on_gpu.slow_weights():
            pass
    with pair.on_gpu.slow_weights():
        pair.on_gpu.groups = [("a|b|c", {"lr": 0.5})]
    pair.check()
