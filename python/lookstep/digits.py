"""The demonstration's training: a small network learns handwritten digits, with Lookahead and without.

A multi-layer perceptron in plain NumPy, with its own backward pass, and scikit-learn's scans. Needs
`pip install "lookstep[demo]"`.
"""

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import count, islice
from time import perf_counter_ns
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from .hyper import Rule
from .lookahead import Lookahead
from .optimizer import Optimizer
from .plot import Plane, plane
from .rules import SGD, Adam, InnerRule, RAdam

Array: TypeAlias = NDArray[Any]
Params: TypeAlias = dict[str, Array]

BATCH, HIDDEN = 32, 32
SYNC_PERIOD, SLOW_STEP = 5, 0.5

ROLES = {"low": "too low", "right": "right", "high": "too high"}


@dataclass(frozen=True)
class Family:
    """An inner rule, and the rates that it is tried at: the second is the first over `SLOW_STEP`."""

    name: str
    rule: Callable[[float], InnerRule]
    rates: tuple[float, ...]
    low: float
    right: float
    high: float
    color: str


def _sgd(lr: float) -> SGD:
    return SGD(lr, momentum=0.9)


# Colours of Okabe and Ito, told apart by colour-blind people too.
FAMILIES = (
    Family("RAdam", RAdam, (1e-3, 2e-3, 1e-2, 5e-2, 0.2, 0.5, 1.0), 1e-3, 1e-2, 0.5, "#0072B2"),
    Family("Adam", Adam, (5e-4, 1e-3, 5e-3, 2e-2, 0.1, 0.2, 0.5), 5e-4, 5e-3, 0.2, "#D55E00"),
    Family("SGD", _sgd, (2e-3, 4e-3, 2e-2, 0.1, 0.2, 0.5, 1.0), 2e-3, 0.1, 0.5, "#009E73"),
)
DRAWN = FAMILIES[2]
"""The family whose cycle is drawn."""
TASKS = [(family, rate) for family in FAMILIES for rate in family.rates]
"""What is trained: each family at each of its rates."""


class Digits(NamedTuple):
    """Scans of handwritten digits, 64 pixels in [0, 1] each, and what they show."""

    x: Array
    y: Array
    x_val: Array
    y_val: Array

    @classmethod
    def load(cls, seed: int) -> "Digits":
        """Keeps a fifth of each digit for validation."""
        x, y = load_digits(return_X_y=True)
        x, x_val, y, y_val = train_test_split(
            x.astype(np.float32) / 16, y, test_size=0.2, stratify=y, random_state=seed
        )
        return cls(x, y, x_val, y_val)

    def order(self, rng: np.random.Generator) -> Array:
        """The training set in a new order, a row a minibatch; the few digits that fill none wait for the next epoch."""
        return rng.permutation(len(self.x))[: len(self.x) // BATCH * BATCH].reshape(-1, BATCH)

    def epoch(self, rng: np.random.Generator) -> Iterator[tuple[Array, Array]]:
        """Minibatches of the training set in a new order."""
        for rows in self.order(rng):
            yield self.x[rows], self.y[rows]


class MLP:
    """64 pixels, 32 rectified units, 10 classes, with softmax cross-entropy; gradients go to arrays made once."""

    def __init__(self, rng: np.random.Generator) -> None:
        """Draws weights as He et al. (2015) do."""
        self.params: Params = {
            "w1": rng.normal(0, np.sqrt(2 / 64), (64, HIDDEN)).astype(np.float32),
            "b1": np.zeros(HIDDEN, np.float32),
            "w2": rng.normal(0, np.sqrt(2 / HIDDEN), (HIDDEN, 10)).astype(np.float32),
            "b2": np.zeros(10, np.float32),
        }
        self.grads = {name: np.zeros_like(param) for name, param in self.params.items()}
        self._hidden, self._back = np.empty((2, BATCH, HIDDEN), np.float32)
        self._out = np.empty((BATCH, 10), np.float32)
        self._rows = np.arange(BATCH)

    def backward(self, x: Array, y: Array) -> Params:
        """The gradient of the mean loss of a minibatch, in `grads`."""
        hidden, back, out, w, g = self._hidden, self._back, self._out, self.params, self.grads
        np.matmul(x, w["w1"], out=hidden)
        np.add(hidden, w["b1"], out=hidden)
        np.maximum(hidden, 0, out=hidden)
        np.matmul(hidden, w["w2"], out=out)
        np.add(out, w["b2"], out=out)

        # Softmax less one-hot: what cross-entropy sends back to the outputs.
        np.subtract(out, out.max(1, keepdims=True), out=out)
        np.exp(out, out=out)
        np.divide(out, out.sum(1, keepdims=True), out=out)
        out[self._rows, y] -= 1
        np.divide(out, BATCH, out=out)

        np.matmul(hidden.T, out, out=g["w2"])
        np.sum(out, 0, out=g["b2"])
        np.matmul(out, w["w2"].T, out=back)
        np.multiply(back, hidden > 0, out=back)
        np.matmul(x.T, back, out=g["w1"])
        np.sum(back, 0, out=g["b1"])
        return g


def evaluate(params: Params, x: Array, y: Array) -> tuple[float, float]:
    """The mean loss, infinite where training has diverged, and the accuracy."""
    out = np.maximum(x @ params["w1"] + params["b1"], 0) @ params["w2"] + params["b2"]
    accuracy = np.mean(out.argmax(1) == y)
    out -= out.max(1, keepdims=True)
    loss = np.mean(np.log(np.exp(out).sum(1)) - out[np.arange(len(y)), y])
    return float(loss) if np.isfinite(loss) else np.inf, float(accuracy)


def train(rule: Rule, digits: Digits, seed: tuple[int, int], epochs: int) -> tuple[Array, float]:
    """Trains one network: validation loss and accuracy after each epoch, and the microseconds of a step."""
    rng = np.random.default_rng(seed)
    mlp = MLP(rng)
    opt = Optimizer(mlp.params, rule)
    history, times = [evaluate(mlp.params, digits.x_val, digits.y_val)], []
    for _ in range(epochs):
        for x, y in digits.epoch(rng):
            grads = mlp.backward(x, y)
            start = perf_counter_ns()
            opt.step(grads)
            times.append(perf_counter_ns() - start)
        with opt.slow_weights() as params:
            history.append(evaluate(params, digits.x_val, digits.y_val))
    # Means of whole cycles, so that syncs count; their median, so that what else the machine does counts less.
    cycles = np.reshape(times[: len(times) // SYNC_PERIOD * SYNC_PERIOD], (-1, SYNC_PERIOD)).mean(1)
    return np.array(history), float(np.median(cycles)) / 1e3


class Runs(NamedTuple):
    """One rule, trained from several seeds: a row a seed, a column an epoch, the first before training."""

    losses: Array
    accuracies: Array
    step_us: float

    @classmethod
    def of(cls, trained: Iterable[tuple[Array, float]]) -> "Runs":
        """Gathers what `train` has returned."""
        histories, times = zip(*trained, strict=True)
        losses, accuracies = np.moveaxis(np.stack(histories), 2, 0)
        return cls(losses, accuracies, min(times))

    @property
    def final(self) -> Array:
        """The last accuracy of each seed."""
        return self.accuracies[:, -1]

    def __str__(self) -> str:
        """Mean and standard deviation of the last accuracies, in percent."""
        return f"{100 * self.final.mean():.1f} ± {100 * self.final.std(ddof=1):.1f}"


class Cycle(NamedTuple):
    """The fast weights of one cycle, step by step, the slow ones before and after, and the plane to see them in."""

    first: int
    fast: list[Params]
    slow: list[Params]
    plane: Plane


def record_cycle(inner: InnerRule, digits: Digits, seed: int, first: int = 200, period: int = 10) -> Cycle:
    """Trains up to a cycle, and records it."""
    rng = np.random.default_rng((seed, 0))
    mlp = MLP(rng)
    # Never reached: the loop below syncs by itself, to see the last fast weights before they are gone.
    opt = Optimizer(mlp.params, Lookahead(inner, sync_period=first + period + 1, slow_step=SLOW_STEP))
    batches = (batch for _ in count() for batch in digits.epoch(rng))
    for step, (x, y) in enumerate(islice(batches, first)):
        opt.step(mlp.backward(x, y))
        if (step + 1) % period == 0:
            opt.sync()
    fast = [deepcopy(mlp.params)]
    for x, y in islice(batches, period):
        opt.step(mlp.backward(x, y))
        fast.append(deepcopy(mlp.params))
    opt.sync()
    return Cycle(first, fast, [fast[0], deepcopy(mlp.params)], plane(fast[0], fast[period // 2], fast[-1]))


class Comparison(NamedTuple):
    """A rule at one rate: plain, and inside Lookahead."""

    family: Family
    rate: float
    sides: tuple[Runs, Runs]

    @property
    def gain(self) -> tuple[float, float]:
        """What Lookahead adds to the accuracy, seed by seed, in points: mean, and twice its standard error."""
        plain, lookahead = self.sides
        gains = 100 * (lookahead.final - plain.final)
        return float(gains.mean()), float(2 * gains.std(ddof=1) / np.sqrt(len(gains)))

    @property
    def verdict(self) -> str:
        """Whether the gain is more than chance."""
        gain, margin = self.gain
        return "no clear difference" if abs(gain) <= margin else "higher" if gain > 0 else "lower"

    def row(self, role: str) -> list[str]:
        """The line of the table."""
        gain, margin = self.gain
        times = [f"{runs.step_us:.1f}" for runs in self.sides]
        rate = f"{self.rate:g}, {ROLES[role]}"
        return [self.family.name, rate, *map(str, self.sides), f"{gain:+.1f} ± {margin:.1f}", *times]


class Results(NamedTuple):
    """All that was trained."""

    digits: Digits
    seeds: int
    epochs: int
    comparisons: dict[tuple[str, float], Comparison]
    cycle: Cycle

    def at(self, role: str) -> list[Comparison]:
        """Every family at its rate of that role."""
        return [self.comparisons[family.name, getattr(family, role)] for family in FAMILIES]

    def rows(self) -> list[list[str]]:
        """The table: the families one after another, each from its lowest rate to its highest."""
        by_family = zip(*([c.row(role) for c in self.at(role)] for role in ROLES), strict=True)
        return [row for rows in by_family for row in rows]

    def train_loss(self, params: Params) -> float:
        """The loss on the training set."""
        return evaluate(params, self.digits.x, self.digits.y)[0]


def measure(seed: int, seeds: int, epochs: int, report: Callable[[str], None]) -> Results:
    """Trains everything, and reports a line of text for each of `TASKS`."""
    digits = Digits.load(seed)
    comparisons = {}
    for family, rate in TASKS:
        inner = family.rule(rate)
        rules = inner, Lookahead(inner, sync_period=SYNC_PERIOD, slow_step=SLOW_STEP)
        # By turns, so that their times are taken under the same conditions.
        trained = [[train(rule, digits, (seed, i), epochs) for rule in rules] for i in range(seeds)]
        plain, lookahead = map(Runs.of, zip(*trained, strict=True))
        comparisons[family.name, rate] = Comparison(family, rate, (plain, lookahead))
        report(f"{family.name} at {rate:g}: plain {plain} %, Lookahead {lookahead} %")
    cycle = record_cycle(DRAWN.rule(DRAWN.right), digits, seed)
    return Results(digits, seeds, epochs, comparisons, cycle)
