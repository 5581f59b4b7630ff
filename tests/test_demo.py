"""The demo: its gradients, its geometry, its report, and what it says when it cannot run."""

import subprocess
import sys

import numpy as np
import pytest

import lookstep as ls
from lookstep.plot import flatten, plane

digits = pytest.importorskip("lookstep.digits", reason="the demo's packages are not installed")


@pytest.fixture(scope="module")
def scans():
    return digits.Digits.load(0)


def test_gradients_are_those_of_the_loss(scans):
    """Against central differences in float64, whose own error is of the order of h^2."""
    rng = np.random.default_rng(1)
    mlp = digits.MLP(rng)
    x, y = next(scans.epoch(rng))
    grads = mlp.backward(x, y)
    params = {name: param.astype(np.float64) for name, param in mlp.params.items()}
    for name, param in params.items():
        for i in rng.integers(param.size, size=30):
            losses = []
            for h in (1e-5, -1e-5):
                param.flat[i] += h
                losses.append(digits.evaluate(params, np.float64(x), y)[0])
                param.flat[i] -= h
            assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(grads[name].flat[i], abs=1e-6)


def test_validation_digits_are_not_trained_on(scans):
    assert len(scans.x) + len(scans.x_val) == 1797
    assert not {x.tobytes() for x in scans.x} & {x.tobytes() for x in scans.x_val}
    assert {x.dtype for x in (scans.x, scans.x_val)} == {np.dtype("f4")}


def test_the_recorded_cycle_is_one_of_a_plain_run(scans):
    inner = ls.SGD(lr=0.1, momentum=0.9)
    cycle = digits.record_cycle(inner, scans, 0, first=50, period=10)
    rng = np.random.default_rng((0, 0))
    mlp = digits.MLP(rng)
    opt = ls.Optimizer(mlp.params, ls.Lookahead(inner, sync_period=10))
    batches = [batch for _ in range(2) for batch in scans.epoch(rng)]
    for x, y in batches[:60]:
        opt.step(mlp.backward(x, y))
    assert flatten(mlp.params).tobytes() == flatten(cycle.slow[1]).tobytes()
    assert len(cycle.fast) == 11
    for slow in cycle.slow:
        assert cycle.plane.residual(slow) < 1e-5


def test_plane_through_three_points():
    w1, w2, w3 = (
        {"a": np.array(w[:2]), "b": np.array(w[2:])}
        for w in ([1, 0, 2, -1, 0.5], [3, 0, 2, -1, 0.5], [2, 3, 2, -1, 4.5])
    )
    through = plane(w1, w2, w3)
    np.testing.assert_allclose(through.u, [1, 0, 0, 0, 0], atol=1e-15)
    np.testing.assert_allclose(through.v, [0, 0.6, 0, 0, 0.8], atol=1e-15)
    for w, coords in ((w1, (0, 0)), (w2, (2, 0)), (w3, (1, 5))):
        assert through.coords(w) == pytest.approx(coords, abs=1e-14)
        assert through.residual(w) == pytest.approx(0, abs=1e-14)
    p = {"b": np.array([1.0, 0, 1]), "a": np.array([2.0, 1])}
    assert through.coords(p) == pytest.approx((1, 1))
    assert through.residual(p) == pytest.approx(1.5)
    assert flatten(through.at(1, 5), w1) == pytest.approx(flatten(w3))


@pytest.mark.parametrize("third", [[2.0, 2.0], [1.0, 1.0], [0.0, 0.0], [np.nan, 0.0]])
def test_points_without_a_plane(third):
    with pytest.raises(ValueError, match="must"):
        plane(np.zeros(2), np.ones(2), np.array(third))


def run(*arguments, **kwargs):
    command = [sys.executable, "-W", "error", "-m", "lookstep", *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", **kwargs)


def test_the_quick_demo_writes_a_report(tmp_path):
    done = run("demo", "--quick", "--out", str(tmp_path / "report"), "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "Lookahead on handwritten digits" in done.stdout
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    for picture in ("accuracy", "losses", "cycle"):
        assert f'src="{picture}.png"' in page
        assert (tmp_path / "report" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert "nan" not in page
    assert "{" not in page.partition("</style>")[2]


def test_the_demo_says_what_is_wrong(tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write" in run("demo", "--quick", "--out", str(tmp_path / "file")).stderr
    assert "--seed" in run("demo", "--seed", "-1").stderr


@pytest.mark.parametrize("missing", ["matplotlib", "rich", "sklearn"])
def test_the_demo_names_what_is_not_installed(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from lookstep.__main__ import main; main(['demo'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert f'the demonstration needs {missing}: pip install "lookstep[demo]"' in done.stderr
