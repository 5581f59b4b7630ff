"""A run that is stopped and goes on is the run that was never stopped, and nothing else is ever taken for one."""

import copy
import hashlib
import json
import math
import os
import pickle
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import lookstep as ls
from cases import every_case
from lookstep import checkpoint, schedules
from lookstep.safetensors import Reader, write
from lookstep.tree import Structure
from test_safetensors import HOSTILE

BFLOAT16 = ml_dtypes.bfloat16
DATA = Path(__file__).parent / "data"
PERIOD = 3
OFFSETS = 2 * PERIOD + 1
STEPS = OFFSETS + PERIOD + 2


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    """What `fsync` is for is the business of test_atomic.py."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def tree():
    """Leaves of every dtype, and of every layout that a pickle keeps the order of."""
    rng = np.random.default_rng(0)

    def normal(*shape, dtype="f4"):
        return rng.normal(size=shape).astype(dtype)

    return {
        "encoder": [
            {"w": np.asfortranarray(normal(3, 100)), "b": normal(8, dtype="f8")[::-2]},
            (normal(6, 8, dtype=BFLOAT16)[1:, ::3], normal(5, dtype="f2")),
        ],
        "w": normal(20, 15),
        "scale": np.array(0.7, "f4"),
        "none": np.empty((0, 3), "f8"),
    }


def gradients(params, step):
    """Gradients of a bumpy bowl, another one at each step; one leaf has none at every third."""
    structure = Structure(params)
    paths = dict(zip(structure.paths, structure.leaves(params), strict=True))
    grads = {
        path: np.asarray(np.cos(p.astype("f8") * 3 + step) + p.astype("f8") / 2, p.dtype) for path, p in paths.items()
    }
    if step % 3 == 1:
        grads["encoder/0/w"] = None
    return structure.build(list(grads.values()))


def overflowing(params, step):
    """The same, with an infinity now and then."""
    grads = gradients(params, step)
    if step % 4 == 2:
        grads["w"][3, 5] = np.inf
    return grads


def look(rule, **options):
    return ls.Lookahead(rule, PERIOD, **{"slow_step": 0.6, **options})


ADAM = ls.AdamW(lr=0.1, amsgrad=True)
GROUPS = [("b$", {"lr": 0.3}), ("^w$", {"frozen": True}), ("/w$", {"weight_decay": 0.5, "slow_step": 0.2})]
RUNS = {
    "rule alone": (ADAM, {}),
    "keep": (look(ADAM), {}),
    "reset": (look(ADAM, inner_state="reset"), {}),
    "pullback": (look(ADAM, inner_state="pullback"), {}),
    "heavy ball": (look(ADAM, outer=ls.HeavyBall(0.9)), {}),
    "nesterov": (look(ADAM, outer=ls.Nesterov(0.9), slow_step=1.2), {}),
    "slow step of zero": (look(ADAM, slow_step=0.0), {}),
    "slow step of one": (look(ADAM, slow_step=1.0, inner_state="pullback"), {}),
    "nested": (ls.Lookahead(look(ADAM, inner_state="pullback"), 2, 0.5, outer=ls.HeavyBall(0.5)), {}),
    "nested, all of it": (
        ls.Lookahead(look(ADAM, outer=ls.Nesterov(0.5)), 2, 0.5, inner_state="pullback", outer=ls.HeavyBall(0.5)),
        {},
    ),
    "nested, reset": (ls.Lookahead(look(ADAM, inner_state="pullback"), 2, 0.5, inner_state="reset"), {}),
    "optimal": (look(ADAM, slow_step=ls.OptimalSlowStep(0.1)), {}),
    "optimal, pullback": (look(ADAM, slow_step=ls.OptimalSlowStep(0.1), inner_state="pullback"), {}),
    "optimal, in bits": (
        look(ADAM, slow_step=ls.OptimalSlowStep(0.1)),
        {"master_weights": True, "state_dtype": "bfloat16", "max_grad_norm": 2.0, "centralize": 0},
    ),
    "schedules": (
        look(
            ls.AdamW(
                lr=schedules.WarmupCosine(0.1, warmup_steps=4, steps=9),
                weight_decay=schedules.Linear(0.0, 0.5, steps=11),
            ),
            slow_step=schedules.Joined([schedules.Constant(0.3), schedules.Exponential(0.9, factor=0.8)], [5]),
        ),
        {},
    ),
    "momentum on a schedule": (look(ls.SGD(lr=0.1, momentum=schedules.Cosine(0.9, steps=9))), {}),
    "groups": (look(ADAM), {"groups": GROUPS}),
    "groups on schedules": (
        look(ADAM),
        {
            "groups": [
                (
                    "b$",
                    {"lr": schedules.Step(0.5, factor=0.5, every=3), "slow_step": schedules.Linear(1.0, 0.2, steps=9)},
                )
            ]
        },
    ),
    "clipped": (look(ADAM), {"max_grad_norm": 3.0, "max_grad_value": 0.9}),
    "centralized": (look(ADAM), {"centralize": -1}),
    "skips": (look(ADAM), {"nonfinite": "skip"}),
    "master weights": (look(ADAM, inner_state="pullback"), {"master_weights": True}),
    "master weights, nested": (ls.Lookahead(look(ADAM), 2), {"master_weights": True}),
    "master weights alone": (ADAM, {"master_weights": True}),
    "bfloat16": (look(ADAM), {"state_dtype": "bfloat16", "seed": 7}),
    "bfloat16, nearest": (look(ADAM, inner_state="pullback"), {"state_dtype": "bfloat16", "rounding": "nearest"}),
    "8 bits": (look(ADAM, inner_state="pullback"), {"state_dtype": "int8", "seed": 2**32 - 1}),
    "8 bits, nearest": (look(ADAM, inner_state="reset"), {"state_dtype": "int8", "rounding": "nearest"}),
    "everything": (
        ls.Lookahead(
            look(ls.RAdam(lr=schedules.Linear(0.1, 0.01, steps=9)), inner_state="pullback"), 2, outer=ls.Nesterov(0.5)
        ),
        {
            "groups": GROUPS[:2],
            "max_grad_norm": 3.0,
            "max_grad_value": 0.9,
            "nonfinite": "skip",
            "centralize": 0,
            "master_weights": True,
            "state_dtype": "int8",
            "seed": 5,
        },
    ),
}
every_run = pytest.mark.parametrize(("rule", "options"), RUNS.values(), ids=RUNS.keys())


def gradient_of(options):
    return overflowing if options.get("nonfinite") == "skip" else gradients


def frozen(value):
    """Something that is equal where every bit is."""
    if isinstance(value, np.ndarray):
        return value.dtype.char, value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [frozen(item) for item in value]
    return repr(value)


def leaves(tree):
    structure = Structure(tree)
    return dict(zip(structure.paths, structure.leaves(tree), strict=True))


def everything(opt):
    """All that can be seen of an optimizer."""
    seen = [leaves(opt.params), leaves(opt.slow), opt.state, opt.state_dict(), opt.steps, opt.syncs, opt.skipped]
    return frozen([*seen, opt.rule, opt.groups, opt.lr, opt.grad_norm, opt.slow_step])


def path_of(opt, gradient, start, steps=STEPS):
    """The parameters, slow weights and counters after each step that is left."""
    path = []
    for step in range(start, steps):
        opt.step(gradient(opt.params, step))
        path.append(frozen([leaves(opt.params), leaves(opt.slow), opt.steps, opt.syncs, opt.skipped, opt.grad_norm]))
    return path


def blank(params):
    """Other numbers in arrays like these."""
    copies = copy.deepcopy(params)
    for leaf in leaves(copies).values():
        leaf[...] = 9
    return copies


def through_state_dict(opt, options, folder):
    """Into an optimizer that is at another place of another run."""
    other = ls.Optimizer(blank(opt.params), opt.rule, **options)
    path_of(other, gradients, 5, 5 + PERIOD + 2)
    other.load_state_dict(opt.state_dict())
    return other


def through_a_file(opt, options, folder):
    opt.save(folder / "run.safetensors")
    return ls.Optimizer.load(folder / "run.safetensors", blank(opt.params))


def through_pickle(opt, options, folder):
    params, other = pickle.loads(pickle.dumps((opt.params, opt)))
    assert other.params is params
    return other


def through_deepcopy(opt, options, folder):
    return copy.deepcopy(opt)


WAYS = [through_state_dict, through_a_file, through_pickle, through_deepcopy]


def check_that_it_goes_on(rule, options, way, folder, more=STEPS):
    """From every offset, for as many `more` steps."""
    gradient = gradient_of(options)
    whole = path_of(ls.Optimizer(tree(), rule, **options), gradient, 0)
    assert len({str(point) for point in whole}) > STEPS / 2, "the run must move"
    opt = ls.Optimizer(tree(), rule, **options)
    for offset in range(OFFSETS + 1):
        other = way(opt, options, folder)
        assert frozen(other.state_dict()) == frozen(opt.state_dict())
        before = frozen(leaves(opt.params))
        end = min(STEPS, offset + more)
        assert path_of(other, gradient, offset, end) == whole[offset:end]
        assert frozen(leaves(opt.params)) == before, "the copy must not move the original"
        opt.step(gradient(opt.params, offset))


@every_run
@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_bit_for_bit_from_every_step(rule, options, way, tmp_path):
    check_that_it_goes_on(rule, options, way, tmp_path)


@every_case
def test_every_rule_goes_on_bit_for_bit(case, tmp_path):
    check_that_it_goes_on(case.rule, {}, through_a_file, tmp_path, PERIOD + 1)


@every_case
def test_lookahead_around_every_rule_goes_on_bit_for_bit(case, tmp_path):
    """In 8 bits, and in whole numbers where the leaf is of float64."""
    rule = look(case.rule, inner_state="pullback", outer=ls.Nesterov(0.5))
    check_that_it_goes_on(rule, {"state_dtype": "int8", "master_weights": True}, through_a_file, tmp_path, PERIOD + 1)


def test_a_run_goes_on_from_a_call_that_only_measures():
    rule = look(ls.SGD(lr=0.1), slow_step=ls.OptimalSlowStep(0.1))
    opt = ls.Optimizer(tree(), rule)
    for step in range(PERIOD):
        opt.step(gradients(opt.params, step))
    other = copy.deepcopy(opt)
    for one in (opt, other):
        one.step(gradients(one.params, PERIOD))
        assert (one.steps, one.syncs) == (PERIOD, 1), "this call must be the one that measures"
    assert everything(opt) == everything(other)


def test_a_run_goes_on_in_a_new_process(tmp_path):
    expected = {}
    for number, (rule, options) in enumerate(RUNS.values()):
        gradient = gradient_of(options)
        opt = ls.Optimizer(tree(), rule, **options)
        for offset in range(OFFSETS + 1):
            opt.save(tmp_path / f"{number}-{offset}")
            opt.step(gradient(opt.params, offset))
        path_of(opt, gradient, OFFSETS + 1)
        expected[number] = digest(opt)
    code = f"""if True:
        import sys
        sys.path[:0] = {sys.path!r}
        from pathlib import Path
        import lookstep as ls
        from test_checkpoints import OFFSETS, RUNS, blank, digest, gradient_of, path_of, tree
        for number, (_, options) in enumerate(RUNS.values()):
            for offset in range(OFFSETS + 1):
                opt = ls.Optimizer.load(Path({str(tmp_path)!r}) / f"{{number}}-{{offset}}", blank(tree()))
                path_of(opt, gradient_of(options), offset)
                print(number, digest(opt))"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stderr == ""
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) == len(RUNS) * (OFFSETS + 1)
    assert [line for line in lines if line[1] != expected[int(line[0])]] == []


def digest(opt):
    return hashlib.sha256(repr(frozen(opt.state_dict())).encode()).hexdigest()


def test_a_manual_sync_is_part_of_the_run(tmp_path):
    opt = ls.Optimizer(tree(), look(ADAM, inner_state="pullback"))
    opt.step(gradients(opt.params, 0))
    opt.sync()
    opt.step(gradients(opt.params, 1))
    other = through_a_file(opt, {}, tmp_path)
    assert path_of(other, gradients, 2) == path_of(opt, gradients, 2)


def test_any_layout_goes_on_with_the_same_bits():
    """Only 8-bit state, whose blocks lie as memory does, wants the layout that it was made for."""
    for options in ({}, {"state_dtype": "bfloat16"}, {"master_weights": True, "centralize": 0}):
        opt = ls.Optimizer(tree(), look(ADAM), **options)
        path_of(opt, gradients, 0, PERIOD + 1)
        other = ls.Optimizer(blank(opt.params), look(ADAM), **options)
        params = other.params
        params["w"] = np.asfortranarray(params["w"])
        params["encoder"][0]["w"] = np.ascontiguousarray(params["encoder"][0]["w"])
        params["encoder"][0]["b"] = np.ones((4, 2))[:, 1]
        other = ls.Optimizer(params, look(ADAM), **options)
        other.load_state_dict(opt.state_dict())
        assert path_of(other, gradients, PERIOD + 1) == path_of(opt, gradients, PERIOD + 1)


def test_eight_bits_go_on_in_another_memory_order(tmp_path):
    rng = np.random.default_rng(0)
    start, grads = rng.standard_normal((3, 4, 50), "f4"), rng.standard_normal((6, 3, 4, 50), "f4")
    options = {"state_dtype": "int8", "rounding": "stochastic"}
    opt = ls.Optimizer({"w": start.copy()}, ls.Adam(), **options)
    for g in grads[:3]:
        opt.step({"w": g})
    opt.save(tmp_path / "run")
    other = {"w": np.zeros((4, 3, 50), "f4").transpose(1, 0, 2)}
    again = ls.Optimizer.load(tmp_path / "run", other)
    pickled = pickle.loads(pickle.dumps(again))
    for g in grads[3:]:
        for one in (opt, again, pickled):
            one.step({"w": g})
    assert everything(opt) == everything(again) == everything(pickled)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (look(ADAM, inner_state="pullback"), {"state_dtype": "bfloat16", "groups": GROUPS, "master_weights": True}),
        (look(ADAM), {"state_dtype": "int8", "nonfinite": "skip"}),
        (look(ADAM), {"max_grad_norm": 3.0}),
        (look(ls.SGD(lr=0.1), slow_step=ls.OptimalSlowStep(0.0)), {}),
        (look(ls.Prodigy()), {}),
    ],
    ids=["bits", "8 bits", "norm", "optimal", "measured over all"],
)
def test_keys_in_another_order_go_on_with_the_same_bits(rule, options, tmp_path):
    def many():
        return tree() | {str(i): np.full(3, 0.1 * i, "f4") for i in range(20)}

    def turned():
        return dict(reversed(blank(many()).items()))

    opt = ls.Optimizer(many(), rule, **options)
    path_of(opt, gradient_of(options), 0, PERIOD + 2)
    opt.save(tmp_path / "run")
    first = ls.Optimizer.load(tmp_path / "run", turned())
    second = ls.Optimizer(turned(), rule, **options)
    second.load_state_dict(opt.state_dict())
    assert list(first.params) == list(second.params) == list(opt.params)[::-1]
    whole = path_of(opt, gradient_of(options), PERIOD + 2)
    assert path_of(first, gradient_of(options), PERIOD + 2) == whole
    assert path_of(second, gradient_of(options), PERIOD + 2) == whole


ODD = [
    "",
    "\n",
    "a\nb",
    "%",
    "%2E",
    "..",
    "a/../b",
    "/",
    "/etc",
    "a//b",
    "\\",
    "..\\x",
    "\x1b[2J",
    "é 🐈",
    "m",
    "params",
]


def test_odd_keys_save_and_load(tmp_path):
    def params(value):
        return {key: np.full(3, value + i) for i, key in enumerate([*ODD, 7, None, (1, "/")])}

    opt = ls.Optimizer(params(0.0), look(ADAM))
    grads = {key: np.ones(3) for key in opt.params}
    opt.step(grads)
    opt.save(tmp_path / "run")
    other = ls.Optimizer.load(tmp_path / "run", params(9.0))
    opt.step(grads)
    other.step(grads)
    assert everything(opt) == everything(other)


def test_a_key_that_a_file_cannot_hold_is_refused_when_it_is_saved(tmp_path):
    (tmp_path / "run").write_bytes(b"before")
    opt = ls.Optimizer({"w" * 5000: np.ones(1)}, ls.SGD())
    with refuses(ValueError, "cannot be saved as safetensors"):
        opt.save(tmp_path / "run")
    assert (tmp_path / "run").read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["run"]


def test_many_leaves_save_and_load(tmp_path):
    """More tensors than `Reader` takes from strangers."""
    params = {str(i): np.full(1, float(i)) for i in range(3700)}
    opt = ls.Optimizer(params, look(ADAM, inner_state="pullback", outer=ls.Nesterov(0.5)))
    opt.save(tmp_path / "run")
    other = ls.Optimizer.load(tmp_path / "run", {key: np.zeros(1) for key in params})
    assert frozen(other.params) == frozen(params)
    with refuses(ValueError, "it has more than 32768 tensors"):
        ls.Optimizer.load(tmp_path / "run", np.zeros(1))


def test_a_bare_array(tmp_path):
    w = np.arange(3.0)
    opt = ls.Optimizer(w, look(ADAM))
    opt.step(w + 1)
    opt.save(tmp_path / "run")
    other = ls.Optimizer.load(tmp_path / "run", np.zeros(3))
    assert everything(other) == everything(opt)


def test_a_memory_map(tmp_path):
    w = np.memmap(tmp_path / "w", "f4", "w+", shape=(3, 4))
    opt = ls.Optimizer(w, look(ADAM))
    opt.step(np.ones((3, 4), "f4"))
    state = opt.state_dict()
    assert type(state["leaves"][""]["params"]) is np.ndarray
    opt.save(tmp_path / "run")
    for other in (
        ls.Optimizer.load(tmp_path / "run", np.zeros((3, 4), "f4")),
        pickle.loads(pickle.dumps(opt)),
        copy.deepcopy(opt),
    ):
        assert frozen(other.state_dict()) == frozen(state)


def test_copies_are_bound_to_the_copied_params():
    params = tree()
    both = {"params": params, "opt": ls.Optimizer(params, look(ADAM))}
    for copies in (copy.deepcopy(both), pickle.loads(pickle.dumps(both)), copy.deepcopy(dict(reversed(both.items())))):
        assert copies["opt"].params is copies["params"]
        before = frozen(params), frozen(copies["params"])
        copies["opt"].step(gradients(copies["params"], 0))
        assert frozen(params) == before[0]
        assert frozen(copies["params"]) != before[1]
        copies["opt"].sync()  # Which looks whether the arrays are still those.


def test_a_shallow_copy_is_refused():
    opt = ls.Optimizer(np.ones(2), ls.SGD())
    with refuses(TypeError, "an optimizer is bound to its arrays: use copy.deepcopy"):
        copy.copy(opt)


def test_what_follows_a_function_is_copied_but_not_stored(tmp_path):
    (tmp_path / "run").write_bytes(b"before")
    for name, rule, groups in [
        ("lr", ls.SGD(lr=lambda step: 0.1), []),
        ("slow_step", ls.Lookahead(ls.SGD(), slow_step=lambda step: 0.5), []),
        ("groups[0]: lr", ls.SGD(), [("w", {"lr": math.exp})]),
    ]:
        opt = ls.Optimizer({"w": np.ones(2)}, rule, groups=groups)
        opt.step({"w": np.ones(2)})
        with refuses(
            ValueError, name + " follows a function, which cannot be stored: use a schedule of lookstep.schedules"
        ):
            opt.save(tmp_path / "run")
        other = copy.deepcopy(opt)
        other.load_state_dict(opt.state_dict())
        for one in (opt, other):
            one.step({"w": np.ones(2)})
        assert everything(opt) == everything(other)
    assert (tmp_path / "run").read_bytes() == b"before"


def test_a_state_dict_is_of_copies():
    opt = ls.Optimizer(tree(), look(ADAM, inner_state="pullback"), groups=GROUPS)
    opt.step(gradients(opt.params, 0))
    before = everything(opt)
    state = opt.state_dict()

    def spoil(value):
        if isinstance(value, np.ndarray):
            assert value.flags.writeable
            value[...] = 3
        elif isinstance(value, dict):
            for item in value.values():
                spoil(item)
        elif isinstance(value, list | tuple):
            for item in value:
                spoil(item)
            if isinstance(value, list):
                value.clear()

    for _, different in state["groups"]:
        different.clear()
    spoil(state)
    state["options"].clear()
    assert everything(opt) == before


def test_a_loaded_state_is_copied_too():
    opt = ls.Optimizer(tree(), look(ADAM))
    opt.step(gradients(opt.params, 0))
    state = opt.state_dict()
    kept = frozen(state)
    other = ls.Optimizer(blank(tree()), look(ADAM))
    other.load_state_dict(state)
    path_of(other, gradients, 1)
    assert frozen(state) == kept


def test_a_state_dict_is_plain_data_around_a_rule():
    opt = ls.Optimizer({"w": np.ones(2, BFLOAT16)}, look(ls.Adam()), state_dtype="bfloat16")
    state = opt.state_dict()
    assert list(state) == "format version rule groups options steps skipped cycles carry leaves".split()
    assert (state["format"], state["version"], state["rule"]) == ("lookstep", "1.0", look(ls.Adam()))
    assert list(state["leaves"]["w"]) == ["group", "steps", "carry", "params", "m", "v", "slow"]
    assert [state["leaves"]["w"][name].dtype.name for name in ("params", "m", "slow")] == [
        "bfloat16",
        "uint16",
        "float32",
    ]


def test_nothing_is_stored_while_params_hold_the_slow_weights(tmp_path):
    opt = ls.Optimizer(tree(), look(ADAM))
    opt.step(gradients(opt.params, 0))
    state = opt.state_dict()
    opt.step(gradients(opt.params, 1))
    before = everything(opt)
    with opt.slow_weights():
        for call in (
            opt.state_dict,
            lambda: opt.save(tmp_path / "run"),
            lambda: pickle.dumps(opt),
            lambda: copy.deepcopy(opt),
            lambda: opt.load_state_dict(state),
        ):
            with refuses(RuntimeError, "slow weights"):
                call()
    assert everything(opt) == before
    assert not os.listdir(tmp_path)


def test_arrays_that_were_exchanged_are_not_stored(tmp_path):
    opt = ls.Optimizer({"w": np.ones(2)}, ls.SGD())
    state = opt.state_dict()
    opt.params["w"] = np.zeros(2)
    for call in (
        opt.state_dict,
        lambda: opt.save(tmp_path / "run"),
        lambda: copy.deepcopy(opt),
        lambda: opt.load_state_dict(state),
    ):
        with refuses(RuntimeError, 'params["w"] is another array'):
            call()


def test_a_state_brings_its_hyper_parameters_and_groups():
    rule = look(ls.Adam(lr=0.1, betas=(0.5, 0.6)), slow_step=0.9)
    first = ls.Optimizer(tree(), rule, groups=[("b$", {"lr": 0.7}), ("w$", {"slow_step": 0.1})])
    second = ls.Optimizer(blank(tree()), look(ls.Adam()), groups=[("scale", {"lr": 3.0})])
    second.load_state_dict(first.state_dict())
    assert (second.rule, second.groups) == (first.rule, first.groups)
    second.lr = first.lr = 0.2  # Which must not lose them.
    assert path_of(second, gradients, 0) == path_of(first, gradients, 0)


def test_what_was_measured_before_is_forgotten():
    opt = ls.Optimizer(np.ones(2), ls.Lookahead(ls.SGD(), 1), max_grad_norm=1.0)
    state = opt.state_dict()
    opt.step(np.ones(2))
    assert (opt.grad_norm, opt.slow_step) == (math.sqrt(2), 0.5)
    opt.load_state_dict(state)
    assert (opt.grad_norm, opt.slow_step) == (None, None)


def test_a_float_that_is_not_finite_travels_with_copies_and_where_it_is_allowed(tmp_path):
    for options in ({}, {"state_dtype": "bfloat16"}, {"state_dtype": "int8"}, {"master_weights": True}):
        opt = ls.Optimizer({"w": np.ones(300, "f4")}, look(ADAM), **options)
        grad = np.ones(300, "f4")
        grad[7] = np.nan
        opt.step({"w": grad})
        assert np.isnan(opt.state["w"]["m"][7])
        opt.save(tmp_path / "run")
        params = {"w": np.full(300, 9, "f4")}
        with refuses(ValueError, 'm of the state of "w" holds an infinity or a NaN: pass allow_nonfinite=True'):
            ls.Optimizer.load(tmp_path / "run", params)
        assert (params["w"] == 9).all()
        other = ls.Optimizer.load(tmp_path / "run", params, allow_nonfinite=True)
        for one in (other, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
            assert everything(one) == everything(opt)


@every_case
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_what_a_rule_makes_of_a_gradient_that_is_none_travels_too(case, bad, tmp_path):
    """Also in what it carries, which a rule may have where no array does."""
    opt = ls.Optimizer(np.ones(4, "f4"), look(case.rule))
    for last in (1, bad, 1):
        opt.step(np.array([1, 1, 1, last], "f4"))
    opt.save(tmp_path / "run")
    other = ls.Optimizer.load(tmp_path / "run", np.zeros(4, "f4"), allow_nonfinite=True)
    for one in (other, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert frozen(one.state_dict()) == frozen(opt.state_dict())


@contextmanager
def refuses(error, *texts):
    with pytest.raises(error) as caught:
        yield
    assert caught.type is error
    for text in texts:
        assert text in str(caught.value)


class Trained:
    """An optimizer in the middle of a cycle, and a state of the same run from elsewhere."""

    rule = look(ADAM, inner_state="pullback", outer=ls.Nesterov(0.5))

    def __init__(self):
        self.opt = ls.Optimizer(tree(), self.rule, groups=[("b$", {"lr": 0.3})])
        path_of(self.opt, gradients, 0, PERIOD + 1)
        other = copy.deepcopy(self.opt)
        path_of(other, gradients, 0, PERIOD + 2)
        self.state = other.state_dict()

    def save(self, path, **changes):
        checkpoint.save(path, self.state | changes)

    @contextmanager
    def unchanged(self):
        before = everything(self.opt)
        yield
        assert everything(self.opt) == before


@pytest.fixture
def trained():
    return Trained()


def test_the_state_itself_is_taken(trained):
    before = everything(trained.opt)
    trained.opt.load_state_dict(trained.state)
    assert everything(trained.opt) != before
    assert frozen(trained.opt.state_dict()) == frozen(trained.state)


def put(*keys_and_value):
    """A function that changes one thing in a state."""
    *keys, last, value = keys_and_value

    def change(state):
        for key in keys:
            state = state[key]
        state[last] = value(state[last]) if callable(value) else value

    return change


def drop(*keys):
    *keys, last = keys

    def change(state):
        for key in keys:
            state = state[key]
        del state[last]

    return change


def spoiled(value):
    def change(array):
        array[(1,) * array.ndim] = value
        return array

    return change


W = ("leaves", "w")
LEAF = 'the state of "w"'
BAD_STATES = {
    "format": (put("format", "torch"), "this is no state of lookstep: it has format 'torch'"),
    "no format": (drop("format"), "this is no state of lookstep"),
    "no version": (drop("version"), "this is no state of lookstep"),
    "newer version": (put("version", "2.0"), "the state is of version 2.0, but this lookstep reads up to 1.0"),
    "version of words": (put("version", "one"), "the state is of version one"),
    **{
        f"no {key}": (drop(key), f"the state has no '{key}'")
        for key in ("rule", "groups", "options", "steps", "skipped", "cycles", "carry", "leaves")
    },
    "rule a text": (put("rule", "Adam"), "the state's rule must be a rule, got str"),
    "SGD into Adam": (put("rule", look(ls.SGD())), "keeps other arrays or cycles than"),
    "no AMSGrad": (put("rule", look(ls.AdamW(), inner_state="pullback", outer=ls.Nesterov(0.5))), "keeps other arrays"),
    "another period": (put("rule", ls.Lookahead(ADAM, 4, inner_state="pullback", outer=ls.Nesterov(0.5))), "cycles"),
    "another inner_state": (put("rule", look(ADAM, outer=ls.Nesterov(0.5))), "keeps other arrays or cycles"),
    "another lowest slow step": (
        lambda state: state.update(rule=look(ADAM, slow_step=ls.OptimalSlowStep(0.9)), cycles=[[0, 0]]),
        "keeps other arrays or cycles",
    ),
    "another outer": (put("rule", look(ADAM, inner_state="pullback", outer=ls.HeavyBall(0.5))), "keeps other arrays"),
    "without Lookahead": (put("rule", ADAM), "keeps other arrays or cycles than"),
    "two levels": (put("rule", lambda rule: ls.Lookahead(rule)), "keeps other arrays or cycles than"),
    "lr that float32 cannot hold": (
        put("rule", look(ls.AdamW(lr=1e39, amsgrad=True), inner_state="pullback", outer=ls.Nesterov(0.5))),
        "lr is too large for float32 parameters",
    ),
    "lr that float32 cannot hold at the state's step": (
        put(
            "rule",
            look(
                ls.AdamW(lr=schedules.Linear(0.0, 1e39, steps=4), amsgrad=True),
                inner_state="pullback",
                outer=ls.Nesterov(0.5),
            ),
        ),
        "lr is too large for float32 parameters",
    ),
    "lr that is negative at the state's step": (
        put(
            "rule",
            look(
                ls.AdamW(lr=schedules.Linear(1.0, -9.0, steps=4), amsgrad=True),
                inner_state="pullback",
                outer=ls.Nesterov(0.5),
            ),
        ),
        "lr must be finite and >= 0, got ",
    ),
    "groups a number": (put("groups", 3), "groups must be a list of pairs"),
    "a group that is none": (put(*W, "group", 2), "group of a leaf must be an integer in [0, 2), got 2"),
    "no group": (drop(*W, "group"), f'{LEAF} has no array "group"'),
    "a frozen group": (put("groups", [("b$", {"frozen": True})]), "keeps other arrays or cycles"),
    "lr -1 of a group": (put("groups", [("b$", {"lr": -1})]), "groups[0]: lr must be finite and >= 0, got -1"),
    "options a list": (put("options", []), "the state's options must be max_grad_norm, "),
    "unknown option": (put("options", "threads", 4), "the state's options must be max_grad_norm, "),
    "option missing": (drop("options", "seed"), "the state's options must be max_grad_norm, "),
    "another seed": (put("options", "seed", 1), "the state has seed 1, but this optimizer has 0"),
    "other state_dtype": (put("options", "state_dtype", "int8"), "the state has state_dtype 'int8', but"),
    "other master_weights": (put("options", "master_weights", True), "the state has master_weights True, but"),
    "step -5": (put("steps", -5), "steps must be an integer in [0, 1152921504606846976), got -5"),
    "step 2^60": (put("steps", 2**60), "steps must be an integer in [0, 1152921504606846976)"),
    "step of a float": (put("steps", 3.0), "steps must be an integer in [0, 1152921504606846976), got 3.0"),
    "step of a bool": (put("steps", True), "steps must be an integer in"),
    "skipped -1": (put("skipped", -1), "skipped must be an integer in"),
    "leaf's step -1": (put(*W, "steps", -1), f"steps of {LEAF} must be an integer in"),
    "leaf's step 2^60": (put(*W, "steps", 2**60), f"steps of {LEAF} must be an integer in"),
    "cycles a number": (put("cycles", 3), "the state's cycles must be pairs of integers"),
    "cycles of numbers": (put("cycles", [3]), "the state's cycles must be pairs of integers"),
    "cycles of triples": (put("cycles", [[1, 2, 3]]), "the state's cycles must be pairs of integers"),
    "no cycle": (put("cycles", []), "the state has 0 levels of Lookahead, but the rule has 1"),
    "two cycles": (put("cycles", [[0, 0], [0, 0]]), "the state has 2 levels of Lookahead, but the rule has 1"),
    "past the cycle's end": (put("cycles", [[PERIOD, 1]]), "steps of the cycle must be an integer in [0, 3), got 3"),
    "cycle of -1": (put("cycles", [[-1, 1]]), "steps of the cycle must be an integer in [0, 3), got -1"),
    "syncs -1": (put("cycles", [[0, -1]]), "syncs must be an integer in"),
    "carry of two": (put("carry", [0.0, 0.0]), "carry of the state must be 3 numbers, got [0.0, 0.0]"),
    "carry of nan": (put("carry", [0.0, 0.0, math.nan]), "carry of the state holds an infinity or a NaN: pass allow_"),
    "leaf's carry": (put(*W, "carry", "none"), f"carry of {LEAF} must be 3 numbers, got 'none'"),
    "unknown key of the run": (put("threads", 4), "the state has the unknown key 'threads'"),
    "leaves a list": (put("leaves", []), "the state's leaves must be a dict"),
    "leaf missing": (drop("leaves", "w"), 'the state\'s leaves has no leaf "w"'),
    "leaf too many": (put("leaves", "z", {}), 'the state\'s leaves has the unknown leaf "z"'),
    "leaf a number": (put("leaves", "w", 3), f"{LEAF} must be a dict"),
    "no v": (drop(*W, "v"), f'{LEAF} has no array "v"'),
    "no steps": (drop(*W, "steps"), f'{LEAF} has no array "steps"'),
    "unknown key": (put(*W, "u", 3), f'{LEAF} has the unknown array "u"'),
    "another shape": (put(*W, "m", lambda m: m.T.copy()), f"m of {LEAF} is float32 of shape (15, 20), but"),
    "broadcastable": (put(*W, "m", lambda m: m[:1]), f"m of {LEAF} is float32 of shape (1, 15), but"),
    "another dtype": (put(*W, "m", lambda m: m.astype("f8")), "is float64 of shape (20, 15), but float32 of"),
    "bytes swapped": (put(*W, "m", lambda m: m.astype(">f4")), "float32 of shape (20, 15) is needed"),
    "half the bits": (put(*W, "m", lambda m: m.astype(BFLOAT16)), "is bfloat16 of shape (20, 15), but"),
    "params of another shape": (put(*W, "params", lambda p: p[1:]), f"params of {LEAF} is float32 of shape (19, 15)"),
    "params of another dtype": (put(*W, "params", lambda p: p.astype("f8")), f"params of {LEAF} is float64"),
    "a list of numbers": (put(*W, "m", lambda m: m.tolist()), f"m of {LEAF} must be a NumPy array, got list"),
    "masked": (put(*W, "m", np.ma.asarray), f"m of {LEAF} must be a NumPy array, got MaskedArray"),
    "objects": (put(*W, "m", lambda m: m.astype(object)), f"m of {LEAF} is object of shape"),
    "negative v": (put(*W, "v", spoiled(-1.0)), f"v of {LEAF} holds a negative number"),
    "negative v_max": (put(*W, "v_max", spoiled(-1.0)), f"v_max of {LEAF} holds a negative number"),
    "negative v.before": (put(*W, "v.before", spoiled(-1.0)), f"v.before of {LEAF} holds a negative number"),
    "NaN in m": (put(*W, "m", spoiled(np.nan)), f"m of {LEAF} holds an infinity or a NaN: pass allow_nonfinite=True"),
    "infinite v": (put(*W, "v", spoiled(np.inf)), f"v of {LEAF} holds an infinity or a NaN"),
    "NaN in momentum": (put(*W, "momentum", spoiled(np.nan)), f"momentum of {LEAF} holds an infinity or a NaN"),
    "NaN in the last leaf": (
        put("leaves", "scale", "m", lambda m: np.full_like(m, np.nan)),
        'm of the state of "scale" holds',
    ),
}


@pytest.mark.parametrize(("change", "text"), BAD_STATES.values(), ids=BAD_STATES.keys())
def test_a_state_that_is_none_is_refused_whole(change, text, trained):
    change(trained.state)
    with trained.unchanged(), pytest.raises((ValueError, TypeError)) as caught:
        trained.opt.load_state_dict(trained.state)
    assert text in str(caught.value)
    assert caught.type is (TypeError if text.startswith("groups must") else ValueError)


@pytest.mark.parametrize("state", ["run.safetensors", b"", None, 3, [("format", "lookstep")]])
def test_what_is_no_dict_is_refused(state, trained):
    with trained.unchanged(), refuses(TypeError, "a state must be a dict, as state_dict() gives it, got "):
        trained.opt.load_state_dict(state)


def test_negative_moments_in_16_bits_are_refused():
    for dtype, text in (
        ("bfloat16", "v of params holds a negative number"),
        ("int8", "v.scale of params must be finite"),
    ):
        opt = ls.Optimizer(np.ones(300, "f4"), ls.Adam(), state_dtype=dtype)
        opt.step(np.ones(300, "f4"))
        before, state = everything(opt), opt.state_dict()
        if dtype == "int8":
            state["leaves"][""]["v.scale"][1] *= -1
        else:
            state["leaves"][""]["v"][7] |= 0x8000
        opt_text = text.replace("params", "the state of params")
        with refuses(ValueError, opt_text):
            opt.load_state_dict(state)
        assert everything(opt) == before


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"w": np.full((20, 15), 9, "f4")}, 'has the unknown tensor "'),
        (tree() | {"more": np.ones(2)}, 'has no tensor "params/more"'),
        (tree() | {"w": np.full((15, 20), 9, "f4")}, "of shape (20, 15), but F32 of shape (15, 20) is needed"),
        (tree() | {"w": np.full((20, 15), 9, "f8")}, "is F32 of shape (20, 15), but F64 of shape (20, 15) is needed"),
        (tree() | {"w": np.full((20, 15), 9, BFLOAT16)}, "but BF16 of shape (20, 15) is needed"),
    ],
    ids=["fewer leaves", "more leaves", "another shape", "another dtype", "fewer bits"],
)
def test_parameters_that_a_file_is_not_of(params, text, trained, tmp_path):
    trained.save(tmp_path / "run")
    before = frozen(params)
    with refuses(ValueError, text):
        ls.Optimizer.load(tmp_path / "run", params)
    assert frozen(params) == before


def test_parameters_that_cannot_be_loaded_into(trained, tmp_path):
    trained.save(tmp_path / "run")
    params = blank(tree())
    params["w"].flags.writeable = False
    before = frozen(params)
    with refuses(ValueError, 'params["w"] is read-only'):
        ls.Optimizer.load(tmp_path / "run", params)
    assert frozen(params) == before
    trained.opt.params["w"].flags.writeable = False
    with trained.unchanged(), refuses(RuntimeError, 'params["w"] was writeable', "read-only"):
        trained.opt.load_state_dict(trained.state)


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "run", tmp_path):
        with pytest.raises(OSError, match=re.escape(str(path))):
            ls.Optimizer.load(path, np.ones(1))


def test_a_file_that_cannot_be_written(trained, tmp_path):
    with trained.unchanged(), pytest.raises(OSError, match="run"):
        trained.opt.save(tmp_path / "folder" / "run")
    with trained.unchanged(), pytest.raises(OSError, match="not a regular file"):
        trained.opt.save(tmp_path)
    assert not os.listdir(tmp_path)


def edited(path, change):
    """Writes another file in place of a saved one, of other tensors and other metadata."""
    with Reader(path) as file:
        tensors = {name: (tensor.dtype, file.read(name)) for name, tensor in file.tensors.items()}
        plain = json.loads(file.metadata["lookstep"])
    text = change(tensors, plain)
    write(path, tensors, {"lookstep": text if isinstance(text, str) else json.dumps(plain)})


def meta(*keys_and_value):
    change = put(*keys_and_value)
    return lambda tensors, plain: change(plain)


def without(name):
    return lambda tensors, plain: tensors.pop(name) and None


def nested_lookahead(depth):
    def change(tensors, plain):
        for _ in range(depth):
            plain["rule"] = {"name": "Lookahead", "inner": plain["rule"]}

    return change


def tensor_of(name, array):
    def change(tensors, plain):
        tensors[name] = array(tensors[name][1]) if callable(array) else array

    return change


RULE = ("rule", "inner")
BAD_FILES = {
    "not JSON": (lambda tensors, plain: "{", "the text is not valid JSON"),
    "a list": (lambda tensors, plain: "[]", "the checkpoint's metadata must be a JSON object"),
    "a key twice": (lambda tensors, plain: '{"steps": 1, "steps": 2}', "has the key 'steps' twice"),
    "NaN": (lambda tensors, plain: json.dumps(plain | {"steps": math.nan}), "has 'NaN', which is no number"),
    "deep": (lambda tensors, plain: "[" * 100_000, "the text is nested too deeply"),
    "empty": (lambda tensors, plain: "{}", "this is no state of lookstep"),
    "newer version": (meta("version", "2.0"), "the state is of version 2.0, but this lookstep reads up to 1.0"),
    "newer version with a new rule": (
        lambda tensors, plain: plain.update(version="3.1", rule={"name": "Nova"}, groups="new"),
        "the state is of version 3.1, but this lookstep reads up to 1.0",
    ),
    **{
        f"no {key}": (lambda tensors, plain, key=key: plain.pop(key) and None, key)
        for key in ("rule", "groups", "options", "steps", "skipped", "cycles")
    },
    "unknown rule": (meta(*RULE, "name", "os.system"), "is of the unknown class 'os.system'"),
    "unknown hyper-parameter": (meta(*RULE, "beta", 1), "AdamW has no field 'beta'"),
    "lr -1": (meta(*RULE, "lr", -1), "lr must be finite and >= 0, got -1"),
    "lr 1e39": (meta(*RULE, "lr", 1e39), "lr is too large for float32 parameters"),
    "lr a schedule of nothing": (meta(*RULE, "lr", {"name": "Schedule"}), "is of the unknown class 'Schedule'"),
    "lr a rule": (meta(*RULE, "lr", {"name": "Adam"}), "lr must be a real number, got Adam"),
    "rule of nothing": (meta("rule", {"name": "InnerRule"}), "is of the unknown class 'InnerRule'"),
    "any rule": (meta("rule", {"name": "Rule"}), "is of the unknown class 'Rule'"),
    "momentum of nothing": (meta("rule", "outer", {"name": "Outer", "momentum": 0.5}), "unknown class 'Outer'"),
    "a schedule for a rule": (meta("rule", {"name": "Constant", "value": 1}), "the state's rule must be a rule"),
    "rule a number": (meta("rule", 3), "the state's rule must be a rule, got int"),
    "Lookahead around itself": (nested_lookahead(40), "is nested too deeply"),
    "two levels": (nested_lookahead(1), 'the checkpoint has no tensor "'),
    "groups an object": (meta("groups", {}), "the checkpoint's groups must be a list"),
    "groups of numbers": (meta("groups", [3]), "the checkpoint's groups must be pairs of a pattern and a dict"),
    "group of none": (tensor_of("group", lambda group: group + 2), "group of a leaf must be an integer in [0, 2), got"),
    "group of -1": (
        tensor_of("group", lambda group: group - 1),
        "group of a leaf must be an integer in [0, 2), got -1",
    ),
    "groups of bytes": (tensor_of("group", np.zeros(7, "u1")), 'the tensor "group" of the checkpoint is U8'),
    "no groups of leaves": (without("group"), 'the checkpoint has no tensor "group"'),
    "many groups": (meta("groups", [["", {}]] * 5000), "groups, and there may be at most"),
    "unknown option": (meta("options", "eval", "1"), "the state's options must be max_grad_norm, "),
    "max_grad_norm a text": (meta("options", "max_grad_norm", "1"), "max_grad_norm must be a real number, got str"),
    "max_grad_norm 0": (meta("options", "max_grad_norm", 0), "max_grad_norm must be finite and > 0, got 0"),
    "nonfinite": (meta("options", "nonfinite", "ignore"), "nonfinite must be one of "),
    "centralize": (meta("options", "centralize", 7), "along which to centralize"),
    "seed": (meta("options", "seed", -1), "seed must be an integer >= 0"),
    "state_dtype": (meta("options", "state_dtype", "int4"), "state_dtype must be one of "),
    "another state_dtype": (meta("options", "state_dtype", "int8"), 'the checkpoint has no tensor "'),
    "master weights": (meta("options", "master_weights", True), 'has no tensor "master/'),
    "steps -5": (meta("steps", -5), "steps must be an integer in [0, 1152921504606846976), got -5"),
    "steps 2^60": (meta("steps", 2**60), "steps must be an integer in [0, 1152921504606846976)"),
    "steps of many digits": (lambda tensors, plain: '{"steps":' + "9" * 5000 + "}", "the text "),
    "cycles": (meta("cycles", [[1]]), "the state's cycles must be pairs of integers"),
    "cycle past its end": (meta("cycles", [[3, 1]]), "steps of the cycle must be an integer in [0, 3), got 3"),
    "unknown key": (meta("threads", 4), "the state has the unknown key 'threads'"),
    "carry": (tensor_of("carry", np.zeros((7, 3))), 'the tensor "carry" of the checkpoint is F64 of shape (7, 3), but'),
    "no tensor": (without("v/w"), 'the checkpoint has no tensor "v/w"'),
    "no steps of leaves": (without("steps"), 'the checkpoint has no tensor "steps"'),
    "tensor unknown": (tensor_of("x/w", np.ones(2)), 'the checkpoint has the unknown tensor "x/w"'),
    "shape": (tensor_of("v/w", np.ones(2, "f4")), 'the tensor "v/w" of the checkpoint is F32 of shape (2,), but F32'),
    "dtype": (tensor_of("v/w", np.ones((20, 15))), 'the tensor "v/w" of the checkpoint is F64 of shape (20, 15), but'),
    "steps of floats": (tensor_of("steps", np.ones(7)), 'the tensor "steps" of the checkpoint is F64'),
    "steps of -1": (tensor_of("steps", lambda steps: steps - 9), "must be an integer in [0, 1152921504606846976)"),
    "steps of 2^60": (tensor_of("steps", lambda steps: steps + 2**60), "must be an integer in [0, 11529215046068"),
    "carry of NaN": (tensor_of("carry", lambda carry: carry * np.nan), "holds an infinity or a NaN"),
    "negative v": (tensor_of("v/w", lambda v: -v), 'v of the state of "w" holds a negative number'),
    "NaN in m": (tensor_of("m/w", lambda m: m * np.nan), 'm of the state of "w" holds an infinity or a NaN'),
}


@pytest.mark.parametrize(("change", "text"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_file_that_is_no_checkpoint_is_refused_whole(change, text, trained, tmp_path):
    path = tmp_path / "run"
    trained.save(path)
    edited(path, change)
    params = blank(tree())
    before = frozen(params)
    with pytest.raises((ValueError, TypeError)) as caught:
        ls.Optimizer.load(path, params)
    assert text in str(caught.value)
    assert caught.type is (TypeError if "real number, got str" in text else ValueError)
    assert len(str(caught.value)) < 1000
    assert frozen(params) == before


def test_the_file_itself_is_taken(trained, tmp_path):
    trained.save(tmp_path / "run")
    edited(tmp_path / "run", lambda tensors, plain: None)
    opt = ls.Optimizer.load(tmp_path / "run", blank(tree()))
    assert frozen(opt.state_dict()) == frozen(trained.state)


@pytest.mark.parametrize("content", [content for content, _ in HOSTILE.values()], ids=HOSTILE.keys())
def test_hostile_files_are_refused(content, tmp_path):
    (tmp_path / "run").write_bytes(content)
    w = np.full(3, 9.0)
    with pytest.raises(ValueError, match="cannot be read as safetensors: ") as caught:
        ls.Optimizer.load(tmp_path / "run", w)
    assert caught.type is ValueError
    assert w.tolist() == [9, 9, 9]


def test_other_files_are_no_checkpoints(tmp_path):
    write(tmp_path / "run", {"w": np.ones(3)}, {"format": "pt"})
    with refuses(ValueError, "this is no checkpoint of lookstep: its metadata has no 'lookstep'"):
        ls.Optimizer.load(tmp_path / "run", np.ones(3))


def test_a_damaged_file_is_loaded_or_refused(trained, tmp_path):
    """Whatever a few wrong bytes in the header do, it raises what is documented, and loads nothing by half."""
    path = tmp_path / "run"
    trained.save(path)
    content = path.read_bytes()
    rng = np.random.default_rng(1)
    header = 8 + int.from_bytes(content[:8], "little")
    outcomes = {True: 0, False: 0}
    for _ in range(400):
        new = bytearray(content)
        new[rng.integers(8, header)] = rng.choice(list(b'0123456789-.eE{}[]",:truefalsnm'))
        path.unlink()
        path.write_bytes(bytes(new))
        params = blank(tree())
        before = frozen(params)
        try:
            ls.Optimizer.load(path, params)
        except (ValueError, TypeError):
            assert frozen(params) == before
            outcomes[False] += 1
        else:
            outcomes[True] += 1
    assert min(outcomes.values()) > 3


def many_constants(count):
    """A schedule of as many parts as the metadata can hold."""
    parts = ",".join(['{"name":"Constant","value":1}'] * count)
    boundaries = ",".join(map(str, range(1, count)))
    return '{"name":"Joined","schedules":[' + parts + '],"boundaries":[' + boundaries + "]}"


def state_text(**changes):
    """The metadata of a small run, with some of its values as given text."""
    opt = ls.Optimizer({"w": np.ones(2)}, ls.SGD())
    state = {key: value for key, value in opt.state_dict().items() if key not in ("leaves", "rule", "carry")}
    plain = {key: json.dumps(value) for key, value in state.items()} | {"rule": '{"name":"SGD"}'} | changes
    return "{" + ",".join(f'"{key}":{value}' for key, value in plain.items()) + "}"


def run_of(text):
    group = np.ones(1, "i8") if '"groups":[[' in text else np.zeros(1, "i8")
    tensors = {"steps": np.zeros(1, "i8"), "group": group, "carry": np.zeros((2, 3)), "params/" + PATH: np.ones(2)}
    return tensors, {"lookstep": text}


PATH = "encoder/layers/0/attention/query/kernel"
SLOW = {
    "lists": state_text(rule="[" + "[]," * 250_000 + "[]]"),
    "schedules": state_text(rule='{"name":"SGD","lr":' + many_constants(20_000) + "}"),
    "groups": state_text(groups="[" + '["",{}],' * 100_000 + '["",{}]]'),
    "different groups": state_text(groups="[" + ",".join(f'["|{i}",{{}}]' for i in range(60_000)) + "]"),
    "cycles": state_text(cycles="[" + "[0,0]," * 150_000 + "[0,0]]"),
    "a long expression": state_text(groups='[["' + "|a" * 400_000 + '",{}]]'),
    "an expression that backtracks": state_text(groups='[["^(.|.)*!",{}]]'),
    "an expression that backtracks as much as it may": state_text(groups='[["^(.?){40}(.?){40}(.?){40}!",{}]]'),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hostile_files_are_refused_soon_and_in_little_memory(tmp_path):
    files = {name: content for name, (content, _) in HOSTILE.items() if len(content) > 1 << 19}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name, text in SLOW.items():
        write(tmp_path / name, *run_of(text))
    code = """if True:
        import json, os, sys, time
        import numpy as np
        import lookstep as ls
        def peak():
            return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) / 1024
        for name in sorted(os.listdir(sys.argv[1])):
            memory, start = peak(), time.process_time()  # Not the time of the clock, since the machine may be busy.
            w = np.full(2, 9.0)
            try:
                ls.Optimizer.load(os.path.join(sys.argv[1], name), {sys.argv[2]: w})
                error = None
            except ValueError as caught:
                error = str(caught)
            print(json.dumps([name, time.process_time() - start, peak() - memory, error, w.tolist()]), flush=True)"""
    run = subprocess.run([sys.executable, "-c", code, tmp_path, PATH], capture_output=True, text=True, timeout=60)
    assert run.stderr == ""
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert [name for name, *_ in found] == sorted([*files, *SLOW])
    assert [row for row in found if row[1] >= 1 or row[2] >= 64] == []
    # No expression of a file is ever run, and many schedules are still a schedule.
    harmless = ["schedules", *(name for name in SLOW if "expression" in name)]
    assert [name for name, _, _, error, _ in found if error is None] == sorted(harmless)
    assert [row for row in found if row[4] != ([9, 9] if row[3] else [1, 1]) or len(row[3] or "") > 1000] == []


# A file of this version, as `make_fixture` wrote it once: it is never written again. That it loads, and goes on to the
# same bytes, is what every later version promises.
FIXTURE = DATA / "checkpoint-1.safetensors"
FIXTURE_STEPS = 5


def fixture_params():
    return {
        "encoder": [{"w": np.zeros((4, 3), BFLOAT16), "b": np.zeros(3, "f4")}],
        "head": np.asfortranarray(np.zeros((3, 2), "f4")),
        "frozen": np.zeros(2, "f4"),
        "scale": np.zeros((), BFLOAT16),
    }


def fixture_gradients(params):
    """Of products and differences of few bits alone, so that every machine has the same."""
    structure = Structure(params)
    return structure.build([np.asarray(p * p.dtype.type(0.5) - p.dtype.type(0.25)) for p in structure.leaves(params)])


def make_fixture(path):
    rule = ls.Lookahead(
        ls.AdamW(lr=schedules.Linear(0.5, 0.125, steps=16), weight_decay=0.125), 4, 0.5, inner_state="pullback"
    )
    params = fixture_params()
    for path_, leaf in leaves(params).items():
        leaf[...] = (np.arange(leaf.size).reshape(leaf.shape) - len(path_) % 5).astype("f4") / 4
    groups = [("b$", {"weight_decay": 0.0, "slow_step": 0.25}), ("^frozen$", {"frozen": True})]
    opt = ls.Optimizer(params, rule, groups=groups, max_grad_norm=64.0)
    for _ in range(FIXTURE_STEPS):
        opt.step(fixture_gradients(params))
    opt.save(path)


def fixture_end(path):
    """The digest of all bytes, two cycles on."""
    params = fixture_params()
    opt = ls.Optimizer.load(path, params)
    for _ in range(8):
        opt.step(fixture_gradients(params))
    assert (opt.steps, opt.syncs) == (FIXTURE_STEPS + 8, 3)
    arrays = [*leaves(params).values(), *leaves(opt.slow).values()]
    arrays += [array for leaf in opt.state.values() for array in leaf.values()]
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def test_a_file_of_version_1_loads_for_ever():
    expected = json.loads((DATA / "checkpoint-1.json").read_text(encoding="utf-8"))
    assert hashlib.sha256(FIXTURE.read_bytes()).hexdigest() == expected["file"], "the fixture is never changed"
    params = fixture_params()
    opt = ls.Optimizer.load(FIXTURE, params)
    assert repr(opt.rule.inner.lr) == "Linear(start=0.5, end=0.125, steps=16)"
    assert (opt.rule.sync_period, opt.rule.slow_step, opt.rule.inner_state) == (4, 0.5, "pullback")
    assert opt.groups == (("b$", {"weight_decay": 0.0, "slow_step": 0.25}), ("^frozen$", {"frozen": True}))
    assert (opt.steps, opt.syncs, opt.skipped) == (FIXTURE_STEPS, 1, 0)
    assert (
        hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves(params).values())).hexdigest() == expected["params"]
    )
    assert fixture_end(FIXTURE) == expected["end"]


def test_the_fixture_is_what_this_version_computes(tmp_path):
    make_fixture(tmp_path / "run")
    assert fixture_end(tmp_path / "run") == fixture_end(FIXTURE)
