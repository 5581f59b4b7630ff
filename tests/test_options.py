"""Options change what a step is told and nothing else: groups, schedules, and all that happens to a gradient first."""

import math
import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import lookstep as ls
from cases import CASES, every_case, every_dtype
from lookstep.hyper import SCHEDULED
from lookstep.schedules import Constant, Cosine, Exponential, Joined, Linear, Step

NAN, INF = float("nan"), float("inf")


def tree(seed=0, dtype="f8"):
    rng = np.random.default_rng(seed)
    shapes = {"encoder": {"w": (3, 4), "b": (4,)}, "head": {"w": (4, 2), "b": (2,)}}
    return {
        part: {name: rng.standard_normal(shape).astype(dtype) for name, shape in leaves.items()}
        for part, leaves in shapes.items()
    }


def flat(params):
    return {f"{part}/{name}": x for part, leaves in params.items() for name, x in leaves.items()}


def snapshot(opt):
    """All that a step could change, as bytes."""
    state = opt.state_dict()
    arrays = {
        (path, name): np.asarray(value).tobytes()
        for path, leaf in state["leaves"].items()
        for name, value in leaf.items()
    }
    rest = {name: value for name, value in state.items() if name != "leaves"}
    return arrays, rest, opt.grad_norm, opt.slow_step, opt.lr


def same_bits(a, b):
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


# Groups


@pytest.mark.parametrize(
    "around", [lambda rule: rule, lambda rule: ls.Lookahead(rule, 3, 0.4)], ids=["alone", "within"]
)
def test_a_leaf_goes_by_the_first_group_whose_pattern_its_path_holds(around):
    rule = ls.AdamW(lr=0.1, weight_decay=0.3)
    groups = [("b$", {"weight_decay": 0.0}), ("^enc", {"lr": 0.01, "betas": (0.5, 0.6)}), ("r/", {"lr": 7.0})]
    own = {
        "encoder/w": replace(rule, lr=0.01, betas=(0.5, 0.6)),
        "encoder/b": replace(rule, weight_decay=0.0),
        "head/w": rule,
        "head/b": replace(rule, weight_decay=0.0),
    }
    params, alone = tree(), flat(tree())
    opt = ls.Optimizer(params, around(rule), groups=groups)
    others = {path: ls.Optimizer(p, around(own[path])) for path, p in alone.items()}
    for i in range(7):
        grads = tree(i + 1)
        opt.step(grads)
        for path, g in flat(grads).items():
            others[path].step(g)
    assert same_bits(flat(params).values(), alone.values())


@every_dtype
@every_case
def test_a_group_is_the_rule_with_its_hyper_parameters(case, dtype):
    other = {"lr": 0.03} | ({"weight_decay": 0.2} if "weight_decay" in case.hyper else {})
    grouped, plain = (np.linspace(-1, 1, 50, dtype=dtype) for _ in range(2))
    a = ls.Optimizer({"w": grouped}, ls.Lookahead(case.rule, 3), groups=[("w", other)])
    b = ls.Optimizer({"w": plain}, ls.Lookahead(replace(case.rule, **other), 3))
    for i in range(7):
        g = np.sin(np.arange(50) + i).astype(dtype)
        a.step({"w": g})
        b.step({"w": g})
    assert grouped.tobytes() == plain.tobytes()


def test_a_group_may_have_state_of_its_own():
    params = {"a": np.zeros(1), "b": np.zeros(1)}
    opt = ls.Optimizer(params, ls.SGD(lr=1.0), groups=[("b", {"momentum": 0.5})])
    for _ in range(2):
        opt.step({"a": np.ones(1), "b": np.ones(1)})
    assert (params["a"], params["b"]) == (-2.0, -2.5)
    assert (opt.state["a"], opt.state["b"]["m"]) == ({}, 1.5)


def test_a_bare_array_has_an_empty_path():
    p = np.ones(1)
    ls.Optimizer(p, ls.SGD(lr=1.0), groups=[("^$", {"lr": 0.5})]).step(np.ones(1))
    assert p == 0.5


@pytest.mark.parametrize("rule", [ls.Adam(lr=0.1), ls.Lookahead(ls.Lookahead(ls.Adam(lr=0.1), 2), 2)])
def test_a_frozen_leaf_is_untouched_and_costs_nothing(rule):
    params = tree()
    before = params["encoder"]["w"].tobytes()
    options = {"max_grad_norm": 1e9, "nonfinite": "raise"}
    opt = ls.Optimizer(params, rule, groups=[("encoder", {"frozen": True})], **options)
    head = tree()["head"]
    alone = ls.Optimizer(head, rule, **options)
    for i in range(5):
        grads = tree(i + 1)
        alone.step(grads["head"])
        # What its gradient is does not matter; it need not have one.
        grads["encoder"]["w"] = [np.full((3, 4), NAN), None][i % 2]
        opt.step(grads)
        assert opt.grad_norm == alone.grad_norm
        with opt.slow_weights() as slow:
            assert slow["encoder"]["w"].tobytes() == before
    opt.sync()
    alone.sync()
    assert params["encoder"]["w"].tobytes() == before
    assert opt.state["encoder/w"] == {}
    kept = opt.state_dict()["leaves"]["encoder/w"]
    assert [name for name, value in kept.items() if isinstance(value, np.ndarray)] == ["params"]
    assert opt.slow["encoder"]["w"].tobytes() == before
    assert same_bits(params["head"].values(), head.values())


def test_a_million_frozen_weights_take_no_memory_for_state():
    tracked = np.zeros(1_000_000)
    opt = ls.Optimizer([tracked, np.ones(2)], ls.Lookahead(ls.Adam()), groups=[("0", {"frozen": True})])
    size = sum(
        array.nbytes
        for leaf in opt.state_dict()["leaves"].values()
        for array in leaf.values()
        if hasattr(array, "nbytes")
    )
    assert size < tracked.nbytes + 1000


BAD_GROUPS = {
    "no list": ("b$", TypeError, "groups must be a list of pairs (pattern, dict), got str"),
    "a dict": ({"b$": {}}, TypeError, "groups must be a list of pairs (pattern, dict), got dict"),
    "no pair": ([("b$",)], TypeError, 'groups[0] must be a pair such as ("bias", {"weight_decay": 0.0})'),
    "no pattern": ([(3, {})], TypeError, "groups[0] must be a pair"),
    "no dict": ([("b$", 0.1)], TypeError, "groups[0] must be a pair"),
    "no regular expression": ([("(", {})], ValueError, "groups[0]: '(' is not a regular expression"),
    "unmatched": (
        [("b$", {}), ("bias", {})],
        ValueError,
        "groups[1]: no leaf matches 'bias'; leaves are encoder/w, encoder/b, head/w, head/b",
    ),
    "unknown": ([("b$", {"weight_deca": 0})], ValueError, "Adam has no 'weight_deca' (did you mean 'weight_decay'?)"),
    "far off": ([("b$", {"xyz": 0})], ValueError, "groups[0]: Adam has no 'xyz' (there are lr, betas, eps"),
    "sync_period": ([("b$", {"sync_period": 3})], ValueError, "sync_period is one for all leaves"),
    "out of range": ([("b$", {"lr": -1})], ValueError, "groups[0]: lr must be finite and >= 0, got -1"),
    "of another type": ([("b$", {"lr": "1"})], TypeError, "groups[0]: lr must be a real number, got str"),
    "slow_step out of range": ([("b$", {"slow_step": 1.5})], ValueError, "groups[0]: slow_step must be in [0, 1]"),
    "frozen by halves": ([("b$", {"frozen": 0.5})], TypeError, "groups[0]: frozen must be True or False, got float"),
    "overflow": ([("b$", {"lr": 1e39})], ValueError, "lr is too large for float32 parameters"),
}


@pytest.mark.parametrize(("groups", "error", "text"), BAD_GROUPS.values(), ids=BAD_GROUPS.keys())
def test_groups_that_cannot_be(groups, error, text):
    with pytest.raises(error) as caught:
        ls.Optimizer(tree(dtype="f4"), ls.Lookahead(ls.Adam()), groups=groups)
    assert caught.type is error
    assert text in str(caught.value)
    opt = ls.Optimizer(tree(dtype="f4"), ls.Lookahead(ls.Adam()), groups=[("b$", {"lr": 0.5})])
    opt.step(tree(1, "f4"))
    before = snapshot(opt)
    with pytest.raises(error) as caught:
        opt.groups = groups
    assert text in str(caught.value)
    assert snapshot(opt) == before


@pytest.mark.parametrize(
    "rule", [ls.Adam(), ls.Lookahead(ls.Lookahead(ls.Adam())), ls.Lookahead(ls.Adam(), 5, ls.OptimalSlowStep())]
)
def test_a_group_has_a_slow_step_within_a_single_lookahead_only(rule):
    text = "Adam has no 'slow_step'" if isinstance(rule, ls.Adam) else "slow_step of a group needs a single Lookahead"
    with pytest.raises(ValueError, match=text):
        ls.Optimizer(tree(), rule, groups=[("b", {"slow_step": 0.3})])


# What can be changed while it runs


def test_lr_is_changed_from_the_next_step_on():
    params = {"a": np.zeros(1), "b": np.zeros(1)}
    opt = ls.Optimizer(params, ls.Lookahead(ls.Lookahead(ls.SGD(lr=1.0), 100), 100), groups=[("b", {"lr": 0.25})])
    opt.step({"a": np.ones(1), "b": np.ones(1)})
    opt.lr = np.float32(2)
    opt.step({"a": np.ones(1), "b": np.ones(1)})
    # The group keeps its own.
    assert (params["a"], params["b"]) == (-3, -0.5)
    assert (opt.lr, opt.rule.inner.inner) == (2.0, ls.SGD(lr=2.0))


def test_an_lr_that_follows_a_schedule_is_not_set_but_replaced():
    p = np.zeros(1)
    opt = ls.Optimizer(p, ls.Lookahead(ls.SGD(lr=Linear(1.0, 0.0, steps=4)), 100))
    seen = []
    for _ in range(6):
        seen.append(opt.lr)
        opt.step(np.ones(1))
    assert seen == [1, 0.75, 0.5, 0.25, 0, 0]
    assert p == -2.5
    with pytest.raises(ValueError, match=r"lr follows Linear.*: set opt.rule to a rule with another lr"):
        opt.lr = 0.5
    opt.rule = replace(opt.rule, inner=ls.SGD(lr=0.5))
    opt.step(np.ones(1))
    assert (opt.lr, p) == (0.5, -3)
    opt.lr = 0.25
    assert opt.lr == 0.25


@every_case
def test_a_rule_is_changed_from_the_next_step_on(case):
    def grads():
        rng = np.random.default_rng(1)
        return [rng.standard_normal(40) for _ in range(9)]

    other = replace(case.rule, lr=0.02)
    changed, expected = np.linspace(-1, 1, 40), np.linspace(-1, 1, 40)
    opt = ls.Optimizer(changed, ls.Lookahead(case.rule, 4, 0.5))
    twin = ls.Optimizer(
        expected, ls.Lookahead(replace(case.rule, lr=lambda t: 0.02 if t >= 5 else case.rule.lr), 4, 0.5)
    )
    for i, g in enumerate(grads()):
        if i == 5:
            opt.rule = ls.Lookahead(other, 4, 0.5)
            assert opt.rule.inner == other
        opt.step(g)
        twin.step(g)
    assert changed.tobytes() == expected.tobytes()


OTHER_RULES = {
    "another": ls.Lookahead(ls.RAdam(), 3),
    "other state": ls.Lookahead(ls.Adam(amsgrad=True), 3),
    "alone": ls.Adam(),
    "one more": ls.Lookahead(ls.Lookahead(ls.Adam(), 3), 3),
    "another period": ls.Lookahead(ls.Adam(), 4),
    "reset": ls.Lookahead(ls.Adam(), 3, inner_state="reset"),
    "outer": ls.Lookahead(ls.Adam(), 3, outer=ls.HeavyBall(0.5)),
    "measured": ls.Lookahead(ls.Adam(), 3, ls.OptimalSlowStep()),
}


@pytest.mark.parametrize("rule", OTHER_RULES.values(), ids=OTHER_RULES.keys())
def test_a_rule_that_needs_another_state_is_refused(rule):
    opt = ls.Optimizer(tree(), ls.Lookahead(ls.Adam(), 3), groups=[("b$", {"lr": 0.5})])
    opt.step(tree(1))
    before = snapshot(opt)
    with pytest.raises(ValueError, match="build a new one"):
        opt.rule = rule
    assert snapshot(opt) == before


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("rule", ls.Adam, TypeError),
        ("rule", None, TypeError),
        ("rule", ls.Lookahead(ls.Adam(lr=1e39), 3), ValueError),
        ("rule", ls.Lookahead(ls.Adam(lr=lambda t: 0.1 if t == 0 else -1.0), 3), ValueError),
        ("lr", -1, ValueError),
        ("lr", NAN, ValueError),
        ("lr", 1e39, ValueError),
        ("lr", "0.1", TypeError),
        ("lr", None, TypeError),
        ("lr", True, TypeError),
        ("groups", [("b$", {"frozen": True})], ValueError),
        ("groups", [("b$", {"amsgrad": True})], ValueError),
        ("groups", [("b$", {"lr": 0.5}), ("w$", {"lr": lambda t: 0.1 if t == 0 else -1.0})], ValueError),
        ("groups", [("b$", {"lr": 0.5}), ("w$", {"lr": 1e39})], ValueError),
        ("groups", None, TypeError),
    ],
)
def test_a_change_that_cannot_be_changes_nothing(name, value, error):
    opt = ls.Optimizer(tree(dtype="f4"), ls.Lookahead(ls.Adam(), 3), groups=[("b$", {"lr": 0.5})])
    for i in range(4):
        opt.step(tree(i, "f4"))
    before = snapshot(opt)
    with pytest.raises(error):
        setattr(opt, name, value)
    assert snapshot(opt) == before


def test_groups_are_changed_from_the_next_step_on():
    params = {"a": np.zeros(1), "b": np.zeros(1)}
    opt = ls.Optimizer(params, ls.Lookahead(ls.SGD(lr=1.0), 100), groups=[("b", {"lr": 0.5})])
    opt.step({"a": np.ones(1), "b": np.ones(1)})
    opt.groups = [("b", {"lr": 0.25, "slow_step": 1.0})]
    opt.step({"a": np.ones(1), "b": np.ones(1)})
    assert (params["a"], params["b"]) == (-2, -0.75)
    opt.sync()
    assert (params["a"], params["b"]) == (-1, -0.75)
    assert opt.groups == (("b", {"lr": 0.25, "slow_step": 1.0}),)


@every_case
def test_leaves_are_regrouped_with_the_state_that_they_have(case):
    """As optimizers of one leaf each, whose rule is set to that of the leaf's group."""
    params, alone = tree(), flat(tree())
    plans = [[], [("b$", {"lr": 0.02})], [("head", {"lr": 0.03}), ("b$", {"maximize": True})], []]
    opt = ls.Optimizer(params, ls.Lookahead(case.rule, 3))
    others = {path: ls.Optimizer(p, opt.rule) for path, p in alone.items()}
    if isinstance(case.rule, ls.Prodigy):
        return  # Its estimate is one for all leaves.
    for i in range(8):
        opt.groups = plans[i // 2]
        for path, other in others.items():
            own = next((different for pattern, different in plans[i // 2] if re.search(pattern, path)), {})
            other.rule = ls.Lookahead(replace(case.rule, **own), 3)
        grads = tree(i + 1)
        opt.step(grads)
        for path, g in flat(grads).items():
            others[path].step(g)
        assert same_bits(flat(params).values(), alone.values())


def test_what_groups_gives_is_a_copy():
    opt = ls.Optimizer({"b": np.zeros(1)}, ls.SGD(lr=1.0), groups=[("b", {"lr": 0.5})])
    opt.groups[0][1]["lr"] = 7.0
    assert opt.groups == (("b", {"lr": 0.5}),)


# Schedules


SCHEDULES = {
    "linear": Linear(0.1, 0.0, steps=9),
    "cosine": Cosine(0.1, 0.01, steps=6),
    "step": Step(0.1, factor=0.5, every=2),
    "exponential": Exponential(0.1, factor=0.7),
    "joined": Joined([Linear(0.0, 0.1, steps=3), Constant(0.1), Linear(0.1, 0.0, steps=4)], [3, 5]),
    "function": lambda step: 0.1 / (1 + step),
    "of-numpy": lambda step: np.float32(0.1) if step % 2 else np.array(1),
}


@every_case
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_a_schedule_is_an_lr_that_is_set_at_each_step(schedule, case):
    following, by_hand = np.linspace(-1, 1, 40), np.linspace(-1, 1, 40)
    a = ls.Optimizer(following, ls.Lookahead(replace(case.rule, lr=schedule), 3, 0.4))
    b = ls.Optimizer(by_hand, ls.Lookahead(replace(case.rule, lr=0.5), 3, 0.4))
    for i in range(10):
        b.lr = schedule(i)
        assert a.lr == b.lr
        g = np.sin(np.arange(40) + i)
        a.step(g)
        b.step(g)
        assert following.tobytes() == by_hand.tobytes()


def follows(rule, name):
    """Whether a hyper-parameter of this rule is one that may follow a schedule."""
    try:
        return bool(replace(rule, **{name: Constant(0.5)}))
    except TypeError:
        return False


OTHERS = {
    f"{name}-{hyper}": (case, hyper)
    for name, case in CASES.items()
    for hyper in SCHEDULED
    if hyper != "lr" and follows(case.rule, hyper)
}


@pytest.mark.parametrize(("case", "name"), OTHERS.values(), ids=OTHERS.keys())
def test_other_hyper_parameters_follow_schedules_too(case, name):
    schedule = Linear(0.9, 0.1, steps=7)
    following, by_hand = np.linspace(-1, 1, 40), np.linspace(-1, 1, 40)
    a = ls.Optimizer(following, replace(case.rule, **{name: schedule}))
    b = ls.Optimizer(by_hand, replace(case.rule, **{name: 0.5}))
    for i in range(10):
        b.rule = replace(b.rule, **{name: schedule(i)})
        g = np.sin(np.arange(40) + i)
        a.step(g)
        b.step(g)
        assert following.tobytes() == by_hand.tobytes()


@pytest.mark.parametrize("bad", [-0.1, NAN, INF, "0.1", None, np.ones(2)], ids=str)
@pytest.mark.parametrize("where", ["lr", "weight_decay", "slow_step", "outer slow_step", "group lr", "group slow_step"])
def test_a_schedule_that_gives_what_cannot_be_is_refused_at_that_step(where, bad):
    def schedule(step):
        return bad if step == 4 else 0.1

    rule = ls.Lookahead(ls.AdamW(), 3)
    name = where.split()[-1]
    groups, prefix = None, ""
    match where:
        case "lr" | "weight_decay":
            rule = ls.Lookahead(ls.AdamW(**{name: schedule}), 3)
        case "slow_step":
            rule = replace(rule, slow_step=schedule)
        case "outer slow_step":
            rule = ls.Lookahead(rule, 2, schedule)
        case _:
            groups, prefix = [("b$", {name: schedule})], r"groups\[0\]: "
    opt = ls.Optimizer(tree(), rule, groups=groups)
    for i in range(4):
        opt.step(tree(i))
    arrays, rest, *_ = opt.state_dict()["leaves"], opt.steps, opt.syncs
    for _ in range(2):
        with pytest.raises(
            (ValueError, TypeError), match=rf"^{prefix}{name} must be .*at step 4, from <function"
        ) as caught:
            opt.step(tree(9))
        assert caught.type is (TypeError if isinstance(bad, str | None | np.ndarray) else ValueError)
    after = opt.state_dict()["leaves"]
    assert opt.steps == rest == 4
    for path, leaf in arrays.items():
        assert all(np.asarray(value).tobytes() == np.asarray(after[path][key]).tobytes() for key, value in leaf.items())


def test_what_a_schedule_raises_is_raised_before_anything_moves():
    def schedule(step):
        if step == 2:
            raise LookupError("no lr for step 2")
        return 0.1

    p = np.ones(3)
    opt = ls.Optimizer(p, ls.SGD(lr=schedule))
    for _ in range(2):
        opt.step(np.ones(3))
    before = p.copy()
    with pytest.raises(LookupError, match="no lr for step 2"):
        opt.step(np.ones(3))
    assert (p == before).all()
    assert opt.steps == 2


@pytest.mark.parametrize("bad", [-1.0, "x"])
def test_a_schedule_is_asked_for_step_0_when_the_rule_is_made(bad):
    with pytest.raises((ValueError, TypeError), match=r"lr must be .*at step 0"):
        ls.SGD(lr=lambda step: bad)


def test_a_schedule_counts_applied_steps():
    """Neither those that are skipped, nor those that are refused, nor those that only measure."""
    p = np.zeros(1)
    rule = ls.Lookahead(ls.SGD(lr=lambda step: 10.0**-step), 2, ls.OptimalSlowStep(low=1.0))
    opt = ls.Optimizer(p, rule, nonfinite="skip")
    expected = 0.0
    for i, g in enumerate([1, NAN, 1, INF, NAN, 1, 1, NAN, 1, 1]):
        with pytest.raises(ValueError, match="shape"):
            opt.step(np.ones(2))
        opt.step(np.array([float(g)]))
        # Of ten, four are skipped, and two measure.
        expected -= {0: 1, 2: 0.1, 6: 0.01, 8: 0.001}.get(i, 0)
        assert p == pytest.approx(expected, rel=1e-12)
    assert (opt.steps, opt.skipped, opt.syncs) == (4, 4, 2)


# The gradient


def prepared(leaves, *, scale=1.0, most=None, norm=None, limit=None, axis=None):
    """What the rule is to see of float32 gradients, each operation rounded once; `limit` is that of the norm."""
    out = []
    for g in leaves:
        if g is not None:
            g = g.astype("f4") * np.float32(scale)
            if most is not None:
                g = np.clip(g, -np.float32(most), np.float32(most))
            if norm is not None and norm > limit:
                g = g * np.float32(limit / norm)
            if axis is not None and g.ndim > 1:
                axes = tuple(a for a in range(g.ndim) if a != axis % g.ndim)
                g = g - g.mean(axis=axes, dtype="f8", keepdims=True).astype("f4")
        out.append(g)
    return out


def norm_of(leaves):
    return math.sqrt(math.fsum(float(x) ** 2 for g in leaves if g is not None for x in np.float64(g).ravel()))


SHAPES = [(5, 8), (40,), (4, 6, 7), (1, 1)]


def strided(g):
    """The same numbers, backwards and two apart."""
    view = np.zeros((*g.shape[:-1], 2 * g.shape[-1]), g.dtype)[..., ::-2]
    view[...] = g
    view.flags.writeable = False
    return view


def columns(g):
    return np.asfortranarray(g)


@every_case
@pytest.mark.parametrize("layout", [np.ascontiguousarray, strided, columns])
@pytest.mark.parametrize("axis", [0, -1])
def test_a_gradient_is_scaled_clipped_by_value_then_by_norm_and_centralised(axis, layout, case):
    rng = np.random.default_rng(0)
    starts = [rng.standard_normal(shape).astype("f4") for shape in SHAPES]
    params, expected = [p.copy() for p in starts], [p.copy() for p in starts]
    options = {"max_grad_norm": 3.0, "max_grad_value": 0.75, "centralize": axis}
    opt = ls.Optimizer(params, ls.Lookahead(case.rule, 2), **options)
    plain = ls.Optimizer(expected, ls.Lookahead(case.rule, 2))
    for i in range(5):
        grads = [rng.standard_normal(shape).astype("f4") for shape in SHAPES]
        if i == 2:
            grads[i % 3] = None
        scale = [1.0, 0.25, 3.7, 0.1, 1.0][i]
        opt.step([g if g is None else layout(g) for g in grads], scale=scale)
        norm = norm_of(prepared(grads, scale=scale, most=0.75))
        # A sum of n squares, each exact in float64 or rounded once, is right to n roundings at the very most.
        assert opt.grad_norm == pytest.approx(norm, rel=300 * 2**-53)
        assert (norm > 3) == (i != 3)
        plain.step(prepared(grads, scale=scale, most=0.75, norm=opt.grad_norm, limit=3.0, axis=axis))
    # What the means are taken of are few numbers of 24 bits, so that their sums are exact in any order.
    assert same_bits(params, expected)


def test_options_in_float64():
    rng = np.random.default_rng(0)
    params = [rng.standard_normal(shape) for shape in SHAPES]
    starts = [p.copy() for p in params]
    grads = [rng.standard_normal(shape) for shape in SHAPES]
    options = {"max_grad_norm": 3.0, "max_grad_value": 1.5, "centralize": -1}
    ls.Optimizer(params, ls.SGD(lr=1.0), **options).step(grads, scale=2.2)
    clipped = [np.clip(g * 2.2, -1.5, 1.5) for g in grads]
    for p, start, g in zip(params, starts, clipped, strict=True):
        g = g * (3.0 / norm_of(clipped))
        if g.ndim > 1:
            g = g - g.mean(axis=tuple(range(g.ndim - 1)), keepdims=True)
        np.testing.assert_allclose(p, start - g, rtol=1e-13, atol=1e-14)


@every_dtype
def test_clipping_by_norm_leaves_a_shorter_gradient_alone(dtype):
    g = np.array([3.0, -4.0], dtype)
    for most, factor in ((5.0, 1.0), (5.1, 1.0), (1e300, 1.0), (2.5, 0.5)):
        clipped, plain = np.array([0.1, 0.7], dtype), np.array([0.1, 0.7], dtype)
        opt = ls.Optimizer(clipped, ls.Adam(lr=0.1), max_grad_norm=most)
        opt.step(g)
        ls.Optimizer(plain, ls.Adam(lr=0.1)).step(g * dtype_of(dtype)(factor))
        assert clipped.tobytes() == plain.tobytes()
        assert opt.grad_norm == 5.0


def dtype_of(dtype):
    return np.dtype(dtype).type


def test_the_norm_of_millions_of_small_numbers_is_right():
    g = np.full(4_000_003, 1e-3, "f4")
    g[0] = 1.0  # In float32, each of the others would vanish beside it.
    p = np.zeros_like(g)
    opt = ls.Optimizer(p, ls.SGD(lr=1.0), max_grad_norm=1e-3)
    opt.step(g)
    exact = math.sqrt(1.0 + 4_000_002 * float(np.float32(1e-3)) ** 2)
    assert opt.grad_norm == pytest.approx(exact, rel=1e-12)
    assert np.linalg.norm(p.astype("f8")) == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize(
    "size", [1e-320, 1e-305, 1e-200, 1e-160, 1e-100, 1e-20, 1.0, 1e20, 1e100, 1e153, 1e154, 1e200, 1e307]
)
def test_the_norm_neither_overflows_nor_vanishes_in_float64(size):
    p = np.zeros(2)
    opt = ls.Optimizer(p, ls.SGD(lr=1.0), max_grad_norm=size)
    opt.step(np.array([3 * size, -4 * size]))
    exact = 5 * size
    assert opt.grad_norm == pytest.approx(exact, rel=1e-13 if size > 1e-307 else 1e-3)
    np.testing.assert_allclose(p, [-0.6 * size, 0.8 * size], rtol=1e-12 if size > 1e-307 else 1e-2)


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e-10, 1e10, 1e19, 1e30, 8e37])
def test_the_norm_neither_overflows_nor_vanishes_in_float32(size):
    g = np.array([3 * size, -4 * size], "f4")
    opt = ls.Optimizer(np.zeros(2, "f4"), ls.SGD(), max_grad_norm=1.0)
    opt.step(g)
    assert opt.grad_norm == pytest.approx(np.hypot(*g.astype("f8")), rel=1e-15)


def test_float32_and_float64_leaves_have_one_norm():
    params = [np.zeros(1, "f4"), np.zeros(1, "f8"), np.zeros(1, "f2"), np.zeros(1, ml_dtypes.bfloat16)]
    opt = ls.Optimizer(params, ls.SGD(lr=1.0), max_grad_norm=2.5)
    opt.step([p + p.dtype.type(g) for p, g in zip(params, (1, 2, 2, 4), strict=True)])
    assert opt.grad_norm == 5.0
    assert [float(p[0]) for p in params] == [-0.5, -1, -1, -2]


@every_dtype
def test_the_norm_does_not_depend_on_how_gradients_lie(dtype):
    """Bit for bit; where parameters lie otherwise, their own order is gone by, and the last bits may differ."""
    rng = np.random.default_rng(0)
    # More than a chunk, and no whole number of tiles.
    g = rng.standard_normal((300, 301)).astype(dtype)

    def norm(p, g):
        opt = ls.Optimizer(p, ls.SGD(), max_grad_norm=1.0)
        opt.step(g)
        return opt.grad_norm

    expected = norm(np.zeros_like(g), g)
    wide = np.zeros((300, 602), dtype)
    for of_param in (np.zeros_like(g), wide[:, ::2], wide[::-1, 1::2]):
        for of_gradient in (g, columns(g), strided(g)):
            assert norm(of_param, of_gradient) == expected
    for of_gradient in (g, columns(g), strided(g)):
        assert norm(columns(np.zeros_like(g)), of_gradient) == pytest.approx(expected, rel=1e-14)


def test_grad_norm_is_of_the_last_step():
    params = [np.zeros(2), np.zeros(2)]
    opt = ls.Optimizer(params, ls.SGD())
    opt.step([np.ones(2), np.ones(2)])
    assert opt.grad_norm is None
    opt = ls.Optimizer(params, ls.SGD(), nonfinite="skip", max_grad_value=4.0)
    assert opt.grad_norm is None
    opt.step([np.array([3.0, -4.0]), None])
    assert opt.grad_norm == 5
    opt.step([np.array([3.0, -8.0]), None])  # Clipped by value first.
    assert opt.grad_norm == 5
    opt.step([np.array([3.0, 0.0]), np.array([0.0, 4.0])], scale=0.5)
    assert opt.grad_norm == 2.5
    opt.step([None, None])
    assert opt.grad_norm == 0
    opt.step([np.array([NAN, 0.0]), None])
    assert math.isnan(opt.grad_norm)
    assert opt.skipped == 1


@every_case
@every_dtype
@pytest.mark.parametrize("exponent", [-20, -1, 3])
def test_a_scale_is_a_gradient_times_it(exponent, dtype, case):
    scaled, plain = np.linspace(-1, 1, 70, dtype=dtype), np.linspace(-1, 1, 70, dtype=dtype)
    a, b = ls.Optimizer(scaled, ls.Lookahead(case.rule, 2)), ls.Optimizer(plain, ls.Lookahead(case.rule, 2))
    for i in range(5):
        g = np.sin(np.arange(70) + i).astype(dtype)
        a.step(g, scale=2.0**exponent)
        b.step(g * dtype_of(dtype)(2.0**exponent))
    assert scaled.tobytes() == plain.tobytes()


@every_case
@every_dtype
def test_to_maximize_is_to_step_by_negated_gradients(dtype, case):
    up, down = np.linspace(-1, 1, 70, dtype=dtype), np.linspace(-1, 1, 70, dtype=dtype)
    other = replace(case.rule, maximize=not case.rule.maximize)
    a = ls.Optimizer(up, ls.Lookahead(other, 2), max_grad_norm=1.0, max_grad_value=0.7)
    b = ls.Optimizer(down, ls.Lookahead(case.rule, 2), max_grad_norm=1.0, max_grad_value=0.7)
    for i in range(5):
        g = np.sin(np.arange(70) + i).astype(dtype)
        a.step(g)
        b.step(-g)
        assert a.grad_norm == b.grad_norm
    assert up.tobytes() == down.tobytes()


def test_a_group_may_be_maximized():
    params = {"a": np.zeros(1), "b": np.zeros(1)}
    opt = ls.Optimizer(params, ls.SGD(lr=1.0), groups=[("b", {"maximize": True})], max_grad_value=0.5)
    opt.step({"a": np.ones(1), "b": np.ones(1)})
    assert (params["a"], params["b"]) == (-0.5, 0.5)


@every_dtype
@pytest.mark.parametrize("axis", [0, -1, 1, -2])
@pytest.mark.parametrize("of_param", [np.ascontiguousarray, columns])
@pytest.mark.parametrize("shape", [(5, 8), (3, 4, 5), (2, 3, 600), (4, 0, 3), (6, 1)], ids=str)
def test_centralised_gradients_have_no_mean(shape, of_param, axis, dtype):
    g = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    # Means of a mean of 10, so that what is taken away is most of it.
    g = g + dtype_of(dtype)(10)
    p = of_param(np.zeros(shape, dtype))
    bias = np.zeros(3, dtype)
    opt = ls.Optimizer([p, bias], ls.SGD(lr=1.0), centralize=axis if -2 <= axis < 2 else None)
    opt.step([g, np.ones(3, dtype)])
    axes = tuple(a for a in range(g.ndim) if a != axis % g.ndim)
    with np.errstate(invalid="ignore"):
        expected = -(g - g.mean(axis=axes, dtype="f8", keepdims=True).astype(dtype)) if g.size else -g
    # A sum of n numbers of about 10 in float64, then a mean and a difference in the leaf's own format.
    error = 10 * (g.size * 2**-53 + 2 * np.finfo(dtype).eps)
    np.testing.assert_allclose(p, expected, rtol=0, atol=error)
    if g.size:
        assert np.abs(p.mean(axis=axes, dtype="f8")).max() < error
    assert (bias == -1).all()


BAD_OPTIONS = {
    "max_grad_norm": [
        (0, ValueError),
        (-1, ValueError),
        (NAN, ValueError),
        (INF, ValueError),
        ("1", TypeError),
        (True, TypeError),
    ],
    "max_grad_value": [(0.0, ValueError), (-1, ValueError), (NAN, ValueError), (INF, ValueError), ([1], TypeError)],
    "nonfinite": [("drop", ValueError), (None, ValueError), (0, ValueError)],
    "centralize": [(1.5, TypeError), (True, TypeError), ("0", TypeError), (2, ValueError), (-3, ValueError)],
    "master_weights": [(1, TypeError), (None, TypeError), ("yes", TypeError)],
    "state_dtype": [("float16", ValueError), ("float32", ValueError), (np.float16, ValueError)],
    "rounding": [("up", ValueError), (None, ValueError)],
    "seed": [(-1, ValueError), (2**32, ValueError), (0.5, TypeError), (None, TypeError)],
}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [(name, value, error) for name, rows in BAD_OPTIONS.items() for value, error in rows],
    ids=str,
)
def test_an_option_that_cannot_be(name, value, error):
    with pytest.raises(error, match="centralize" if name == "centralize" else f"^{name} must be "):
        ls.Optimizer(tree(), ls.SGD(), **{name: value})


def test_options_may_be_numbers_of_numpy():
    p = np.zeros((2, 2), "f4")
    options = {"max_grad_norm": np.float32(1), "max_grad_value": np.array(0.5), "centralize": np.int64(-1)}
    ls.Optimizer(p, ls.SGD(), seed=np.uint32(7), master_weights=np.True_, **options).step(np.ones((2, 2), "f4"))


@pytest.mark.parametrize(
    ("scale", "error"),
    [
        (-1.0, ValueError),
        (NAN, ValueError),
        (INF, ValueError),
        ("1", TypeError),
        (None, TypeError),
        (True, TypeError),
        (np.ones(1), TypeError),
        (np.ones(2), TypeError),
        (1 + 0j, TypeError),
    ],
)
def test_a_scale_that_cannot_be_changes_nothing(scale, error):
    opt = ls.Optimizer(tree(dtype="f4"), ls.Lookahead(ls.Adam()))
    opt.step(tree(1, "f4"))
    before = snapshot(opt)
    with pytest.raises(error, match=r"^scale ") as caught:
        opt.step(tree(2, "f4"), scale=scale)
    assert caught.type is error
    assert snapshot(opt) == before


def test_a_scale_of_any_real_number():
    p = np.zeros(1)
    opt = ls.Optimizer(p, ls.SGD(lr=1.0))
    for scale in (2, np.float32(0.5), np.array(1.0), 1, 0, 1e39):
        p[:] = 0
        opt.step(np.ones(1), scale=scale)
        assert p == -float(scale)


@pytest.mark.parametrize(("scale", "size"), [(1e39, 1e-37), (1e-50, 1e37)])
def test_a_scale_that_float32_cannot_hold_is_one_all_the_same(scale, size):
    p = np.zeros(2, "f4")
    ls.Optimizer(p, ls.SGD(lr=1.0)).step(np.array([size, 0], "f4"), scale=scale)
    assert p.tolist() == [-float(np.float32(float(np.float32(size)) * scale)), 0]


# Gradients that are not finite


NONFINITE = {
    "nan": (lambda g: put(g, NAN), {}),
    "inf": (lambda g: put(g, INF), {}),
    "-inf": (lambda g: put(g, -INF), {}),
    "scaled": (lambda g: put(g, 1e30), {"scale": 1e10}),
}


def put(g, value):
    g = g.copy()
    g[-1] = value
    return g


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"max_grad_value": 1.0}, {"centralize": 0}], ids=str)
@pytest.mark.parametrize(("spoil", "step"), NONFINITE.values(), ids=NONFINITE.keys())
@pytest.mark.parametrize("where", ["encoder/b", "head/b"])
def test_a_step_that_is_refused_or_skipped_moves_nothing(where, spoil, step, options):
    rule = ls.Lookahead(ls.Adam(lr=0.1), 3, inner_state="pullback")
    raising = ls.Optimizer(tree(dtype="f4"), rule, nonfinite="raise", **options)
    skipping = ls.Optimizer(tree(dtype="f4"), rule, nonfinite="skip", **options)
    for opt in raising, skipping:
        opt.step(tree(1, "f4"))
    part, name = where.split("/")
    for i in range(2, 6):
        bad = tree(i, "f4")
        bad[part][name] = spoil(bad[part][name])
        before = snapshot(raising)
        with pytest.raises(FloatingPointError, match=rf'^grads\["{where}"\] is not finite'):
            raising.step(bad, **step)
        assert snapshot(raising) == before
        before = snapshot(skipping)
        skipping.step(bad, **step)
        after = snapshot(skipping)
        assert after[0] == before[0]
        assert after[1] == before[1] | {"skipped": i - 1}
        assert skipping.skipped == i - 1
        for opt in raising, skipping:
            opt.step(tree(i, "f4"))
    assert raising.skipped == 0
    assert snapshot(raising)[0] == snapshot(skipping)[0]
    # And as if they had never been: the cycle did not advance.
    plain = ls.Optimizer(tree(dtype="f4"), rule, **options)
    for i in range(1, 6):
        plain.step(tree(i, "f4"))
    assert snapshot(plain)[0] == snapshot(raising)[0]
    assert (plain.steps, plain.syncs) == (raising.steps, raising.syncs) == (5, 1)


@pytest.mark.parametrize("dtype", ["f2", ml_dtypes.bfloat16, "f4", "f8"])
@pytest.mark.parametrize("size", [1, 33, 70_000])
@pytest.mark.parametrize("at", [0, -1])
def test_one_element_of_any_dtype_is_found(at, size, dtype):
    p = np.zeros(size, dtype)
    opt = ls.Optimizer([np.zeros(3), p], ls.SGD(), nonfinite="raise")
    g = np.zeros(size, dtype)
    opt.step([np.zeros(3), g])
    for value in (INF, -INF, NAN):
        g[at] = value
        with pytest.raises(FloatingPointError, match=r"^grads\[1\] is not finite"):
            opt.step([np.zeros(3), g])
    g[at] = np.finfo(g.dtype).max if dtype != ml_dtypes.bfloat16 else ml_dtypes.finfo(dtype).max
    opt.step([np.zeros(3), g])
    assert (opt.steps, opt.skipped) == (2, 0)


def test_the_first_leaf_that_is_not_finite_is_named():
    params = [np.zeros(1, "f8"), np.zeros(1, "f4"), np.zeros(1, "f8"), np.zeros(1, "f4")]
    opt = ls.Optimizer(params, ls.SGD(), nonfinite="raise")
    for bad in ([1, 2], [2, 3], [3], [0, 1], [1, 3]):
        grads = [np.full(1, NAN if i in bad else 1.0, p.dtype) for i, p in enumerate(params)]
        with pytest.raises(FloatingPointError, match=rf"^grads\[{bad[0]}\] is not finite"):
            opt.step(grads)


def test_by_default_what_is_not_finite_propagates():
    p = np.zeros(3)
    opt = ls.Optimizer(p, ls.SGD(lr=1.0))
    opt.step(np.array([1.0, INF, NAN]))
    assert p.tolist()[:2] == [-1, -INF]
    assert math.isnan(p[2])
    assert (opt.steps, opt.skipped) == (1, 0)
    clipped = np.zeros(3)
    ls.Optimizer(clipped, ls.SGD(lr=1.0), max_grad_value=2.0).step(np.array([1.0, INF, NAN]))
    assert clipped.tolist()[:2] == [-1, -2]
    assert math.isnan(clipped[2])


def test_a_measurement_is_skipped_too():
    w = np.array([1.0])
    opt = ls.Optimizer(w, ls.Lookahead(ls.SGD(lr=1.5), 1, ls.OptimalSlowStep(low=0.1)), nonfinite="skip")
    opt.step(w.copy())
    opt.step(np.array([NAN]))
    assert (w, opt.steps, opt.syncs, opt.skipped) == (-0.5, 1, 0, 1)
    opt.step(w.copy())
    assert (opt.steps, opt.syncs) == (1, 1)
    assert w == pytest.approx(0, abs=1e-15)


# Gradients as the user has them


@every_case
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1, "centralize": 0, "nonfinite": "raise"}], ids=str)
def test_gradients_are_only_read_and_may_share_memory_with_each_other(options, case):
    buffer = np.linspace(-1, 1, 60, dtype="f4")
    buffer.flags.writeable = False
    grads = [buffer[:40].reshape(5, 8), buffer[20:], np.broadcast_to(buffer[7], (3, 3)), buffer[10:50:2]]
    before = buffer.tobytes()
    params, expected = ([np.ones(g.shape, "f4") for g in grads] for _ in range(2))
    a, b = (ls.Optimizer(p, ls.Lookahead(case.rule, 2), **options) for p in (params, expected))
    for _ in range(4):
        a.step(grads)
        b.step([np.array(g) for g in grads])
    assert buffer.tobytes() == before
    assert same_bits(params, expected)
