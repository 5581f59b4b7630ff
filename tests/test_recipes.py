"""The pages for autograd and scikit-learn do what they say: their functions are held to oracles here."""

import re
from pathlib import Path

import numpy as np
import pytest

import lookstep as ls

DOCS = Path(__file__).parent.parent / "docs"


def page(name, folder, monkeypatch):
    """What the examples of a page define."""
    monkeypatch.chdir(folder)
    snippets = re.findall(
        r"^```python\n(.*?)^```$", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert snippets
    namespace = {}
    for snippet in snippets:
        exec(compile(snippet, name, "exec"), namespace)
    return namespace


@pytest.fixture
def minimize(tmp_path, monkeypatch):
    pytest.importorskip("autograd", reason="needs autograd: pip install autograd")
    return page("autograd.md", tmp_path, monkeypatch)["minimize"]


def test_the_loop_around_autograd_gives_every_step_to_its_caller(minimize):
    seen = []
    rule = ls.Lookahead(ls.SGD(lr=1.0), sync_period=3)
    start = {"w": np.array([10.0], "f4"), "rest": [np.zeros((2, 3)), np.array(0.0)]}

    def gradient(p, i):
        return {"w": np.ones_like(p["w"]), "rest": [np.zeros((2, 3)), np.asarray(0.0)]}

    last = minimize(gradient, start, lambda p, i, g: seen.append((i, float(p["w"][0]))), 8, rule)
    assert seen == list(enumerate([10, 9, 8, 8.5, 7.5, 6.5, 7, 6]))
    assert last["w"] == 7  # The slow weights.
    assert last["w"].dtype == "float32"
    assert start["w"] == 10


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install scikit-learn")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return page("scikit-learn.md", tmp_path_factory.mktemp("page"), monkeypatch)


def drawn(recipe, dtype="float64", **options):
    """A network with new weights, these, and a batch."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((20, 4)).astype(dtype), rng.integers(0, 3, 20)
    net = recipe["MLPClassifier"](hidden_layer_sizes=(5,), activation="tanh", alpha=0.1, random_state=0)
    net.set_params(**recipe["PLAIN_SGD"] | options).partial_fit(x, y, classes=range(3))
    return net, net.coefs_ + net.intercepts_, x, y


def test_the_step_of_scikit_learn_is_the_gradient_of_its_loss(recipe):
    net, weights, x, y = drawn(recipe)
    rng = np.random.default_rng(1)
    before = [w.copy() for w in weights]
    grads = recipe["gradients"](net, weights, x, y)
    assert all((w == old).all() for w, old in zip(weights, before, strict=True))
    way = [rng.standard_normal(w.shape) for w in weights]

    def loss(h):
        for w, old, d in zip(weights, before, way, strict=True):
            w[...] = old + h * d
        return net.partial_fit(x, y).loss_

    # scikit-learn's penalty leaves out intercepts, in its loss as in its gradient.
    slope = sum((g * d).sum() for g, d in zip(grads, way, strict=True))
    assert slope == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, rel=1e-7)


def test_with_sgd_it_is_the_solver_of_scikit_learn(recipe):
    own, theirs, x, y = drawn(recipe, learning_rate_init=0.1)
    net, weights, _, _ = drawn(recipe)
    for w, their in zip(weights, theirs, strict=True):
        their[...] = w
    opt = ls.Optimizer(weights, ls.SGD(lr=0.1))
    for _ in range(10):
        own.partial_fit(x, y)
        opt.step(recipe["gradients"](net, weights, x, y))
    for w, their in zip(weights, theirs, strict=True):
        np.testing.assert_allclose(w, their, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_dtype_of_the_inputs_is_that_of_the_weights(recipe, dtype):
    net, weights, x, y = drawn(recipe, dtype)
    opt = ls.Optimizer(weights, ls.Adam(lr=0.05))
    first = net.partial_fit(x, y).loss_
    for _ in range(30):
        opt.step(recipe["gradients"](net, weights, x, y))
    assert net.partial_fit(x, y).loss_ < 0.8 * first
    assert {w.dtype.name for w in net.coefs_ + net.intercepts_} == {dtype}
