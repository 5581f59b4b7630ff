"""Bad input gets an error that names the leaf and the cure, before a byte is written."""

import re
from collections import defaultdict
from contextlib import contextmanager
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

import lookstep as ls


@contextmanager
def refuses(error, *texts):
    """The block raises exactly this type, in words that hold all of `texts`."""
    with pytest.raises(error) as caught:
        yield
    assert caught.type is error
    for text in texts:
        assert text in str(caught.value)


NAN, INF = float("nan"), float("inf")
ADAMS = [ls.Adam, ls.AdamW, ls.RAdam, ls.NAdam, ls.Adamax, ls.AdaBelief, ls.Yogi, ls.Lion, ls.LAMB, ls.Prodigy]
RULES = [ls.SGD, *ADAMS, ls.Adagrad, ls.Adadelta, ls.RMSprop, ls.Rprop, ls.ASGD]
RULES += [ls.Adan, ls.Signum, ls.ScheduleFreeSGD, ls.ScheduleFreeAdamW, ls.LARS]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lr", [-0.1, NAN, INF, 10**400, np.float32(-1), np.array(NAN)])
def test_lr_out_of_range(rule, lr):
    with refuses(ValueError, "lr must be finite and >= 0, got "):
        rule(lr=lr)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lr", ["0.1", None, True, np.True_, 1 + 0j, np.ones(2), np.array([0.1]), np.array(True)])
def test_lr_of_another_type(rule, lr):
    with refuses(TypeError, "lr must be a real number, got "):
        rule(lr=lr)


@pytest.mark.parametrize("lr", [1, np.int8(1), np.float32(1), np.float16(1), np.array(1.0), np.array(1), Fraction(1)])
def test_any_real_number_is_an_lr(lr):
    rule = ls.SGD(lr)
    assert rule == ls.SGD(1.0)
    assert type(rule.lr) is float


@pytest.mark.parametrize("rule", ADAMS)
@pytest.mark.parametrize(
    ("betas", "text"),
    [
        ((1.0, 0.999), "betas[0] must be in [0, 1), got 1.0"),
        ((-0.1, 0.999), "betas[0] must be in [0, 1), got -0.1"),
        ((NAN, 0.999), "betas[0] must be in [0, 1), got nan"),
        ((0.9, 1.0), "betas[1] must be in [0, 1), got 1.0"),
        ((0.9,), "betas must have 2 values, got 1"),
        ((0.9, 0.99, 0.999), "betas must have 2 values, got 3"),
    ],
)
def test_betas_out_of_range(rule, betas, text):
    with refuses(ValueError, text):
        rule(betas=betas)


@pytest.mark.parametrize(
    ("betas", "text"),
    [(0.9, "betas must be 2 real"), (("a", 0.9), "betas[0] must be a real"), ({0.9, 0.99}, "betas must be 2 real")],
)
def test_betas_of_another_type(betas, text):
    with refuses(TypeError, text):
        ls.Adam(betas=betas)


def test_betas_of_zero_and_from_a_list_are_fine():
    assert ls.Adam(betas=[0, 0]).betas == (0.0, 0.0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [-1, NAN, INF])
@pytest.mark.parametrize(
    "name",
    ["eps", "weight_decay", "dampening", "momentum_decay", "lr_decay", "initial_accumulator_value", "lambd", "t0"],
)
def test_what_must_not_be_negative(rule, name, value):
    if name in rule.__dataclass_fields__:
        with refuses(ValueError, f"{name} must be finite and >= 0, got {value}"):
            rule(**{name: value})


@pytest.mark.parametrize("momentum", [-0.5, NAN, 2.0, 1])
def test_momentum_out_of_range(momentum):
    with refuses(ValueError, f"momentum must be in [0, 1), got {momentum}"):
        ls.SGD(momentum=momentum)


@pytest.mark.parametrize(("rule", "name"), [(ls.Adadelta, "rho"), (ls.RMSprop, "alpha"), (ls.ASGD, "alpha")])
@pytest.mark.parametrize("value", [-0.5, NAN, 1.5])
def test_what_must_not_be_over_one(rule, name, value):
    with refuses(ValueError, f"{name} must be in [0, 1], got {value}"):
        rule(**{name: value})


@pytest.mark.parametrize(
    ("hyper", "error", "text"),
    [
        ({"etas": (1.2, 0.5)}, ValueError, "etas must be a number in (0, 1) and one over 1, got (1.2, 0.5)"),
        ({"etas": (0, 1.2)}, ValueError, "etas must be a number in (0, 1) and one over 1"),
        ({"etas": (0.5, 1)}, ValueError, "etas must be a number in (0, 1) and one over 1"),
        ({"etas": (0.5, INF)}, ValueError, "etas[1] must be finite and >= 0, got inf"),
        ({"etas": 0.5}, TypeError, "etas must be 2 real numbers"),
        ({"step_sizes": (50, 1e-6)}, ValueError, "step_sizes must be the smallest and the largest, got (50, 1e-06)"),
        ({"step_sizes": (-1, 1)}, ValueError, "step_sizes[0] must be finite and >= 0, got -1"),
        ({"step_sizes": (1, 2, 3)}, ValueError, "step_sizes must have 2 values, got 3"),
    ],
)
def test_pairs_of_rprop(hyper, error, text):
    with refuses(error, text):
        ls.Rprop(**hyper)


@pytest.mark.parametrize(
    ("rule", "hyper", "text"),
    [
        (ls.Adan, {"betas": (0.9, 0.9)}, "betas must have 3 values, got 2"),
        (ls.Yogi, {"initial_accumulator_value": -1}, "initial_accumulator_value must be finite and >= 0, got -1"),
        (ls.ScheduleFreeSGD, {"momentum": 0}, "momentum must be in (0, 1), got 0"),
        (ls.ScheduleFreeAdamW, {"betas": (0, 0.9)}, "betas[0] must be in (0, 1), got 0"),
        (ls.ScheduleFreeSGD, {"warmup_steps": -1}, "warmup_steps must be an integer >= 0, got -1"),
        (ls.ScheduleFreeSGD, {"warmup_steps": 2**63}, "warmup_steps must be an integer >= 0 and < 2**63, got 9"),
        (ls.ScheduleFreeAdamW, {"r": -0.5}, "r must be finite and >= 0, got -0.5"),
        (ls.ScheduleFreeAdamW, {"weight_lr_power": NAN}, "weight_lr_power must be finite and >= 0, got nan"),
        (ls.LARS, {"trust_coefficient": INF}, "trust_coefficient must be finite and >= 0, got inf"),
        (ls.Prodigy, {"beta3": 1.0}, "beta3 must be in [0, 1), got 1.0"),
        (ls.Prodigy, {"d0": 0}, "d0 must be finite and > 0, got 0"),
        (ls.Prodigy, {"d_coef": -1}, "d_coef must be finite and >= 0, got -1"),
        (ls.Prodigy, {"growth_rate": 0.9}, "growth_rate must be >= 1, got 0.9"),
        (ls.Prodigy, {"growth_rate": NAN}, "growth_rate must be >= 1, got nan"),
    ],
)
def test_what_few_rules_have_out_of_range(rule, hyper, text):
    with refuses(ValueError, text):
        rule(**hyper)


@pytest.mark.parametrize(
    ("rule", "hyper", "text"),
    [
        (ls.ScheduleFreeSGD, {"warmup_steps": 2.5}, "warmup_steps must be an integer >= 0, got float 2.5"),
        (ls.Prodigy, {"beta3": "0.9"}, "beta3 must be a real number, got str"),
        (ls.Prodigy, {"growth_rate": None}, "growth_rate must be a real number, got NoneType"),
        (ls.Adan, {"no_prox": 1}, "no_prox must be True or False, got int 1"),
    ],
)
def test_what_few_rules_have_of_another_type(rule, hyper, text):
    with refuses(TypeError, text):
        rule(**hyper)


@pytest.mark.parametrize("hyper", [{}, {"momentum": 0.9, "dampening": 0.1}])
def test_nesterov_without_what_it_needs(hyper):
    with refuses(ValueError, "nesterov needs momentum > 0 and dampening == 0"):
        ls.SGD(nesterov=True, **hyper)


def test_a_flag_is_true_or_false():
    with refuses(TypeError, "amsgrad must be True or False, got int 1"):
        ls.Adam(amsgrad=1)
    with refuses(TypeError, "maximize must be True or False, got NoneType None"):
        ls.Rprop(maximize=None)


@pytest.mark.parametrize("rule", RULES)
def test_an_unknown_keyword(rule):
    with refuses(TypeError, f"{rule.__name__} got an unexpected keyword 'learning_rte'", "lr"):
        rule(learning_rte=0.1)
    with refuses(TypeError, "'maximise' (did you mean 'maximize'?)"):
        rule(maximise=True)
    with refuses(TypeError, "'period' (did you mean 'sync_period'?)"):
        ls.Lookahead(rule(), period=5)


def test_only_lr_is_positional():
    with pytest.raises(TypeError):
        ls.SGD(0.1, 0.9)


@pytest.mark.parametrize(
    ("period", "error"),
    [(0, ValueError), (-1, ValueError), (2**70, ValueError), (2.5, TypeError), (True, TypeError), ("5", TypeError)],
)
def test_sync_period(period, error):
    with refuses(error, "sync_period must be an integer >= 1, got "):
        ls.Lookahead(ls.SGD(), sync_period=period)


@pytest.mark.parametrize(("slow_step", "error"), [(1.5, ValueError), (-0.5, ValueError), (NAN, ValueError)])
def test_slow_step(slow_step, error):
    with refuses(error, f"slow_step must be in [0, 1], got {slow_step}"):
        ls.Lookahead(ls.SGD(), slow_step=slow_step)


def test_inner_state_names_its_choices():
    with refuses(ValueError, 'inner_state must be "keep", "reset" or "pullback", got \'rest\''):
        ls.Lookahead(ls.SGD(), inner_state="rest")


@pytest.mark.parametrize(("inner", "got"), [(ls.Adam, "the class Adam"), (0.1, "float"), (None, "NoneType")])
def test_what_is_no_rule(inner, got):
    with refuses(TypeError, "inner must be a rule such as Adam(lr=1e-3)", got):
        ls.Lookahead(inner)
    with refuses(TypeError, "rule must be a rule such as Lookahead(Adam(lr=1e-3))", got):
        ls.Optimizer(np.ones(1), inner)


def test_lr_that_is_set_is_checked_too():
    opt = ls.Optimizer(np.ones(1), ls.Lookahead(ls.Adam(lr=0.1)))
    with refuses(ValueError, "lr must be finite and >= 0, got -1"):
        opt.lr = -1
    with refuses(TypeError, "lr must be a real number, got str"):
        opt.lr = "0.1"
    assert opt.lr == 0.1


BAD_TREES = {
    "empty list": ([], ValueError, "params has no parameters"),
    "empty dict": ({}, ValueError, "params has no parameters"),
    "nothing within": ({"a": [], "b": {}}, ValueError, "params has no parameters"),
    "set": ({1, 2}, TypeError, "params must be an array or a list, tuple or dict of them, got set"),
    "generator": ((x for x in ()), TypeError, "params must be an array or a list, tuple or dict"),
    "string": ("w", TypeError, "params must be an array or a list, tuple or dict of them, got str"),
    "None": (None, TypeError, "params must be an array or a list, tuple or dict of them, got NoneType"),
    "one path twice": (
        {"a": {"b": np.ones(1)}, "a/b": np.ones(1)},
        ValueError,
        'params has two leaves of the path "a/b"',
    ),
}


@pytest.mark.parametrize(("params", "error", "text"), BAD_TREES.values(), ids=BAD_TREES.keys())
def test_a_tree_that_is_none(params, error, text):
    with refuses(error, text):
        ls.Optimizer(params, ls.SGD())


def read_only(x):
    x.flags.writeable = False
    return x


BAD_LEAVES = {
    "None": (None, TypeError, "must be a NumPy array, got NoneType"),
    "float": (1.0, TypeError, "must be a NumPy array, got float"),
    "NumPy scalar": (np.float32(1), TypeError, "must be a NumPy array, got float32"),
    "int": (np.ones(3, int), TypeError, "has dtype int64; supported: float16, bfloat16, float32, float64"),
    "bool": (np.ones(3, bool), TypeError, "has dtype bool"),
    "complex": (np.ones(3, complex), TypeError, "has dtype complex128"),
    "longdouble": (np.ones(3, np.longdouble), TypeError, "has dtype "),
    "object": (np.array([1.0, None]), TypeError, "has dtype object"),
    "structured": (np.zeros(3, [("x", "f4")]), TypeError, "has dtype [('x', '<f4')]"),
    "datetime": (np.zeros(3, "M8[s]"), TypeError, "has dtype datetime64[s]"),
    "string": (np.array(["a"]), TypeError, "has dtype <U1"),
    "float8": (np.ones(3, ml_dtypes.float8_e4m3fn), TypeError, "has dtype float8_e4m3fn"),
    "int4": (np.ones(3, ml_dtypes.int4), TypeError, "has dtype int4"),
    "byte-swapped": (np.ones(3, ">f4"), TypeError, "is byte-swapped (>f4)"),
    "byte-swapped half": (np.ones(3, ">f2"), TypeError, "is byte-swapped (>f2)"),
    "byte-swapped double": (np.ones(3, ">f8"), TypeError, "is byte-swapped (>f8)"),
    "read-only": (read_only(np.ones(3)), ValueError, "is read-only"),
    "from bytes": (np.frombuffer(bytes(8), "f4"), ValueError, "is read-only"),
    "repeated": (np.lib.stride_tricks.as_strided(np.ones(1), (3,), (0,)), ValueError, "overlaps itself"),
    "windows": (np.lib.stride_tricks.as_strided(np.ones(4), (3, 2), (8, 8)), ValueError, "overlaps itself"),
    "matrix": (np.ones((2, 2)).view(np.matrix), TypeError, "is a matrix: pass np.asarray(x)"),
    "masked": (np.ma.ones(3), TypeError, "is a MaskedArray: pass np.asarray(x)"),
    "recarray": (np.ones(3).view(np.recarray), TypeError, "is a recarray: pass np.asarray(x)"),
}


@pytest.mark.parametrize(("leaf", "error", "text"), BAD_LEAVES.values(), ids=BAD_LEAVES.keys())
def test_a_parameter_that_cannot_be_stepped(leaf, error, text):
    for params, name in (
        ({"b": leaf}, 'params["b"] '),
        ([np.ones(2), leaf], "params[1] "),
        ({"e": [leaf]}, 'params["e/0"] '),
    ):
        with refuses(error, name + text):
            ls.Optimizer(params, ls.SGD())


def test_a_read_only_memmap(tmp_path):
    np.ones(3).tofile(tmp_path / "w")
    with refuses(ValueError, "params is read-only"):
        ls.Optimizer(np.memmap(tmp_path / "w", "f8", "r"), ls.SGD())


def same_array(tmp_path):
    x = np.ones(4)
    return x, x


def overlapping_views(tmp_path):
    x = np.ones(4)
    return x[:3], x[2:]


def two_maps_of_a_buffer(tmp_path):
    buffer = bytearray(32)
    return np.frombuffer(buffer, "f8"), np.frombuffer(buffer, "f4", 2, 8)


def two_views_of_a_mapping(tmp_path):
    x = np.memmap(tmp_path / "w", "f8", "w+", shape=4)
    return np.asarray(x)[::2], x[2:]


@pytest.mark.parametrize("pair", [same_array, overlapping_views, two_maps_of_a_buffer, two_views_of_a_mapping])
def test_parameters_that_share_memory(pair, tmp_path):
    b, a = pair(tmp_path)
    with refuses(ValueError, 'params["b"] shares memory with params["a"]'):
        ls.Optimizer({"a": a, "b": b}, ls.SGD())


class Trained:
    """An optimizer in the middle of a cycle, over a tree; nothing of it changes in a block of `unchanged()`."""

    def __init__(self):
        self.buffer = bytearray(np.arange(12.0).tobytes())
        w = np.frombuffer(self.buffer).reshape(3, 4)
        self.params = {"w": w, "b": np.ones(4, "f4"), "deep": [np.ones(2), np.array(5.0)]}
        self.opt = ls.Optimizer(self.params, ls.Lookahead(ls.Adam(lr=0.1), sync_period=4))
        for _ in range(6):
            self.opt.step(self.grads())

    def grads(self, **changes):
        w, b, deep = self.params["w"], self.params["b"], self.params["deep"]
        return {"w": w * 2, "b": b * 2, "deep": [deep[0] * 2, np.array(1.0)]} | changes

    def bytes(self):
        opt = self.opt
        arrays = [self.params["w"], self.params["b"], *self.params["deep"], opt.slow["w"], opt.slow["b"]]
        arrays += [array for leaf in opt.state.values() for array in leaf.values()]
        return [array.tobytes() for array in arrays], opt.steps, opt.syncs, opt.rule

    @contextmanager
    def unchanged(self):
        before = self.bytes()
        yield
        assert self.bytes() == before


@pytest.fixture
def trained():
    return Trained()


BAD_GRADS = {
    "missing": (lambda t: {"w": t["w"], "deep": t["deep"]}, ValueError, 'grads["b"] is missing'),
    "extra": (lambda t: t | {"c": np.ones(1)}, ValueError, 'grads["c"] is not in params'),
    "renamed": (lambda t: {"w": t["w"], "bias": t["b"], "deep": t["deep"]}, ValueError, 'grads["b"] is missing'),
    "shorter": (lambda t: t | {"deep": t["deep"][:1]}, ValueError, 'grads["deep/1"] is missing'),
    "longer": (lambda t: t | {"deep": [*t["deep"], np.ones(1)]}, ValueError, 'grads["deep/2"] is not in params'),
    "another container": (lambda t: t | {"deep": t["w"]}, ValueError, 'grads["deep"] must be a list or tuple'),
    "an array alone": (lambda t: t["w"], ValueError, "grads must be a dict as in params, got ndarray"),
    "None": (lambda t: None, ValueError, "grads must be a dict as in params, got NoneType"),
    "another shape": (lambda t: t | {"w": np.ones((4, 3))}, ValueError, 'grads["w"] has shape (4, 3)'),
    "broadcastable": (lambda t: t | {"w": np.ones((1, 4))}, ValueError, 'grads["w"] has shape (1, 4) but'),
    "a column": (lambda t: t | {"b": np.ones((4, 1), "f4")}, ValueError, 'grads["b"] has shape (4, 1) but'),
    "a square": (lambda t: t | {"b": np.ones((2, 2), "f4")}, ValueError, "its parameter has (4,); gradients are not"),
    "an axis too many": (
        lambda t: t | {"deep": [t["deep"][0], np.ones(1)]},
        ValueError,
        'grads["deep/1"] has shape (1,)',
    ),
    "wider": (
        lambda t: t | {"b": np.ones(4)},
        TypeError,
        "float64 but its parameter has float32: pass g.astype(np.float32)",
    ),
    "narrower": (lambda t: t | {"w": np.ones((3, 4), "f4")}, TypeError, 'grads["w"] has dtype float32 but'),
    "int": (lambda t: t | {"b": np.ones(4, int)}, TypeError, 'grads["b"] has dtype int64'),
    "byte-swapped": (lambda t: t | {"b": np.ones(4, ">f4")}, TypeError, 'grads["b"] is byte-swapped'),
    "a list of numbers": (lambda t: t | {"b": [1.0] * 4}, TypeError, 'grads["b"] must be a NumPy array, got list'),
    "masked": (lambda t: t | {"b": np.ma.ones(4)}, TypeError, 'grads["b"] is a MaskedArray'),
}


FLOATS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}


@pytest.mark.parametrize("of_param", FLOATS)
@pytest.mark.parametrize("of_gradient", FLOATS)
def test_a_gradient_goes_with_any_parameter_that_is_computed_in_the_same_format(of_gradient, of_param):
    p, g = np.ones(3, FLOATS[of_param]), np.ones(3, FLOATS[of_gradient])
    opt = ls.Optimizer({"w": p}, ls.SGD(lr=0.5))
    if (of_param == "float64") == (of_gradient == "float64"):
        opt.step({"w": g})
        assert (p == 0.5).all()
    else:
        cure = "float64" if of_param == "float64" else "float32"
        words = f"has dtype {of_gradient} but its parameter has {of_param}: pass g.astype(np.{cure})"
        with refuses(TypeError, f'grads["w"] {words}'):
            opt.step({"w": g})
        assert (p == 1).all()
        opt.step({"w": g.astype(cure)})
        assert (p == 0.5).all()


@pytest.mark.parametrize(("change", "error", "text"), BAD_GRADS.values(), ids=BAD_GRADS.keys())
def test_gradients_that_do_not_fit(change, error, text, trained):
    with trained.unchanged(), refuses(error, text):
        trained.opt.step(change(trained.grads()))
    trained.opt.step(trained.grads())


def test_a_gradient_that_shares_memory_with_a_parameter(trained):
    w = trained.params["w"]
    for _ in range(2):  # Also when the same array is passed again.
        for g in (w, w[:], w[::-1], w[:, ::-1]):
            with trained.unchanged(), refuses(ValueError, 'grads["w"] shares memory with params["w"]'):
                trained.opt.step(trained.grads(w=g))
    x = np.ones(6)
    opt = ls.Optimizer([x[:3], np.ones(3)], ls.SGD())
    with refuses(ValueError, "grads[1] shares memory with params[0]"):
        opt.step([np.ones(3), x[2:5]])
    assert (x == 1).all()


def test_a_gradient_that_lies_in_the_state(trained):
    for g in (trained.opt.state["w"]["m"], trained.opt.slow["w"]):
        with trained.unchanged(), refuses(ValueError, 'grads["w"] shares memory with the optimizer\'s own state'):
            trained.opt.step(trained.grads(w=g))


def test_a_bare_array_is_named_without_a_path():
    opt = ls.Optimizer(np.ones(3), ls.SGD())
    with refuses(ValueError, "grads has shape (4,) but its parameter has (3,)"):
        opt.step(np.ones(4))


def reshape(w):
    w.shape = (4, 3)


def retype(w):
    w.dtype = "i8"


def restride(w):
    w.strides = (8, 24)


def lock(w):
    w.flags.writeable = False


@pytest.mark.parametrize(
    ("change", "was", "now"),
    [
        (reshape, "float64 of shape (3, 4)", "float64 of shape (4, 3)"),
        (retype, "float64", "int64"),
        (restride, "with strides [32, 8]", "with strides [8, 24]"),
        (lock, "writeable", "read-only"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_parameter_that_changed_since(change, was, now, trained):
    grads = trained.grads()
    before, buffer = trained.bytes(), bytes(trained.buffer)
    change(trained.params["w"])
    for call in (lambda: trained.opt.step(grads), trained.opt.sync, trained.opt.slow_weights().__enter__):
        with refuses(RuntimeError, 'params["w"] was ', was, now):
            call()
    assert trained.bytes()[1:] == before[1:]
    assert bytes(trained.buffer) == buffer


def test_a_parameter_cannot_be_resized_meanwhile(trained):
    with pytest.raises(ValueError, match="cannot resize"):
        trained.params["deep"][0].resize(10_000, refcheck=False)
    trained.opt.step(trained.grads())


def test_errors_do_not_count_as_steps(trained):
    for _ in range(5):
        with pytest.raises(ValueError, match=re.escape('grads["b"]')):
            trained.opt.step(trained.grads(b=np.ones(1, "f4")))
    for _ in range(2):
        trained.opt.step(trained.grads())
    assert (trained.opt.steps, trained.opt.syncs) == (8, 2)


def test_a_leaf_that_another_array_was_put_in_place_of(trained):
    held = trained.params["w"]
    trained.params["w"] = held + 1
    for call in (
        lambda: [trained.opt.step(trained.grads()) for _ in range(33)],
        trained.opt.sync,
        trained.opt.slow_weights,
    ):
        with refuses(RuntimeError, 'params["w"] is another array', "w[...] = new"):
            call()
    del trained.params["w"]
    with refuses(ValueError, 'params["w"] is missing'):
        trained.opt.sync()
    trained.params["w"] = held
    trained.opt.step(trained.grads())


def test_a_dict_that_makes_gradients_up():
    opt = ls.Optimizer({"w": np.ones(2), "b": np.ones(2)}, ls.SGD())
    grads = defaultdict(lambda: np.zeros(2), {"w": np.ones(2), "bias": np.ones(2)})
    with refuses(ValueError, 'grads["b"] is missing'):
        opt.step(grads)
    assert list(grads) == ["w", "bias"]
    opt.step(defaultdict(list, {"w": np.ones(2), "b": np.ones(2)}))


def test_a_gradient_that_changes_while_it_is_checked():
    """The class of an array must not run code between the checks and the step."""

    class Liar(np.ndarray):
        @property
        def __class__(self):
            first.resize(1, refcheck=False)
            return np.memmap

    first = np.ones(100_000)
    opt = ls.Optimizer([np.ones(100_000), np.ones(2)], ls.SGD())
    with refuses(TypeError, "grads[1] is a Liar"):
        opt.step([first, np.ones(2).view(Liar)])


def test_a_subclass_of_memmap_does_not_say_what_it_shares(tmp_path):
    class Liar(np.memmap):
        def __array_function__(self, *_):
            return False

    p = np.memmap(tmp_path / "w", "f4", "w+", shape=4)
    with refuses(TypeError, "params[1] is a Liar"):
        ls.Optimizer([p, p.view(Liar)], ls.SGD())


@pytest.mark.parametrize("shape", [(2**60,), (2**44,), (2**30, 2)])
def test_more_elements_than_memory(shape):
    with refuses(ValueError, "params overlaps itself"):
        ls.Optimizer(np.lib.stride_tricks.as_strided(np.zeros(2, "f4"), shape, (0, 4)[: len(shape)]), ls.SGD())


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (ls.SGD(lr=1e39), "lr"),
        (ls.Adam(lr=3e38), "lr"),
        (ls.SGD(weight_decay=1e39), "weight_decay"),
        (ls.RAdam(eps=1e39), "eps"),
    ],
)
def test_hyper_parameters_that_float32_cannot_hold(rule, name):
    ls.Optimizer(np.ones(1), rule)
    with refuses(ValueError, f"{name} is too large for float32 parameters"):
        ls.Optimizer(np.ones(1, "f4"), rule)
    opt = ls.Optimizer(np.ones(1, "f4"), type(rule)())
    if name == "lr":
        with refuses(ValueError, "lr is too large for float32 parameters"):
            opt.lr = rule.lr
        assert opt.lr == 1e-3


def test_a_tree_that_contains_itself():
    params = []
    params.append(params)
    with refuses(ValueError, "nested too deeply, or contains itself"):
        ls.Optimizer(params, ls.SGD())
