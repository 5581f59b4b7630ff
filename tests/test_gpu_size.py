"""Leaves larger than a binding, and dispatches larger than one axis has workgroups for."""

import numpy as np
import pytest

import lookstep as ls
from gpu_arrays import Pair, buffer, device, same, view

device()

RULE = ls.Lookahead(ls.AdamW(lr=0.1), 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"nonfinite": "skip"}], ids=["", "decided"])
def test_leaves_are_cut_where_a_binding_ends(monkeypatch, dtype, options):
    # Room for 512 elements and their three rows.
    monkeypatch.setattr("lookstep.gpu.layout.MOST_BYTES", 256 + 512 * 4 * 3)
    pair = Pair(RULE, {"a": (70,), "w": (51, 50), "b": (3,), "c": (513,)}, dtype, **options)
    assert len(pair.on_gpu._engine._parts) > 6
    for _ in range(5):
        pair.step()
        pair.check()
    pair.check_state()
    with pair.on_cpu.slow_weights(), pair.on_gpu.slow_weights():
        pair.check()
    pair.check()


@pytest.mark.parametrize("most", [1, 2, 3])
def test_workgroups_of_two_axes_cover_all(monkeypatch, most):
    monkeypatch.setattr("lookstep.gpu.pieces.MOST_GROUPS", most)
    pair = Pair(RULE, {"w": (1001,), "b": (130,)})
    pair.step()
    assert pair.on_gpu._engine._pieces[0].groups[1] > 1
    for _ in range(3):
        pair.step()
        pair.check()


@pytest.mark.slow
def test_a_tensor_of_300_megabytes():
    n = 300_000_000 // 4
    grads = np.random.default_rng(0).standard_normal(n, np.float32)
    cpu = np.ones(n, np.float32)
    arena = ls.gpu.Arena(device(), (n,))
    arena.upload(cpu)
    ls.gpu.arrays.write(arena.grads, grads)
    rule = ls.Lookahead(ls.SGD(lr=0.1), 2)
    on_cpu, on_gpu = ls.Optimizer(cpu, rule), ls.Optimizer(arena.params, rule)
    for _ in range(2):
        on_cpu.step(grads)
        on_gpu.step(arena.grads)
    assert any(piece.groups[1] > 1 for piece in on_gpu._engine._pieces)
    np.testing.assert_array_almost_equal_nulp(arena.download(), cpu, 2)


def test_gradients_of_16_bits_are_cut_between_words(monkeypatch):
    monkeypatch.setattr("lookstep.gpu.layout.MOST_BYTES", 256 + 512 * 4 * 3)
    rng = np.random.default_rng(0)
    cpu = {"a": rng.standard_normal(1, np.float32), "b": rng.standard_normal(3000, np.float32)}
    grads = {name: rng.standard_normal(x.size).astype(np.float16) for name, x in cpu.items()}
    room = buffer(4 * 3001)
    on_gpu = {"a": ls.gpu.View(room, "float32", 1), "b": ls.gpu.View(room, "float32", 3000, offset=4)}
    for name, x in cpu.items():
        ls.gpu.arrays.write(on_gpu[name], x)
    ls.Optimizer(on_gpu, RULE).step({name: view(g, "float16") for name, g in grads.items()})
    ls.Optimizer(cpu, RULE).step(grads)
    for name, x in cpu.items():
        same(ls.gpu.arrays.read(on_gpu[name]), x, True, 1, np.abs(x), name)
