"""Numbers of 16 bits are trained as float32 and rounded once a step; state in fewer bits says what it loses."""

import math

import ml_dtypes
import numpy as np
import pytest

import lookstep as ls
from cases import every_case

BF16 = ml_dtypes.bfloat16
NAN, INF = float("nan"), float("inf")
F32_MIN = 2.0**-126

every_half = pytest.mark.parametrize("half", [np.float16, BF16], ids=["float16", "bfloat16"])
every_rounding = pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
every_state = pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
wide = pytest.mark.parametrize("wide", [np.float32, None], ids=["float32-gradients", "16-bit-gradients"])


def start(n=300, dtype="f4", seed=0):
    return np.random.default_rng(seed).standard_normal(n).astype(dtype)


def gradients(steps, n=300, dtype="f4", seed=1):
    return list(np.random.default_rng(seed).standard_normal((steps, n)).astype(dtype))


def single(x):
    return x.astype(np.float32)


def bits(x):
    return x.view(f"u{x.itemsize}").tolist()


def state_of(opt, path=""):
    return opt.state[path]


# Parameters of 16 bits


@every_case
@every_half
@wide
def test_a_step_of_16_bits_is_one_of_float32_that_is_rounded_to_nearest_even(wide, half, case):
    p = start(dtype=half)
    q = single(p)
    a, b = ls.Optimizer(p, case.rule), ls.Optimizer(q, case.rule)
    for g in gradients(8, dtype=wide or half):
        q[:] = single(p)
        a.step(g)
        b.step(single(g))
        assert bits(p) == bits(q.astype(half))
    # And state is kept in float32.
    for name, array in state_of(a).items():
        assert array.dtype == np.float32
        assert array.tobytes() == state_of(b)[name].tobytes()


@every_case
@every_half
def test_gradients_of_16_bits_go_with_parameters_of_32(half, case):
    p, q = start(), start()
    a, b = ls.Optimizer(p, ls.Lookahead(case.rule, 3)), ls.Optimizer(q, ls.Lookahead(case.rule, 3))
    for g in gradients(7, dtype=half):
        a.step(g[::-1])
        b.step(single(g[::-1]))
    assert p.tobytes() == q.tobytes()


@every_half
def test_ties_go_to_even_and_what_is_too_large_to_infinity(half):
    """By hand: plain SGD at a rate of 1 from zero leaves the rounded gradient, of either sign."""
    info = ml_dtypes.finfo(half)
    ulp = float(info.eps)
    largest, least = float(info.max), float(info.smallest_subnormal)
    rows = {
        1 + ulp / 2: 1,
        1 + 3 * ulp / 2: 1 + 2 * ulp,
        1 + ulp * 0.5001: 1 + ulp,
        largest: largest,
        least: least,
        least / 2: 0,
        least * 0.75: least,
        float(np.finfo("f4").max): INF,
        INF: INF,
    }
    for g, expected in rows.items():
        for sign in 1, -1:
            p = np.zeros(1, half)
            ls.Optimizer(p, ls.SGD(lr=1.0)).step(np.array([-sign * g], "f4"))
            assert float(p[0]) == sign * expected
            assert math.copysign(1, float(p[0])) == sign
    p = np.zeros(1, half)
    ls.Optimizer(p, ls.SGD(lr=1.0)).step(np.array([NAN], "f4"))
    assert np.isnan(float(p[0]))


def blended(fast, slow, slow_step):
    """The sync, in float32: the form that is exact at both ends."""
    part, rest = np.float32(slow_step), np.float32(1 - slow_step)
    return fast - (fast - slow) * rest if slow_step >= 0.5 else slow + part * (fast - slow)


@every_half
@pytest.mark.parametrize("slow_step", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("sync_period", [1, 2, 5])
def test_slow_weights_of_16_bits_are_kept_in_float32_across_cycles(sync_period, slow_step, half):
    p = start(dtype=half)
    opt = ls.Optimizer(p, ls.Lookahead(ls.SGD(lr=0.01), sync_period, slow_step))
    phi = single(p)
    fast = phi
    for i, g in enumerate(gradients(23)):
        fast = single(p) - np.float32(0.01) * g
        if i % sync_period == sync_period - 1:
            phi = blended(fast, phi, slow_step)
            fast = phi
        opt.step(g)
        assert bits(p) == bits(fast.astype(half))
        if i % sync_period != sync_period - 1:
            assert opt.slow.dtype == np.float32
            assert opt.slow.tobytes() == phi.tobytes()


@every_half
def test_slow_weights_move_by_less_than_16_bits_can_tell(half):
    """Each sync goes a fiftieth of nearly one step of the format; in the format itself, each would be lost."""
    ulp = float(ml_dtypes.finfo(half).eps)
    p = np.ones(1, half)
    opt = ls.Optimizer(p, ls.Lookahead(ls.SGD(lr=1.0), 1, 0.02))
    shown = []
    for _ in range(45):
        opt.step(np.array([-0.9 * ulp], "f4"))
        shown.append(float(p[0]))
    # 1 - .98^n of .9 steps is half a step at n = 40.1.
    assert shown == [1.0] * 40 + [1 + ulp] * 5


@every_half
@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("when", [1, 2, 3])
def test_weights_that_are_written_between_steps_are_honoured(when, master, half):
    """Where the user writes, that is what is stepped from; everywhere else, the bits that 16 do not show stay."""
    p = start(dtype=half)
    k, a, lr = 3, 0.3, 0.01
    opt = ls.Optimizer(p, ls.Lookahead(ls.SGD(lr=lr), k, a), master_weights=master)
    full, phi = single(p), single(p)
    for i, g in enumerate(gradients(12)):
        if i % k == 0:
            phi = full.copy() if master else np.where(single(phi.astype(half)) == single(p), phi, single(p))
        if not master:
            full = single(p)
        full = full - np.float32(lr) * g
        if i % k == k - 1:
            full = phi = blended(full, phi, a)
        opt.step(g)
        assert bits(p) == bits(full.astype(half))
        if i % k == when % k:
            p[10:20] = 2.0
            p[20:30] = p[20:30]  # The same again: nothing was written.
            full = np.where(single(full.astype(half)) == single(p), full, single(p))


@every_case
@every_half
@pytest.mark.parametrize(
    "around",
    [
        lambda rule: rule,
        lambda rule: ls.Lookahead(rule, 3, 0.4, inner_state="pullback"),
        lambda rule: ls.Lookahead(ls.Lookahead(rule, 2, 0.7), 2, 0.8, outer=ls.Nesterov(0.5)),
    ],
    ids=["alone", "lookahead", "nested"],
)
def test_master_weights_are_a_run_of_float32_that_is_rounded(around, half, case):
    p = start(dtype=half)
    q = single(p)
    a = ls.Optimizer(p, around(case.rule), master_weights=True)
    b = ls.Optimizer(q, around(case.rule), master_weights=True)
    for i, g in enumerate(gradients(9, dtype=half)):
        a.step(None if i in (3, 5) else g)
        b.step(None if i in (3, 5) else single(g))
        assert bits(p) == bits(q.astype(half))
    a.sync()
    b.sync()
    assert bits(p) == bits(q.astype(half))
    for name, array in state_of(a).items():
        assert array.tobytes() == state_of(b)[name].tobytes()


def test_master_weights_cost_nothing_where_weights_are_whole():
    params = {"half": start(dtype="f2"), "single": start(), "double": start(dtype="f8")}
    leaves = ls.Optimizer(params, ls.SGD(), master_weights=True).state_dict()["leaves"]
    assert {path: "master" in leaf for path, leaf in leaves.items()} == {"half": True, "single": False, "double": False}


@every_half
@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_slow_weights_of_16_bits_are_shown_and_every_bit_comes_back(nested, master, half):
    p = start(dtype=half)
    rule = ls.Lookahead(ls.Adam(lr=0.1), 3, 0.4)
    opt = ls.Optimizer(p, ls.Lookahead(rule, 2) if nested else rule, master_weights=master)
    twin_p = p.copy()
    twin = ls.Optimizer(twin_p, opt.rule, master_weights=master)
    for i, g in enumerate(gradients(8)):
        opt.step(g)
        twin.step(g)
        slow, before = np.array(opt.slow), bits(p)
        with opt.slow_weights() as shown:
            assert shown is p
            assert bits(p) == bits(slow.astype(half))
        assert bits(p) == before == bits(twin_p), i
    assert opt.slow.tobytes() == twin.slow.tobytes()


@every_half
@pytest.mark.parametrize("master", [False, True])
def test_what_is_written_into_slow_weights_of_16_bits_goes_into_them(master, half):
    p = np.full(4, 10, half)
    opt = ls.Optimizer(p, ls.Lookahead(ls.SGD(lr=1 / 512), 2, 0.5), master_weights=master)
    for _ in range(5):  # A sync at 10 - 1 / 512 or thereabouts, then a step into the third cycle.
        opt.step(np.ones(4, "f4"))
    before, kept = bits(p), np.array(opt.slow)
    with opt.slow_weights():
        p[1] = 20
        p[2] = p[2]
    assert bits(p) == before
    expected = kept.copy()
    expected[1] = 20
    assert opt.slow.tobytes() == expected.tobytes()


@every_half
def test_slow_weights_within_which_the_body_raises(half):
    p = start(dtype=half)
    opt = ls.Optimizer({"w": p}, ls.Lookahead(ls.SGD(lr=0.1), 5))
    opt.step({"w": start(seed=3)})
    before = bits(p)
    with pytest.raises(KeyError), opt.slow_weights() as shown:  # noqa: PT012
        shown["w"][:] = 0
        raise KeyError
    assert bits(p) == before
    with opt.slow_weights():
        assert (single(p) == 0).all()


@every_half
def test_leaves_of_every_format_are_stepped_side_by_side(half):
    """A leaf's bits do not depend on its neighbours', nor on how it lies."""
    dtypes = {"a": half, "b": np.float32, "c": np.float64, "d": half}
    apart = {name: start(77, dtype, seed=5) for name, dtype in dtypes.items()}
    room = {name: np.zeros((77, 3), dtype) for name, dtype in dtypes.items()}
    together = {name: room[name][::-1, 1] for name in dtypes}
    for name, p in together.items():
        p[:] = apart[name]
    rule = ls.Lookahead(ls.AdamW(lr=0.1), 2)
    opt = ls.Optimizer(together, rule)
    alone = {name: ls.Optimizer({name: p}, rule) for name, p in apart.items()}
    for g in gradients(5, 77, "f8"):
        opt.step({name: g.astype(dtype) for name, dtype in dtypes.items()})
        for name, one in alone.items():
            one.step({name: g.astype(dtypes[name])})
    for name, p in together.items():
        assert p.tobytes() == apart[name].tobytes()
        assert (room[name][:, ::2] == 0).all()


# State in fewer bits


def coded(p, rule, **options):
    return ls.Optimizer(p, rule, **{"state_dtype": "bfloat16", "rounding": "nearest"} | options)


def weights_of(opt, path=""):
    """Names of the state arrays that are kept whole."""
    kept = opt.state_dict()["leaves"][path]
    return {name for name in opt.state[path] if kept[name].dtype == np.float32}


@every_case
def test_bfloat16_to_nearest_is_that_of_ml_dtypes(case):
    """As an optimizer of float32 whose state is rounded, and loaded again, after every step."""
    measured = case.whole or isinstance(case.rule, ls.Prodigy)
    p, q = start(), start()
    opt, full = coded(p, case.rule), ls.Optimizer(q, case.rule)
    whole = weights_of(opt)
    for i, g in enumerate(gradients(1 if measured else 6)):
        opt.step(g)
        full.step(g)
        saved = full.state_dict()
        for name in state_of(full):
            if name not in whole:
                saved["leaves"][""][name] = single(saved["leaves"][""][name].astype(BF16))
        full.load_state_dict(saved)
        for name, array in state_of(opt).items():
            assert array.tobytes() == state_of(full)[name].tobytes(), (i, name)
        # Where sums are taken first, the step itself reads what was kept then.
        assert measured or p.tobytes() == q.tobytes()


def kept(x, state_dtype, rounding="nearest", seed=0, path=None, dtype="f4", squared=False):
    """What is kept of numbers: momentum of the first step is the gradient, the second moment its square."""
    p = np.zeros(np.shape(x), dtype)
    rule = ls.Adam(betas=(0.5, 0.0)) if squared else ls.SGD(momentum=0.5)
    params, grads = (p, np.asarray(x, dtype)) if path is None else ({path: p}, {path: np.asarray(x, dtype)})
    opt = coded(params, rule, state_dtype=state_dtype, rounding=rounding, seed=seed)
    with np.errstate(over="ignore"):
        opt.step(grads)
    return state_of(opt, path or "")["v" if squared else "m"]


def test_every_bfloat16_and_its_neighbourhood():
    """Each of the numbers that bfloat16 has, and float32 around their midpoints."""
    numbers = (np.arange(2**16, dtype="u4") << 16)[:, None] + np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], "u4")
    x = numbers.ravel().view("f4")
    x = x[np.isfinite(x)]
    expected = single(np.where(np.abs(x) < F32_MIN, np.float32(0), x).astype(BF16))
    largest = float(ml_dtypes.finfo(BF16).max)
    expected = np.clip(expected, -largest, largest)
    assert (kept(x, "bfloat16") == expected).all()


@every_state
@every_rounding
def test_state_that_cannot_be_kept_saturates_and_nan_stays(rounding, state_dtype):
    largest = {"bfloat16": float(ml_dtypes.finfo(BF16).max), "int8": float(np.finfo("f4").max)}[state_dtype]
    x = np.array([np.finfo("f4").max, -np.finfo("f4").max, 0.0])
    assert kept(x, state_dtype, rounding).tolist() == [largest, -largest, 0]
    assert kept([1e30, 0.0], state_dtype, rounding, squared=True).tolist() == [largest, 0]
    lost = kept([1.0, NAN, INF, -INF, 0.5], state_dtype, rounding)
    assert np.isfinite(lost).tolist() == [True, False, False, False, True]
    assert np.isnan(lost[1])
    assert lost[0] == 1


@every_state
@every_rounding
def test_denormals_are_kept_as_zero(rounding, state_dtype):
    for x in (F32_MIN / 2, 1e-45, -F32_MIN / 4):
        assert kept([x] * 100, state_dtype, rounding).tolist() == [0] * 100
    assert kept([1e-20] * 3, state_dtype, rounding, squared=True).tolist() == [0] * 3
    assert (kept([F32_MIN] * 100, state_dtype, rounding) == F32_MIN).all()


def codes_of_int8(x, squared):
    """The nearest of what a block can hold: squares of n / 127, or fourth powers of n / 254, times its largest."""
    steps = np.arange(255) / 254 if squared else (np.arange(255) - 127) / 127
    table = steps**4 if squared else steps * np.abs(steps)
    out = np.empty_like(x, "f8")
    for block in range(0, len(x), 256):
        part = x[block : block + 256].astype("f8")
        scale = np.abs(part).max()
        distance = np.abs(part[:, None] - scale * table[None])
        if squared:
            distance[part > 0, 0] = np.inf
        out[block : block + 256] = scale * table[distance.argmin(axis=1)]
    return out


@pytest.mark.parametrize("squared", [False, True])
def test_int8_to_nearest_keeps_the_nearest_number_of_a_block(squared):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(1000) * 10.0 ** rng.uniform(-3, 3, 1000)).astype("f4")
    x[300:310] = 0
    expected = codes_of_int8(x * x if squared else x, squared)
    # Midpoints apart, which rounding may see on either side, it is that number to float32's roundings.
    np.testing.assert_allclose(kept(x, "int8", squared=squared), expected, rtol=1e-5)


def test_a_second_moment_that_is_not_zero_is_not_kept_as_zero():
    x = np.full(256, 1e-12, "f4")
    x[7], x[9] = 1.0, 0.0
    v = kept(x, "int8", squared=True)
    assert v[9] == 0
    assert (np.delete(v, 9) > 0).all()
    # The signed first moment may be.
    assert kept(x, "int8")[0] == 0


def test_a_block_of_int8_does_not_depend_on_others():
    x = np.random.default_rng(0).standard_normal(1000).astype("f4")
    y = x.copy()
    y[256:512] *= 1e6
    a, b = kept(x, "int8"), kept(y, "int8")
    assert (np.delete(a == b, np.s_[256:512])).all()
    np.testing.assert_allclose(b[256:512], 1e6 * a[256:512], rtol=1e-5)


@every_state
@pytest.mark.parametrize("squared", [False, True])
def test_stochastic_rounding_is_right_in_the_mean(squared, state_dtype):
    n = 400_000
    for number in (1.0, 1.003, 0.7071, 0.11, 3e-3):
        x = np.full(n, number, "f4")
        x[::256] = 2.0  # In each block of 8 bits.
        got = kept(x, state_dtype, "stochastic", squared=squared).astype("f8")
        got = np.delete(got, np.s_[::256])
        exact = float(np.float32(number)) ** (2 if squared else 1)
        values = np.unique(got)
        assert len(values) <= 2
        assert values[0] <= exact * (1 + 1e-6)
        assert values[-1] >= exact * (1 - 1e-6)
        # A coin between two values: five standard deviations of the mean, and float32's own rounding.
        spread = (values[-1] - values[0]) / 2
        assert abs(got.mean() - exact) <= 5 * spread / math.sqrt(len(got)) + 2e-7 * exact


def test_what_is_exact_is_kept_exactly_however_it_is_rounded():
    x = single(start(1000).astype(BF16))
    assert kept(x, "bfloat16", "stochastic").tobytes() == x.tobytes()
    x = np.zeros(1000, "f4")
    x[::3], x[1::3] = 7.5, -7.5
    for rounding in ("nearest", "stochastic"):
        assert kept(x, "int8", rounding).tobytes() == x.tobytes()


def run(p, rule, grads, path="w", **options):
    opt = coded({path: p}, rule, rounding="stochastic", **options)
    for g in grads:
        opt.step({path: g})
    return opt


@every_state
@every_case
def test_the_same_seed_gives_the_same_bits(case, state_dtype):
    grads = gradients(5)
    runs = []
    for seed in (0, 0, 1):
        p = start()
        opt = run(p, ls.Lookahead(case.rule, 2), grads, state_dtype=state_dtype, seed=seed)
        runs.append((p.tobytes(), {name: array.tobytes() for name, array in state_of(opt, "w").items()}))
    assert runs[0] == runs[1]
    # Rules without state that is rounded, and signs, which are exact, have nothing that could differ.
    rounded = set(state_of(opt, "w")) - weights_of(opt, "w")
    exact = isinstance(case.rule, ls.Rprop) and state_dtype == "bfloat16"
    assert (runs[0] != runs[2]) or not rounded or exact


def test_random_bits_depend_on_path_element_array_and_step():
    x = np.full(1000, 1.003, "f4")

    def ups(x, **options):
        return kept(x, "bfloat16", "stochastic", **options) > 1.003

    base = ups(x, path="w")
    # A third to a half of 1,000 coins fall otherwise where they are thrown anew.
    assert (ups(x, path="w") == base).all()
    for other in (ups(x, path="v"), ups(x, path="w", seed=1), np.roll(base, 1), np.roll(base, 32), base[::-1]):
        assert 0.3 < (other != base).mean() < 0.7
    p = np.zeros(1000, "f4")
    opt = coded({"w": p}, ls.Adam(betas=(0.0, 0.0)), rounding="stochastic")
    seen = []
    for _ in range(3):
        opt.step({"w": np.sqrt(x)})
        seen.append(opt.state["w"]["v"] > 1.003)
        seen.append(opt.state["w"]["m"] > np.sqrt(1.003))
    for i in range(6):
        for j in range(i):
            assert (seen[i] != seen[j]).mean() > 0.2


def test_random_bits_go_on_after_a_reset():
    """Else what is rounded up in one cycle would be so in all."""
    opt = coded(
        {"w": np.zeros(1000, "f4")}, ls.Lookahead(ls.SGD(momentum=0.5), 2, inner_state="reset"), rounding="stochastic"
    )
    seen = []
    for _ in range(6):
        opt.step({"w": np.full(1000, 1.003, "f4")})
        seen.append(opt.state["w"]["m"] > 1.003)
    assert 0.3 < (seen[0] != seen[2]).mean() < 0.7
    assert not seen[1].any()


@every_state
def test_bits_do_not_depend_on_the_order_of_leaves(state_dtype):
    names = ["a", "b", "c"]
    grads = {name: gradients(4, seed=i) for i, name in enumerate(names)}
    results = []
    for order in (names, names[::-1], ["b"]):
        params = {name: start() for name in order}
        opt = coded(params, ls.Adam(lr=0.1), rounding="stochastic", state_dtype=state_dtype)
        for i in range(4):
            opt.step({name: grads[name][i] for name in order})
        results.append(params)
    assert results[0]["b"].tobytes() == results[1]["b"].tobytes() == results[2]["b"].tobytes()
    assert results[0]["a"].tobytes() == results[1]["a"].tobytes()


LAYOUTS = {
    "fortran": np.asfortranarray,
    "strided": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "reversed": lambda x: np.ascontiguousarray(x[::-1])[::-1],
    "transposed": lambda x: np.ascontiguousarray(x.transpose(2, 0, 1)).transpose(1, 2, 0),
}


@every_rounding
@every_case
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_bits_of_bfloat16_do_not_depend_on_how_arrays_lie(layout, case, rounding):
    if case.whole or isinstance(case.rule, ls.Prodigy):
        return  # Sums over a leaf are taken in the order of its memory.
    shape = (7, 10, 33)
    p = start(7 * 10 * 33).reshape(shape)
    q = layout(p.copy())
    a = coded(p, ls.Lookahead(case.rule, 2), rounding=rounding)
    b = coded(q, ls.Lookahead(case.rule, 2), rounding=rounding)
    for g in gradients(3, 7 * 10 * 33):
        a.step(g.reshape(shape))
        b.step(layout(g.reshape(shape)))
    assert p.tobytes() == q.tobytes()
    for name, array in state_of(a).items():
        assert array.tobytes() == state_of(b)[name].tobytes()


@every_rounding
@pytest.mark.parametrize("layout", ["strided", "reversed"])
def test_bits_of_int8_depend_on_the_order_of_axes_alone(layout, rounding):
    """Blocks of 256 are cut from elements as they lie; gaps between them, and their direction, do not matter."""
    shape = (7, 10, 33)
    p = start(7 * 10 * 33).reshape(shape)
    q = LAYOUTS[layout](p.copy())
    a, b = (coded(x, ls.Adam(lr=0.1), rounding=rounding, state_dtype="int8") for x in (p, q))
    for g in gradients(3, 7 * 10 * 33):
        a.step(g.reshape(shape))
        b.step(np.asfortranarray(g.reshape(shape)))
    assert p.tobytes() == q.tobytes()


@every_state
@every_rounding
def test_weights_and_float64_stay_whole(rounding, state_dtype):
    options = {"state_dtype": state_dtype, "rounding": rounding}
    rule = ls.Lookahead(ls.ScheduleFreeAdamW(lr=0.1), 4, inner_state="pullback", outer=ls.HeavyBall(0.5))
    opt = coded({"w": start(dtype="f2")}, rule, master_weights=True, **options)
    opt.step({"w": start(seed=2)})
    leaf = opt.state_dict()["leaves"]["w"]
    dtypes = {name: array.dtype.name for name, array in leaf.items() if hasattr(array, "dtype")}
    fewer = {"v": "uint16"} if state_dtype == "bfloat16" else {"v": "uint8", "v.scale": "float32"}
    assert {name: dtype for name, dtype in dtypes.items() if dtype != "float32"} == {
        "params": "float16",
        "v": fewer["v"],
    }
    assert dtypes.keys() >= {"z", "slow", "v.before", "z.before", "momentum", "master"} | fewer.keys()
    p, q = start(dtype="f8"), start(dtype="f8")
    a, b = coded(p, ls.Lookahead(ls.Adam(lr=0.1), 2), **options), ls.Optimizer(q, ls.Lookahead(ls.Adam(lr=0.1), 2))
    for g in gradients(5, dtype="f8"):
        a.step(g)
        b.step(g)
    assert p.tobytes() == q.tobytes()
    assert state_of(a)["m"].tobytes() == state_of(b)["m"].tobytes()


@pytest.mark.parametrize(("state_dtype", "bytes_a_number"), [(None, 4), ("bfloat16", 2), ("int8", 1 + 4 / 256)])
def test_state_takes_the_bytes_that_it_says(state_dtype, bytes_a_number):
    n = 256 * 100
    opt = coded(np.zeros(n, "f4"), ls.Adam(), state_dtype=state_dtype)
    leaf = opt.state_dict()["leaves"][""]
    assert sum(leaf[name].nbytes for name in leaf if name.startswith(("m", "v"))) == 2 * n * bytes_a_number


@every_state
def test_state_in_fewer_bits_is_given_as_copies_in_float32(state_dtype):
    opt = coded(np.zeros((3, 4), "f4", order="F"), ls.SGD(lr=0.1, momentum=0.5), state_dtype=state_dtype)
    assert (state_of(opt)["m"] == 0).all()
    opt.step(np.arange(12, dtype="f4").reshape(3, 4))
    first = state_of(opt)["m"]
    assert (first.dtype, first.shape) == (np.float32, (3, 4))
    assert np.argsort(first.ravel()).tolist() == list(range(12))
    before = first.copy()
    opt.step(np.ones((3, 4), "f4"))
    assert (first == before).all()
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1


@every_state
@every_rounding
@every_case
def test_training_in_fewer_bits_goes_where_it_goes_in_float32(case, rounding, state_dtype):
    """Downhill on a bowl, and never to what is not a number: not with v rounded below m^2, nor to zero."""
    n = 520
    p, q = start(n) + 3, start(n) + 3
    curvature = np.geomspace(0.03, 3, n).astype("f4")
    a = coded(p, case.rule, state_dtype=state_dtype, rounding=rounding)
    b = ls.Optimizer(q, case.rule)
    first = float(curvature @ (p * p))
    for _ in range(40):
        a.step(curvature * p)
        b.step(curvature * q)
        assert np.isfinite(p).all()
    losses = [float(curvature @ (x * x)) for x in (p, q)]
    # What float32 has gained, fewer bits have gained most of.
    assert first - losses[0] > 0.8 * (first - losses[1])


@every_state
def test_a_checkpointed_run_in_fewer_bits_goes_on_bit_for_bit(state_dtype):
    grads = gradients(9)
    p, again = start(), start(seed=9)
    rule = ls.Lookahead(ls.Adam(lr=0.1), 2, inner_state="reset")
    opt = coded(p, rule, rounding="stochastic", state_dtype=state_dtype)
    other = coded(again, rule, rounding="stochastic", state_dtype=state_dtype)
    for i, g in enumerate(grads):
        if i == 5:
            other.load_state_dict(opt.state_dict())
        opt.step(g)
        if i >= 5:
            other.step(g)
            assert again.tobytes() == p.tobytes()


def test_gradients_that_are_prepared_and_state_in_fewer_bits_go_together():
    p, q = start(512).reshape(16, 32), start(512).reshape(16, 32)
    options = {"max_grad_norm": 1.0, "max_grad_value": 0.5, "centralize": 0, "nonfinite": "skip"}
    a = coded(p, ls.Adam(lr=0.1), rounding="stochastic", **options)
    b = coded(q, ls.Adam(lr=0.1), rounding="stochastic")
    for g in gradients(5, 512):
        g = g.reshape(16, 32)
        a.step(np.asfortranarray(g), scale=0.5)
        g = np.clip(g * np.float32(0.5), -0.5, 0.5) * np.float32(1.0 / a.grad_norm)
        b.step(g - g.mean(axis=1, dtype="f8", keepdims=True).astype("f4"))
    assert p.tobytes() == q.tobytes()


@pytest.mark.parametrize("rule", [ls.ScheduleFreeSGD(lr=0.1), ls.ASGD(lr=0.1)], ids=["ScheduleFreeSGD", "ASGD"])
def test_averages_of_frozen_leaves_are_the_leaves(rule):
    """They have no rows, and so no master weights; looking for them was a panic."""
    p = {name: np.ones(10, BF16) for name in ("a", "b")}
    opt = ls.Optimizer(p, rule, groups=[("b", {"frozen": True})], master_weights=True)
    opt.step({"a": np.ones(10, BF16), "b": None})
    assert opt.slow["b"].tobytes() == p["b"].tobytes()
    opt.step({"a": np.ones(10, BF16), "b": None})
    assert opt.steps == 2


@every_half
def test_a_leaf_without_a_gradient_keeps_its_bits(half):
    """Also those of a NaN that arithmetic would make another one of."""
    bits = np.arange(0x7C00, 0x7FFF, 7, dtype=np.uint16)
    for p in (bits.view(half).copy(), np.repeat(bits, 2).view(half)[::2]):
        opt = ls.Optimizer({"p": p, "q": np.ones(3, half)}, ls.Adam(lr=0.1), master_weights=True)
        opt.step({"p": None, "q": np.ones(3, half)})
        assert p.tobytes() == bits.tobytes()
