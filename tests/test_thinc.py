"""A rule as an optimizer of thinc is the rule, in place, to thinc's models and to spaCy's training."""

import copy
import importlib.metadata
import io
import pickle
import re
from itertools import count
from pathlib import Path

import numpy as np
import pytest

import lookstep as ls
from lookstep.schedules import Linear

thinc = pytest.importorskip("thinc.api", reason='needs thinc: pip install "lookstep[thinc]"')

from lookstep.thinc import Lookahead, Optimizer  # noqa: E402

ENTRY_POINTS = {"lookstep.Lookahead.v1": Lookahead, "lookstep.Optimizer.v1": Optimizer}
RULES = {
    "radam": ls.RAdam(lr=0.1),
    "adamw": ls.AdamW(lr=0.1, weight_decay=0.3),
    "lamb": ls.LAMB(lr=0.1),
    "lookahead": ls.Lookahead(ls.Adam(lr=0.1), 3, 0.3),
    "nested": ls.Lookahead(
        ls.Lookahead(ls.SGD(lr=0.1, momentum=0.9), 2, inner_state="pullback"), 2, outer=ls.Nesterov(0.5)
    ),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
KEY = (0, "W")


@pytest.fixture(scope="module", autouse=True)
def _registered():
    """What the entry points do in an installed package."""
    for name, function in ENTRY_POINTS.items():
        thinc.registry.optimizers.register(name, func=function)


def made(text):
    return thinc.registry.resolve(thinc.Config().from_str(text))["optimizer"]


def one_array(opt, start=10.0, steps=9):
    """The weights after each step of a constant gradient, and what is to be evaluated."""
    w, path = np.array([start], "f4"), []
    for _ in range(steps):
        opt(KEY, w, np.ones(1, "f4"))
        path.append((float(w[0]), float(opt.averages[KEY][0])))
    return zip(*path, strict=True)


def gradients(steps, shape=(7, 5), seed=0):
    return np.random.default_rng(seed).standard_normal((steps, *shape)).astype("f4")


def weights(shape=(7, 5)):
    return np.random.default_rng(1).standard_normal(shape).astype("f4")


def test_averages_are_the_slow_weights():
    fast, slow = one_array(Lookahead(ls.SGD(lr=1.0), sync_period=3))
    assert fast == (9, 8, 8.5, 7.5, 6.5, 7, 6, 5, 5.5)
    assert slow == (10, 10, 8.5, 8.5, 8.5, 7, 7, 7, 5.5)


def test_weights_move_in_place_and_gradients_become_zero():
    w, g = weights(), gradients(1)[0]
    start = w.copy()
    moved, done = Optimizer(ls.SGD(lr=0.1))(KEY, w, g)
    assert moved is w
    assert done is g
    assert (w != start).all()
    assert not g.any()


@every_rule
def test_it_is_the_rule_bit_for_bit(rule):
    here, there = weights(), weights()
    opt, plain = Optimizer(rule, grad_clip=0.0), ls.Optimizer({"W": there}, rule)
    for g in gradients(9):
        plain.step({"W": g})
        opt(KEY, here, g.copy())
        assert here.tobytes() == there.tobytes()
        assert opt.averages[KEY].tobytes() == plain.slow["W"].tobytes()


def test_slow_step_one_is_the_inner_rule_bit_for_bit():
    here, there = weights(), weights()
    plain, wrapped = Optimizer(ls.RAdam(lr=0.1)), Lookahead(ls.RAdam(lr=0.1), 5, 1.0)
    for g in gradients(12):
        plain(KEY, here, g.copy())
        wrapped(KEY, there, g.copy())
    assert here.tobytes() == there.tobytes()


def test_the_first_steps_of_radam_are_whole():
    # Without a rectifier yet, a step is lr times the mean of gradients; thinc's own starts its count at 2.
    _, w = one_array(Optimizer(ls.RAdam(lr=0.1)), steps=5)
    np.testing.assert_allclose(w, 10 - 0.1 * np.arange(1, 6), rtol=1e-6)


@pytest.mark.parametrize("grad_clip", [0.0, 0.5, 1.0, 100.0])
def test_gradients_of_an_array_are_clipped_by_their_norm(grad_clip):
    w, g = weights(), gradients(1)[0]
    norm = np.linalg.norm(np.float64(g))
    expected = w - 0.1 * g * (grad_clip / norm if grad_clip and norm > grad_clip else 1)
    Optimizer(ls.SGD(lr=0.1), grad_clip=grad_clip)(KEY, w, g)
    np.testing.assert_allclose(w, expected, rtol=1e-6, atol=1e-7)


def test_a_rate_is_scaled_for_one_call():
    here, there = weights(), weights()
    opt, plain = Optimizer(ls.Adam(lr=0.1), grad_clip=0.0), ls.Optimizer(there, ls.Adam(lr=0.1))
    for g, scale in zip(gradients(4), (1.0, 0.5, 0.0, 2.0), strict=True):
        opt(KEY, here, g.copy(), lr_scale=scale)
        plain.lr = 0.1 * scale
        plain.step(g)
    assert here.tobytes() == there.tobytes()


RATES = {
    "list": [0.5, 0.25, 0.125],
    "thinc": lambda: (0.5**i for i in count(1)),
    "lookstep": {"name": "Linear", "start": 0.5, "end": 0.0, "steps": 2},
}


@pytest.mark.parametrize(
    ("rates", "moves"),
    [("list", (0.5, 0.25, 0.125, 0.125)), ("thinc", (0.5, 0.25, 0.125, 0.0625)), ("lookstep", (0.5, 0.25, 0, 0))],
)
def test_rates_follow_schedules_by_step_schedules(rates, moves):
    lr = RATES[rates]
    opt = Optimizer({"name": "SGD", "lr": lr() if callable(lr) else lr}, grad_clip=0.0)
    w = np.array([10.0, 10.0], "f4")
    for move in moves:
        assert opt.learn_rate == move
        before = w.copy()
        for i in range(2):
            opt((i, "b"), w[i : i + 1], np.ones(1, "f4"))
        assert (before - w).tolist() == [move, move]
        opt.step_schedules()


def test_a_schedule_of_a_rule_is_a_schedule_of_thinc():
    opt = Lookahead(ls.SGD(lr=Linear(1.0, 0.0, steps=4)), 3, slow_step=Linear(0.5, 1.0, steps=6))
    rates = []
    for _ in range(6):
        rates.append(opt.learn_rate)
        opt.step_schedules()
    assert rates == [1, 0.75, 0.5, 0.25, 0, 0]


def test_rate_and_clipping_may_be_set_between_steps():
    opt = Optimizer({"name": "SGD", "lr": 1.0}, grad_clip=[4.0, 2.0])
    w, path = np.array([10.0], "f4"), []
    for _ in range(4):
        opt(KEY, w, np.full(1, 3.0, "f4"))
        path.append(float(w[0]))
        opt.step_schedules()
        opt.learn_rate /= 2
    assert path == [7, 6, 5.5, 5.25]


def test_a_cycle_advances_where_an_array_is_called():
    opt = Lookahead(ls.SGD(lr=1.0), sync_period=3)
    a, b = np.array([10.0], "f4"), np.array([10.0], "f4")
    for step in range(3):
        opt((0, "W"), a, np.ones(1, "f4"))
        if step != 1:  # It had no gradient.
            opt((0, "b"), b, np.ones(1, "f4"))
    assert (a, b) == (8.5, 8)
    assert dict(opt.nr_update) == {(0, "W"): 3, (0, "b"): 2}


@every_rule
def test_an_array_that_takes_anothers_place_goes_on_with_its_state(rule):
    here, there = weights(), weights()
    one, other = Optimizer(rule), Optimizer(rule)
    for i, g in enumerate(gradients(9)):
        if i in (2, 4):  # Other numbers: here in the same array, there in another one.
            here[...] = here / 2
            there = np.asfortranarray(there / 2)
        there = there[:]
        one(KEY, here, g.copy())
        other(KEY, there, g.copy())
        assert here.tobytes() == there.tobytes()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_alone(copied):
    opt, here = Lookahead(ls.Adam(lr=0.1), 3), weights()
    for g in gradients(4):
        opt(KEY, here, g)
    other, there = copied((opt, here))
    assert other.averages[KEY].tobytes() == opt.averages[KEY].tobytes()
    for g in gradients(3, seed=1):
        opt(KEY, here, g.copy())
        other(KEY, there, g.copy())
        assert here.tobytes() == there.tobytes()
    other.learn_rate = 0.0
    other(KEY, there, gradients(1)[0])
    assert here.tobytes() == there.tobytes()
    opt(KEY, here, gradients(1)[0])
    assert here.tobytes() != there.tobytes()


@pytest.mark.parametrize("other", [np.zeros((9, 5), "f4"), np.zeros((7, 5), "f8")], ids=["shape", "dtype"])
def test_an_array_of_another_kind_starts_afresh(other):
    opt, fresh = Lookahead(ls.Adam(lr=0.1), 2), Lookahead(ls.Adam(lr=0.1), 2)
    for g in gradients(3):
        opt(KEY, weights(), g)
    same = other.copy()
    for g in gradients(3, other.shape):
        opt(KEY, other, g.astype(other.dtype))
        fresh(KEY, same, g.astype(other.dtype))
    assert other.tobytes() == same.tobytes()


def test_without_averages_there_are_none():
    opt = Lookahead(ls.SGD(lr=1.0), use_averages=False)
    opt(KEY, np.ones(1, "f4"), np.ones(1, "f4"))
    assert opt.averages is None


def test_an_empty_gradient_changes_nothing():
    opt = Lookahead(ls.SGD(lr=1.0))
    opt(KEY, np.ones((0, 3), "f4"), np.ones((0, 3), "f4"))
    assert opt.averages == {}


BLOCKS = {
    "lookahead": (
        """[optimizer]
        @optimizers = "lookstep.Lookahead.v1"
        sync_period = 3
        slow_step = 0.5
        grad_clip = 0.0

        [optimizer.inner]
        name = "SGD"
        lr = 1.0""",
        (9, 8, 8.5, 7.5, 6.5),
    ),
    "schedule-of-thinc": (
        """[optimizer]
        @optimizers = "lookstep.Lookahead.v1"
        sync_period = 3
        [optimizer.inner]
        name = "SGD"
        [optimizer.inner.lr]
        @schedules = "constant.v1"
        rate = 1.0""",
        (9, 8, 8.5, 7.5, 6.5),
    ),
    "schedule-of-lookstep": (
        """[optimizer]
        @optimizers = "lookstep.Lookahead.v1"
        sync_period = 2
        inner_state = "reset"
        [optimizer.inner]
        name = "SGD"
        lr = 1
        momentum = 0.5
        [optimizer.slow_step]
        name = "Linear"
        start = 0.5
        end = 1.0
        steps = 3""",
        (9, 25 / 3, 22 / 3, 35 / 6),  # At step 1, two thirds of the way from 10 to 7.5; at step 3, all of it.
    ),
    "outer": (
        """[optimizer]
        @optimizers = "lookstep.Lookahead.v1"
        sync_period = 2
        slow_step = 1
        [optimizer.inner]
        name = "SGD"
        lr = 1
        [optimizer.outer]
        name = "HeavyBall"
        momentum = 0.5""",
        (9, 8, 7, 5),
    ),
    "plain": (
        """[optimizer]
        @optimizers = "lookstep.Optimizer.v1"
        [optimizer.rule]
        name = "SGD"
        lr = 1
        weight_decay = 0.1""",
        (8, 6.2),
    ),
}


@pytest.mark.parametrize(("text", "path"), BLOCKS.values(), ids=BLOCKS.keys())
def test_blocks_of_a_config_are_optimizers(text, path):
    opt = made(text)
    assert isinstance(opt, thinc.Optimizer)
    fast, _ = one_array(opt, steps=len(path))
    np.testing.assert_allclose(fast, path, rtol=1e-6)


@pytest.mark.parametrize(
    ("inner", "text"),
    [
        ('name = "RAdm"', "inner is of the unknown class 'RAdm'; known: .*RAdam"),
        ("lr = 0.1", "inner must have the name of its class"),
        ('name = "RAdam"\nlr = -1', "inner is no RAdam that can be: lr must be finite and >= 0, got -1"),
        ('name = "RAdam"\nlearn_rate = 0.1', "RAdam has no field 'learn_rate'; it has lr, betas"),
        ('name = "Linear"\nstart = 0\nend = 1\nsteps = 3', "inner must be a rule such as .*, got Linear"),
    ],
)
def test_blocks_that_cannot_be_are_refused(inner, text):
    with pytest.raises(ValueError, match=text):
        made(f'[optimizer]\n@optimizers = "lookstep.Lookahead.v1"\n[optimizer.inner]\n{inner}')


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Lookahead(thinc.Adam()), TypeError, 'inner must be a rule, .* put name = "RAdam" in place of @optim'),
        (lambda: Optimizer(thinc.Adam()), TypeError, 'rule must be a rule, .* put name = "RAdam" in place of @optim'),
        (lambda: Optimizer(ls.Adam), TypeError, "rule must be a rule such as .*, got the class Adam"),
        (lambda: Lookahead(0.1), TypeError, "inner must be a rule such as .*, got float"),
        (lambda: Lookahead(ls.Adam(), 2.5), TypeError, "sync_period must be an integer >= 1, got float 2.5"),
        (lambda: Lookahead({"name": "Adam"}, 2.5), ValueError, "sync_period must be an integer >= 1, got float 2.5"),
        (lambda: Lookahead(ls.Adam(), 5, 1.5), ValueError, r"slow_step must be in \[0, 1\], got 1.5"),
        (lambda: Optimizer(ls.Adam(), grad_clip=-1), ValueError, "grad_clip must be finite and >= 0, got -1"),
        (lambda: Optimizer(ls.Adam(), grad_clip="1"), TypeError, "grad_clip must be a real number, got str '1'"),
        (lambda: Optimizer(ls.Adam(), use_averages=1), TypeError, "use_averages must be True or False, got int 1"),
    ],
)
def test_what_cannot_be_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("w", "g", "error", "text"),
    [
        (
            [1.0],
            [1.0],
            TypeError,
            r"the weights of \(0, 'W'\) must be a NumPy array, got builtins.list: train on the CPU",
        ),
        (np.ones(2, "f4"), None, TypeError, r"the gradient of \(0, 'W'\) must be a NumPy array, got builtins.NoneType"),
        (np.ones(2, "f4"), np.ones(3, "f4"), ValueError, r'grads\["W"\] has shape \(3,\)'),
        (np.ones(2, "i4"), np.ones(2, "f4"), TypeError, r'params\["W"\] has dtype int32'),
        (np.broadcast_to(np.float32(1), 2), np.ones(2, "f4"), ValueError, r'params\["W"\] is read-only'),
    ],
)
def test_arrays_that_cannot_be_stepped_are_refused(w, g, error, text):
    before = np.array(w)
    with pytest.raises(error, match=text):
        Optimizer(ls.SGD(lr=1.0))(KEY, w, g)
    assert (before == w).all()


def test_a_rate_that_cannot_be_is_refused_before_anything_moves():
    opt, w = Optimizer({"name": "SGD", "lr": [1.0, np.nan]}), weights()
    opt.step_schedules()
    with pytest.raises(ValueError, match="lr must be finite and >= 0, got nan at step 0, from learn_rate"):
        opt(KEY, w, gradients(1)[0])
    assert w.tobytes() == weights().tobytes()


LABELS = np.eye(3, dtype="f4")[np.random.default_rng(3).integers(0, 3, 60)]
INPUTS = (LABELS @ np.array([[1, 0, 0, 1], [0, 1, 0, -1], [0, 0, 1, 0]])).astype("f4") + gradients(1, (60, 4))[0] / 4


def network():
    thinc.fix_random_seed(0)
    return thinc.chain(thinc.Relu(8, 4), thinc.Softmax(3, 8)).initialize(X=INPUTS, Y=LABELS)


def train(model, opt, steps):
    for _ in range(steps):
        predicted, back = model.begin_update(INPUTS)
        back((predicted - LABELS) / len(LABELS))
        model.finish_update(opt)
        opt.step_schedules()
    return model


def bits(*models):
    return [node.get_param(name).tobytes() for model in models for node in model.walk() for name in node.param_names]


def accuracy(model):
    return (model.predict(INPUTS).argmax(1) == LABELS.argmax(1)).mean()


def test_a_model_learns_and_is_evaluated_on_its_slow_weights():
    opt = Lookahead(ls.RAdam(lr=0.1))
    model = network()
    assert accuracy(model) < 0.7
    train(model, opt, 52)
    fast, slow = bits(model), [a.tobytes() for a in opt.averages.values()]
    assert slow != fast
    with model.use_params(opt.averages):
        assert bits(model) == slow
        assert accuracy(model) > 0.95
    assert bits(model) == fast
    assert bits(train(model, opt, 3)) == [a.tobytes() for a in opt.averages.values()]  # The 55th step is a sync.


def test_averages_are_arrays_that_kernels_of_thinc_take():
    model = thinc.HashEmbed(4, 10, column=0).initialize()
    ids = np.arange(6, dtype="uint64").reshape(3, 2)
    opt = Lookahead(ls.SGD(lr=1.0), 3)
    vectors, back = model.begin_update(ids)
    back(np.ones_like(vectors))
    model.finish_update(opt)
    with model.use_params(opt.averages):
        assert (model.predict(ids) == vectors).all()
    assert (model.predict(ids) != vectors).all()


SCHEDULED = """[optimizer]
@optimizers = "lookstep.Lookahead.v1"
sync_period = 4
inner_state = "pullback"
[optimizer.inner]
name = "AdamW"
[optimizer.inner.lr]
@schedules = "decaying.v1"
base_rate = 0.1
decay = 0.1"""


@pytest.mark.parametrize("stop", [0, 1, 4, 6])
def test_a_resumed_run_is_the_same_run(stop, tmp_path):
    first, second = network(), network()
    opt = made(SCHEDULED)
    for model in (first, second):
        train(model, opt, stop)
    opt.to_disk(tmp_path / "state", first, second)
    again = [network().from_bytes(model.to_bytes()) for model in (first, second)]
    other = made(SCHEDULED)
    other.from_disk(tmp_path / "state", *again)
    assert other.learn_rate == opt.learn_rate
    assert [a.tobytes() for a in other.averages.values()] == [a.tobytes() for a in opt.averages.values()]
    assert list(other.nr_update.values()) == list(opt.nr_update.values())
    for model in (first, second):
        train(model, opt, 6)
    for model in again:
        train(model, other, 6)
    assert bits(first, second) == bits(*again)


def damaged(path):
    data = path.read_bytes()
    path.write_bytes(data[:-4])


def of_another_kind(path):
    ls.Optimizer(np.ones(1), ls.Adam()).save(path)


SPOILT = {
    "damaged": (damaged, lambda: (made(SCHEDULED), network()), "cannot be read as safetensors"),
    "another-kind": (of_another_kind, lambda: (made(SCHEDULED), network()), "this is no state of lookstep.thinc"),
    "another-rule": (None, lambda: (Lookahead(ls.SGD(), 4), network()), "the state is not of this rule: it has .*/m"),
    "more-of-a-rule": (
        None,
        lambda: (Lookahead(ls.Adan(), 4, inner_state="pullback"), network()),
        "the state is damaged, or of another rule",
    ),
    "shorter-period": (
        None,
        lambda: (Lookahead(ls.AdamW(), 2, inner_state="pullback"), network()),
        "steps of the cycle",
    ),
    "smaller-model": (None, lambda: (made(SCHEDULED), thinc.Relu(8, 4).initialize()), "which these models do not have"),
    "other-shape": (
        None,
        lambda: (made(SCHEDULED), thinc.chain(thinc.Relu(9, 4), thinc.Softmax(3, 9)).initialize()),
        "of shape",
    ),
    "ahead": (None, lambda: (train_ahead(made(SCHEDULED)), network()), "schedules are 2 steps ahead of the state"),
}


def train_ahead(opt):
    for _ in range(5):
        opt.step_schedules()
    return opt


@pytest.mark.parametrize(("spoil", "make", "text"), SPOILT.values(), ids=SPOILT.keys())
def test_states_that_do_not_fit_are_refused_and_nothing_is_loaded(spoil, make, text, tmp_path):
    opt, model, path = made(SCHEDULED), network(), tmp_path / "state"
    train(model, opt, 3)
    opt.to_disk(path, model)
    if spoil:
        spoil(path)
    other, its = make()
    before, rate = bits(its), other.learn_rate
    with pytest.raises(ValueError, match=text):
        other.from_disk(path, its)
    assert (bits(its), other.learn_rate, other.averages) == (before, rate, {})


def test_a_state_needs_all_models(tmp_path):
    opt = Lookahead(ls.Adam())
    train(network(), opt, 1)
    with pytest.raises(ValueError, match="is a parameter of none of these models: pass every model that the opt"):
        opt.to_disk(tmp_path / "state", network())
    assert list(tmp_path.iterdir()) == []


CONFIG = """
[nlp]
lang = "en"
pipeline = ["textcat"]

[components]

[components.textcat]
factory = "textcat"

[components.textcat.model]
@architectures = "spacy.TextCatBOW.v3"
exclusive_classes = true
ngram_size = 1
no_output_layer = false
length = 64

[corpora]

[corpora.train]
@readers = "lookstep.tests.words.v1"

[corpora.dev]
@readers = "lookstep.tests.words.v1"

[training]
seed = 0
eval_frequency = 3

[training.logger]
@loggers = "lookstep.tests.silence.v1"

[training.optimizer]
@optimizers = "lookstep.Lookahead.v1"
sync_period = 5
slow_step = 0.5
grad_clip = 1.0
use_averages = true

[training.optimizer.inner]
name = "RAdam"
lr = 0.1
"""


@pytest.fixture(scope="module")
def spacy():
    spacy = pytest.importorskip("spacy", reason="needs spaCy: pip install spacy")
    texts = {"good fine nice": "good", "nice good": "good", "bad poor sad": "bad", "sad bad": "bad"}

    @spacy.registry.readers("lookstep.tests.words.v1")
    def words():
        def examples(nlp):
            for text, label in texts.items():
                cats = {"good": float(label == "good"), "bad": float(label == "bad")}
                yield spacy.training.Example.from_dict(nlp.make_doc(text), {"cats": cats})

        return examples

    @spacy.registry.loggers("lookstep.tests.silence.v1")
    def silence():
        return lambda nlp, stdout, stderr: (lambda info: None, lambda: None)

    return spacy


def spacy_run(spacy, folder, **training):
    """The pipeline after training by the config, and what was saved of it."""
    config = thinc.Config().from_str(CONFIG, overrides={f"training.{name}": value for name, value in training.items()})
    whole = spacy.util.load_model_from_config(config, auto_fill=True).config
    nlp = spacy.training.initialize.init_nlp(whole)
    folder.mkdir()
    spacy.training.loop.train(nlp, folder, stdout=io.StringIO(), stderr=io.StringIO())
    return nlp, spacy.load(folder / "model-last")


def test_spacy_trains_by_its_config_and_saves_the_slow_weights(spacy, tmp_path):
    nlp, saved = spacy_run(spacy, tmp_path / "7", max_steps=7)
    _, at_sync = spacy_run(spacy, tmp_path / "5", max_steps=5)
    model, slow = nlp.get_pipe("textcat").model, saved.get_pipe("textcat").model
    assert bits(slow) == bits(at_sync.get_pipe("textcat").model) != bits(model)
    _, fast = spacy_run(spacy, tmp_path / "fast", max_steps=7, **{"optimizer.use_averages": False})
    assert bits(fast.get_pipe("textcat").model) == bits(model)


def test_a_loop_over_update_of_spacy_learns(spacy):
    nlp = spacy.util.load_model_from_config(thinc.Config().from_str(CONFIG), auto_fill=True)
    examples = list(spacy.registry.readers.get("lookstep.tests.words.v1")()(nlp))
    opt = nlp.initialize(lambda: examples)
    assert isinstance(opt, Optimizer)
    for _ in range(30):
        nlp.update(examples, sgd=opt)
    with nlp.use_params(opt.averages):
        assert all(
            nlp(example.text).cats[label] > 0.6
            for example in examples
            for label, is_it in example.y.cats.items()
            if is_it
        )


def test_a_torch_layer_of_a_model_is_stepped_too():
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3)
    model = thinc.chain(thinc.PyTorchWrapper(layer), thinc.softmax_activation()).initialize()
    opt = Lookahead(ls.Adam(lr=0.1), 3)
    train(model, opt, 51)
    assert accuracy(model) > 0.95
    assert set(opt.nr_update.values()) == {51}


def test_a_gradient_that_cannot_be_made_zero_moves_nothing():
    opt = Lookahead(ls.SGD(lr=1.0))
    w, g = np.ones(3, "f4"), np.ones(3, "f4")
    g.flags.writeable = False
    with pytest.raises(ValueError, match="read-only: pass a copy"):
        opt((0, "W"), w, g)
    assert w.tolist() == [1, 1, 1]


def test_the_blocks_of_the_page_are_optimizers():
    page = (Path(__file__).parent.parent / "docs/thinc.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```ini\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    for block in blocks:
        config = thinc.Config().from_str(f"[training]\n\n{block}")
        assert isinstance(thinc.registry.resolve(config["training"])["optimizer"], Optimizer)


def test_the_installed_package_registers_its_optimizers():
    points = importlib.metadata.entry_points(group="thinc_optimizers")
    ours = {point.name: point.load() for point in points if point.name.startswith("lookstep.")}
    assert ours == ENTRY_POINTS
