"""The demonstration: what Lookahead changes on handwritten digits, and where it changes nothing.

A multi-layer perceptron in plain NumPy learns scikit-learn's digits by RAdam, Adam and SGD, plain and inside Lookahead,
at learning rates from too low to too high. Every number of the report comes from the run. Needs
`pip install "lookstep[demo]"`.
"""

import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import sklearn
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from threadpoolctl import threadpool_limits

from ._core import __version__
from .digits import (
    BATCH,
    DRAWN,
    FAMILIES,
    HIDDEN,
    ROLES,
    SLOW_STEP,
    SYNC_PERIOD,
    TASKS,
    Comparison,
    Family,
    Results,
    measure,
)
from .plot import draw_accuracy, draw_cycle, draw_losses

COLUMNS = ("rule", "learning rate", "plain\n%", "Lookahead\n%", "gain\npoints", "plain\nµs/step", "Lookahead\nµs/step")
NOTE = (
    "Validation accuracy: mean ± standard deviation of the seeds. Gain: of Lookahead over plain, seed by seed, ± two "
    "standard errors. Time: of the optimizer's step alone, syncs included; the median of a run, the least of the "
    "seeds. Rates are called after what they are in a run of 20 epochs; shorter runs need higher ones."
)
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; }}
div {{ overflow-x: auto; }}
figure {{ margin: 2.5rem 0; }}
img {{ max-width: 100%; background: white; border-radius: 4px; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .8rem; border-bottom: 1px solid #8886; text-align: right; white-space: pre-line; }}
:is(th, td):nth-child(-n+2) {{ text-align: left; }}
</style>
<h1>{title}</h1>
{intro}
<div><table><thead><tr>{head}</tr></thead><tbody>
{body}</tbody></table></div>
<p><small>{note}</small></p>
{figures}<p><small>{facts}</small></p>
</html>
"""
TITLE = "Lookahead on handwritten digits"
INTRO = """\
<p>A small network learns scikit-learn's scans of handwritten digits: by each rule as it is, and inside Lookahead
(<a href="https://arxiv.org/abs/1907.08610">Zhang, Lucas, Hinton &amp; Ba, 2019</a>). From each seed, every rule gets
the same first weights and the same order of digits.</p>
<p>Expected is that Lookahead helps, and narrows the spread between seeds, where the learning rate is too high; that it
costs progress where the rate is too low or the run short; and that it makes no difference where the rate is right.
Below is what this run shows: all numbers are its own, and "higher" and "lower" are said beyond two standard errors
only.</p>"""


@contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """A function that prints a line after each of `total` tasks; on a terminal, above a bar."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=total)

        def report(text: str) -> None:
            print(text, flush=True)
            bar.advance(task)

        yield report


def draw(results: Results, out: Path) -> None:
    """Draws the three pictures."""
    subject = f"handwritten digits, {results.seeds} seeds, {results.epochs} epochs"

    fig = Figure(figsize=(11, 3.8), layout="constrained")
    fig.suptitle(f"Accuracy against learning rate: mean ± standard deviation ({subject})")
    for ax, family in zip(fig.subplots(1, len(FAMILIES), sharey=True), FAMILIES, strict=True):
        sides = zip(*(results.comparisons[family.name, rate].sides for rate in family.rates), strict=True)
        plain, lookahead = (np.stack([runs.final for runs in side], axis=1) for side in sides)
        draw_accuracy(ax, family.rates, plain, lookahead, color=family.color)
        ax.set(title=family.name, ylim=(0, 100), ylabel="validation accuracy (%)")
        ax.label_outer()
        ax.grid(alpha=0.3)
        ax.legend(loc="lower center")
    fig.savefig(out / "accuracy.png", dpi=150)

    fig = Figure(figsize=(11, 9), layout="constrained")
    fig.suptitle(f"Validation loss: median and range ({subject})")
    columns = fig.subplots(len(FAMILIES), len(ROLES), sharex=True, sharey=True).T
    for column, role in zip(columns, ROLES, strict=True):
        for ax, c in zip(column, results.at(role), strict=True):
            plain, lookahead = (runs.losses for runs in c.sides)
            draw_losses(ax, range(results.epochs + 1), plain, lookahead, color=c.family.color)
            ax.set(title=f"{c.family.name}, learning rate {c.rate:g}: {ROLES[role]}", ylabel="validation loss (nats)")
            ax.label_outer()
            ax.grid(alpha=0.3)
    for ax in columns[0]:  # where curves leave room
        ax.legend(loc="lower left")
    fig.savefig(out / "losses.png", dpi=150)

    fig = Figure(figsize=(7.5, 6.5), layout="constrained")
    ax, cycle = fig.subplots(), results.cycle
    draw_cycle(ax, cycle.plane, cycle.fast, cycle.slow, results.train_loss, color=DRAWN.color)
    ax.set_title(f"One cycle of Lookahead around {DRAWN.name}, over contours of the training loss")
    ax.legend()
    fig.savefig(out / "cycle.png", dpi=150)


def captions(results: Results) -> dict[str, tuple[str, list[str]]]:
    """For each picture what it is of, and what it shows: every number and every judgement is computed."""

    def each(words: Callable[[Any], str], items: Iterable[Any]) -> str:
        return f"{'; '.join(map(words, items))}."

    def change(c: Comparison) -> str:
        plain, lookahead = c.sides
        return f"{c.family.name} {plain} to {lookahead} ({c.verdict})"

    def small_rates(family: Family) -> str:
        low, above = (results.comparisons[family.name, rate] for rate in family.rates[:2])
        plain, lookahead = low.sides[0], above.sides[1]
        return f"{family.name} plain at {low.rate:g} {plain}, Lookahead at {above.rate:g} {lookahead}"

    def first_losses(c: Comparison) -> str:
        plain, lookahead = (np.median(runs.losses[:, 1]) for runs in c.sides)
        return f"{c.family.name} {plain:.2f} to {lookahead:.2f}"

    highest = (results.comparisons[family.name, family.rates[-1]] for family in FAMILIES)
    cycle, period = results.cycle, len(results.cycle.fast) - 1
    before, after, end = (results.train_loss(params) for params in (*cycle.slow, cycle.fast[-1]))
    slow_residual, fast_residual = (max(map(cycle.plane.residual, path)) for path in (cycle.slow, cycle.fast))
    accuracy = (
        f"Validation accuracy after {results.epochs} epochs against the learning rate: mean of {results.seeds} seeds, "
        "in a band of ± one standard deviation. Dashed and open: the plain rule. Solid and filled: Lookahead around "
        "it, evaluated at its slow weights.",
        [
            *(f"Rate {name}, plain to Lookahead, %: {each(change, results.at(role))}" for role, name in ROLES.items()),
            f"The highest rate tried, plain to Lookahead, %: {each(change, highest)}",
            f"While rates are small, Lookahead should move as the plain rule does at {SLOW_STEP:g} times the rate. "
            f"Accuracies here, %: {each(small_rates, FAMILIES)}",
        ],
    )
    losses = (
        f"Validation loss before training and after each epoch: median of {results.seeds} seeds, in a band from the "
        "least to the greatest. Lookahead is evaluated at its slow weights.",
        [
            f"After the first epoch, rate {name}, median loss plain to Lookahead: "
            f"{each(first_losses, results.at(role))}"
            for role, name in ROLES.items()
        ],
    )
    path = (
        f"Steps {cycle.first + 1} to {cycle.first + period} of Lookahead with sync_period={period} around {DRAWN.name} "
        f"at {DRAWN.right:g}, in the plane through the first, middle and last fast weights of the cycle, as in the "
        "paper's Figure 1. Contours are of the training loss.",
        [
            "The paper's claim: fast weights swing across steep directions while they make progress along flat ones, "
            f"and slow weights smooth the swing out. In this cycle, slow weights go from a training loss of "
            f"{before:.4f} to {after:.4f}; fast weights end at {end:.4f}.",
            f"Slow weights are at most {slow_residual:.1g} away from the plane. Fast weights are drawn where they are "
            f"closest to it, and are at most {fast_residual:.2g} away.",
        ],
    )
    return {"accuracy": accuracy, "losses": losses, "cycle": path}


class Report(NamedTuple):
    """A table and pictures: for the terminal, and as a page that needs nothing but the pictures beside it."""

    title: str
    columns: Sequence[str]
    rows: list[list[str]]
    note: str

    def write(self, path: Path, intro: str, pictures: dict[str, tuple[str, list[str]]], facts: str) -> None:
        """Writes the page; of each picture it says what it is of, and what it shows."""
        head = "".join(f"<th>{column}</th>" for column in self.columns)
        body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in self.rows)
        figures = ""
        for name, (what, shown) in pictures.items():
            figures += f'<figure><img src="{name}.png" alt="{escape(what)}">\n<figcaption><p>{escape(what)}</p>\n<ul>\n'
            figures += "".join(f"<li>{escape(line)}</li>\n" for line in shown) + "</ul></figcaption></figure>\n"
        note, facts = escape(self.note), escape(facts)
        page = PAGE.format(title=self.title, intro=intro, head=head, body=body, note=note, figures=figures, facts=facts)
        path.write_text(page, encoding="utf-8")

    def show(self, console: Console) -> None:
        """Prints the table."""
        table = Table(title=self.title, caption=self.note, caption_justify="left", box=box.SIMPLE_HEAD)
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i > 1 else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        console.print(table)


def make_console() -> Console:
    """The terminal's, or 100 columns where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=100)


def run(out: Path, *, quick: bool = False, seed: int = 0) -> None:
    """Trains, draws, writes `index.html`, and prints the table.

    Args:
        out: a folder; it is made if need be.
        quick: fewer seeds and epochs, for a first look.
        seed: an integer in [0, 2**32); the same seed gives the same results, times apart.

    Raises:
        OSError: if the folder cannot be written.
        ValueError: if the seed is out of range.
    """
    start = perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    console = make_console()
    seeds, epochs = (3, 4) if quick else (8, 20)
    # Threads only cost time on arrays this small; and where the rate is too high, training may well diverge.
    with threadpool_limits(1), np.errstate(over="ignore", invalid="ignore"):
        with progress(console, len(TASKS)) as tell:
            results = measure(seed, seeds, epochs, tell)
        draw(results, out)
    seconds = f"{perf_counter() - start:.0f} s"

    facts = (
        f"python -m lookstep demo --seed {seed}{' --quick' if quick else ''}: {seconds}. MLP 64-{HIDDEN}-10 in "
        f"float32; {seeds} seeds, {epochs} epochs, minibatches of {BATCH}; SGD with momentum 0.9; Lookahead "
        f"with sync_period={SYNC_PERIOD} and slow_step={SLOW_STEP:g}. lookstep {__version__}, Python "
        f"{platform.python_version()}, NumPy {np.__version__}, scikit-learn {sklearn.__version__}, matplotlib "
        f"{matplotlib.__version__}, {platform.system()} {platform.machine()}."
    )
    report = Report(TITLE, COLUMNS, results.rows(), NOTE)
    report.write(out / "index.html", INTRO, captions(results), facts)
    report.show(console)
    console.print(f"{out / 'index.html'}, after {seconds}", soft_wrap=True, highlight=False)
