"""Arrays of any layout are stepped in place: paired by index, and nothing beside them touched."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lookstep as ls
from cases import every_dtype

RULE = ls.Lookahead(ls.Adam(lr=0.1), sync_period=2, slow_step=0.3)


def misaligned(x):
    buffer = np.zeros(x.nbytes + 1, np.uint8)
    view = buffer[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def spread(x):
    """Every other element of an array twice as wide, whose other elements are 7."""
    wide = np.full((*x.shape[:-1], 2 * x.shape[-1]), 7, x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


LAYOUTS = {
    "contiguous": np.copy,
    "fortran": np.asfortranarray,
    "sliced": spread,
    "reversed": lambda x: np.ascontiguousarray(x[::-1, :, ::-1])[::-1, :, ::-1],
    "transposed": lambda x: np.ascontiguousarray(x.transpose(1, 2, 0)).transpose(2, 0, 1),
    "misaligned": misaligned,
    "inner-of-columns": lambda x: np.stack([x, x * 0 + 7], axis=1)[:, 0],
}
GRADIENT_LAYOUTS = LAYOUTS | {
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "broadcast": lambda x: np.broadcast_to(x[:1, :1], x.shape),
}


def run(p, gradient_layout, steps=5):
    opt = ls.Optimizer(p, RULE)
    for i in range(steps):
        g = np.sin(np.arange(p.size, dtype=p.dtype) + i).reshape(p.shape)
        opt.step(gradient_layout(g))
    return opt


@every_dtype
@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 700, 3)], ids=str)
@pytest.mark.parametrize("of_gradient", GRADIENT_LAYOUTS)
@pytest.mark.parametrize("of_param", LAYOUTS)
def test_a_layout_gives_the_bits_of_contiguous_arrays(of_param, of_gradient, shape, dtype):
    start = np.cos(np.arange(np.prod(shape), dtype=dtype)).reshape(shape)
    p = LAYOUTS[of_param](start)
    assert p.flags.writeable
    expected = start.copy()
    contiguous = run(expected, lambda g: np.ascontiguousarray(GRADIENT_LAYOUTS[of_gradient](g)))
    opt = run(p, GRADIENT_LAYOUTS[of_gradient])
    assert p.tobytes() == expected.tobytes()
    for name, array in opt.state[""].items():
        assert array.tobytes() == contiguous.state[""][name].tobytes()
    assert opt.slow.tobytes() == contiguous.slow.tobytes()


def test_cells_between_the_elements_are_untouched():
    wide = np.full((4, 10), 7.0)
    p = wide[1:3, ::3]
    opt = run(p, np.copy)
    with opt.slow_weights():
        pass
    untouched = np.ones_like(wide, bool)
    untouched[1:3, ::3] = False
    assert (wide[untouched] == 7).all()
    assert (p != 7).all()


@every_dtype
def test_arrays_without_axes_or_without_elements(dtype):
    params = {"scalar": np.array(1, dtype), "none": np.zeros((3, 0, 2), dtype), "deep": np.ones((1,) * 64, dtype)}
    opt = ls.Optimizer(params, RULE)
    for _ in range(3):
        opt.step({name: np.ones_like(p) for name, p in params.items()})
    assert params["scalar"] < 1
    assert params["scalar"] == params["deep"].ravel()
    assert opt.state["none"]["m"].shape == (3, 0, 2)
    assert opt.slow["deep"].ndim == 64


def test_a_memmap_is_stepped_in_its_file(tmp_path):
    p = np.memmap(tmp_path / "w", "f4", "w+", shape=(3, 5))
    opt = ls.Optimizer(p, ls.SGD(lr=1.0))
    opt.step(np.ones((3, 5), "f4"))
    p.flush()
    assert (np.fromfile(tmp_path / "w", "f4") == -1).all()


def test_interleaved_arrays_share_no_memory():
    z = np.zeros(4, complex)
    params = [z.real, z.imag]
    ls.Optimizer(params, ls.SGD(lr=1.0)).step([np.ones(4), -np.ones(4)])
    assert (z == -1 + 1j).all()
    pair = np.zeros(8)
    pair[1::2] = 1
    ls.Optimizer(pair[::2], ls.SGD(lr=1.0)).step(pair[1::2])
    assert pair.tolist() == [-1, 1] * 4


@st.composite
def layouts(draw, shape, dtype):
    """A writeable array of this shape with any order and direction of axes, steps between elements, and alignment."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 2, -1, -3])) for _ in shape]
    base = np.zeros([shape[axis] * abs(steps[axis]) for axis in order], dtype)
    if draw(st.booleans()):
        base = misaligned(base)
    view = base.transpose(np.argsort(order))[(..., *(slice(None, None, step) for step in steps))]
    assert view.shape == shape
    return view


@st.composite
def trees(draw):
    """A parameter tree, gradients and an unrelated copy of both, contiguous and flat."""
    dtype = draw(st.sampled_from(["f4", "f8"]))
    shapes = draw(st.lists(st.lists(st.integers(0, 5), max_size=4).map(tuple), min_size=1, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))

    def leaf(shape):
        array = draw(layouts(shape, dtype))
        array[...] = rng.standard_normal(shape)
        return array

    params = [leaf(shape) for shape in shapes]
    grads = [[leaf(shape) if draw(st.booleans()) else None for shape in shapes] for _ in range(5)]
    cut = draw(st.integers(0, len(shapes)))
    nest = draw(st.sampled_from([list, tuple, lambda leaves: {"head": leaves[:cut], "tail": tuple(leaves[cut:])}]))
    return params, grads, nest


@settings(max_examples=150, deadline=None)
@given(
    trees(),
    st.sampled_from([ls.SGD(lr=0.1, momentum=0.9), ls.AdamW(), ls.RAdam(betas=(0.5, 0.9))]),
    st.integers(1, 4),
    st.sampled_from([0, 0.25, 0.5, 1]),
)
def test_any_tree_of_any_layouts_is_stepped_as_its_contiguous_copies(tree, inner, sync_period, slow_step):
    params, grads, nest = tree
    rule = ls.Lookahead(inner, sync_period, slow_step)
    copies = [np.array(p, order="C") for p in params]
    alone = [ls.Optimizer(p, rule) for p in copies]
    together = ls.Optimizer(nest(params), rule)
    for step in grads:
        together.step(nest(step))
        for opt, g in zip(alone, step, strict=True):
            opt.step(None if g is None else np.array(g, order="C"))
        for p, copy in zip(params, copies, strict=True):
            assert p.tobytes() == copy.tobytes()
