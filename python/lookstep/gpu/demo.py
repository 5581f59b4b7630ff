"""The demonstration's second face: the same digits, trained on a GPU, beside the same training in NumPy.

Needs `pip install "lookstep[demo,gpu]"`.
"""

import platform
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import wgpu
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits

from .. import digits as plain
from .._core import __version__
from ..demo import Report, make_console, progress
from ..digits import BATCH, FAMILIES, HIDDEN, SLOW_STEP, SYNC_PERIOD, Array, Digits, Family, Params, evaluate
from ..lookahead import Lookahead
from ..optimizer import Optimizer
from .device import default_device
from .digits import MLP, train

TITLE = "Lookahead on handwritten digits, on a GPU"
COLUMNS = ("rule", "learning rate", "engine", "loss\n1/1000", "fast\n%", "slow\n%", "time\nµs/step")
NOTE = (
    "Loss: the mean of the last epoch's training losses. Fast, slow: validation accuracy of the fast weights and of "
    "the slow ones, a step before a sync, where they are furthest apart. Time: of a whole step, forward and backward "
    "too; on the GPU, from the first recording to the reading of the losses."
)
INTRO = """\
<p>A small network learns scikit-learn's scans of handwritten digits inside Lookahead, twice from the same weights and
in the same order: in NumPy, and on a GPU, where forward, backward and optimizer are compute shaders and nothing is read
back until the end. Expected is the same training: sums are rounded in another order, and what that changes grows with
the steps.</p>"""


class Task(NamedTuple):
    """What is trained on: rows of the digits, minibatch after minibatch, so many of them in an epoch."""

    digits: Digits
    order: Array
    epoch: int
    seed: int

    @classmethod
    def make(cls, seed: int, epochs: int) -> "Task":
        """Ends a step before a sync."""
        digits, rng = Digits.load(seed), np.random.default_rng((seed, 1))
        order = np.concatenate([digits.order(rng) for _ in range(epochs)])
        return cls(digits, order[: len(order) // SYNC_PERIOD * SYNC_PERIOD - 1], len(order) // epochs, seed)

    def network(self) -> plain.MLP:
        """The same first weights at each call."""
        return plain.MLP(np.random.default_rng((self.seed, 0)))

    def accuracy(self, params: Params) -> float:
        """Of digits that are not trained on."""
        return evaluate(params, self.digits.x_val, self.digits.y_val)[1]


class Run(NamedTuple):
    """One training: the loss of each minibatch, accuracies at the end, and how long all steps took."""

    losses: Array
    fast: float
    slow: float
    seconds: float


def train_in_numpy(task: Task, rule: Lookahead) -> Run:
    """The training of the other demonstration."""
    mlp, losses, seconds = task.network(), [], 0.0
    opt = Optimizer(mlp.params, rule)
    for rows in task.order:
        x, y = task.digits.x[rows], task.digits.y[rows]
        losses.append(evaluate(mlp.params, x, y)[0])
        start = perf_counter()
        opt.step(mlp.backward(x, y))
        seconds += perf_counter() - start
    fast = task.accuracy(mlp.params)
    with opt.slow_weights():
        return Run(np.array(losses), fast, task.accuracy(mlp.params), seconds)


def train_on_gpu(task: Task, rule: Lookahead, device: Any) -> Run:
    """A submission an epoch; losses and weights are read back when all is done."""
    mlp = MLP(device, task.network().params, task.digits.x, task.digits.y, task.order)
    opt = Optimizer(mlp.arena.params, rule)
    start = perf_counter()
    for first in range(0, len(task.order), task.epoch):
        train(mlp, opt, range(first, min(first + task.epoch, len(task.order))))
    losses = mlp.losses()
    seconds = perf_counter() - start
    fast = task.accuracy(mlp.arena.download())
    with opt.slow_weights():
        return Run(losses, fast, task.accuracy(mlp.arena.download()), seconds)


class Pair(NamedTuple):
    """The same training in NumPy and on the GPU."""

    family: Family
    epoch: int
    numpy: Run
    gpu: Run

    @property
    def apart(self) -> Array:
        """The part by which the losses of each step are apart."""
        return np.abs(self.gpu.losses / self.numpy.losses - 1)

    def rows(self) -> list[list[str]]:
        """The lines of the table."""
        return [
            [
                self.family.name,
                f"{self.family.right:g}",
                name,
                f"{1e3 * run.losses[-self.epoch :].mean():.2f}",
                f"{100 * run.fast:.1f}",
                f"{100 * run.slow:.1f}",
                f"{1e6 * run.seconds / len(run.losses):.0f}",
            ]
            for name, run in (("NumPy", self.numpy), ("GPU", self.gpu))
        ]


def draw(pairs: list[Pair], path: Path) -> None:
    """Draws the training losses of both: NumPy's broad and pale, and the GPU's upon it."""
    fig = Figure(figsize=(11, 3.8), layout="constrained")
    fig.suptitle("Training loss of each minibatch, in NumPy and on the GPU")
    for ax, pair in zip(fig.subplots(1, len(pairs), sharey=True), pairs, strict=True):
        ax.plot(pair.numpy.losses, color=pair.family.color, alpha=0.35, linewidth=4, label="NumPy")
        ax.plot(pair.gpu.losses, color=pair.family.color, linewidth=0.8, label="GPU")
        ax.set(title=f"{pair.family.name} inside Lookahead", xlabel="step", ylabel="loss (nats)", yscale="log")
        ax.label_outer()
        ax.grid(alpha=0.3)
        ax.legend(loc="lower left")
    fig.savefig(path, dpi=150)


def caption(pairs: list[Pair]) -> tuple[str, list[str]]:
    """What the picture is of, and what it shows."""
    return "Training loss of each minibatch before its step: in NumPy, broad and pale, and on the GPU.", [
        f"{pair.family.name}: losses are apart by {pair.apart[: pair.epoch].max():.1g} of themselves at most in the "
        f"first epoch, and by {pair.apart.max():.1g} at most in all."
        for pair in pairs
    ]


def run(out: Path, *, quick: bool = False, seed: int = 0) -> None:
    """Trains on the GPU and in NumPy, draws, writes `gpu.html`, and prints the table.

    Args:
        out: a folder; it is made if need be.
        quick: fewer epochs.
        seed: an integer in [0, 2**32); the same seed gives the same results on the same device, times apart.

    Raises:
        OSError: if the folder cannot be written.
        RuntimeError: if there is no adapter.
        ValueError: if the seed is out of range.
    """
    start = perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    console = make_console()
    device = default_device()
    adapter = "{device} ({adapter_type}, {backend_type}; {description})".format_map(device.adapter_info)
    console.print(f"training on {adapter}", soft_wrap=True, highlight=False)
    epochs = 4 if quick else 20
    task, pairs = Task.make(seed, epochs), []
    with threadpool_limits(1), progress(console, len(FAMILIES)) as tell:
        for family in FAMILIES:
            rule = Lookahead(family.rule(family.right), sync_period=SYNC_PERIOD, slow_step=SLOW_STEP)
            pairs.append(Pair(family, task.epoch, train_in_numpy(task, rule), train_on_gpu(task, rule, device)))
            tell(f"{family.name}: {len(task.order)} steps in NumPy, and as many on the GPU")
    draw(pairs, out / "gpu.png")
    seconds = f"{perf_counter() - start:.0f} s"

    facts = (
        f"python -m lookstep demo --gpu --seed {seed}{' --quick' if quick else ''}: {seconds}. {adapter}. MLP "
        f"64-{HIDDEN}-10 in float32; {epochs} epochs, minibatches of {BATCH}; SGD with momentum 0.9; Lookahead with "
        f"sync_period={SYNC_PERIOD} and slow_step={SLOW_STEP:g}. lookstep {__version__}, wgpu {wgpu.__version__}, "
        f"Python {platform.python_version()}, NumPy {np.__version__}, {platform.system()} {platform.machine()}."
    )
    report = Report(TITLE, COLUMNS, [row for pair in pairs for row in pair.rows()], NOTE)
    report.write(out / "gpu.html", INTRO, {"gpu": caption(pairs)}, facts)
    report.show(console)
    console.print(f"{out / 'gpu.html'}, after {seconds}", soft_wrap=True, highlight=False)
