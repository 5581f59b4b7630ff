"""Checks the engines of a case, and times those that are right, in turns."""

import gc
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from engines import ENGINES, Contender, Missing
from workload import SCALES, Arrays, Case, Check

SAMPLE = 2e-3
"""Seconds that a sample lasts at least."""
PATIENCE = 5.0
"""Seconds that an engine has for all its rounds; a slower one sits out some of them."""
PAUSE = 10e-3
"""Seconds in which the threads of the engine before go to sleep; until then they spin, on CPUs that others need."""


@dataclass
class Row:
    """What an engine took for a step."""

    engine: str
    median_us: float
    p10_us: float
    gb_per_s: float
    of_limit: float | None
    """The limit's time over the engine's; not where the engine does something else than the table says."""
    vs_lookstep: float | None
    """The engine's time over lookstep's. Both are medians of the rounds' ratios."""
    note: str = ""


@dataclass
class Table:
    """A case, measured."""

    case: Case
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, float] = field(default_factory=dict)
    """Engines that are not timed, and by how many tolerances they are off."""

    def row(self, engine: str) -> Row | None:
        return next((row for row in self.rows if row.engine == engine), None)

    def as_dict(self) -> dict[str, Any]:
        case = self.case
        shown = {name: value for name, value in vars(case).items() if name != "engines" and value not in (None, False)}
        return {
            **shown,
            "elements": case.elements,
            "bytes_per_element": case.bytes,
            "clock": "wall" if on_wall(case) else "CPU",
            "rows": [{k: v for k, v in vars(row).items() if v not in (None, "")} for row in self.rows],
            "left_out": self.left_out | {name: f"wrong by {off:.3g} tolerances" for name, off in self.wrong.items()},
        }


def on_wall(case: Case) -> bool:
    return case.wall or case.threads > 1


@contextmanager
def kept_busy() -> Iterator[None]:
    """A process for each CPU, which does nothing as fast as it can."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    time.sleep(0.5)
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def error(check: Check, does: Case, arrays: Arrays, contender: Contender) -> float:
    """The largest error of an engine that has just been built, in tolerances."""
    for scale in SCALES:
        arrays.scale_gradients(scale)
        contender.push()
        contender.step()
    arrays.scale_gradients(1.0)
    contender.push()
    contender.pull()
    return check.error(does, arrays.sample())


def sample(contender: Contender, steps: int, clock: Callable[[], float] = time.perf_counter) -> float:
    step = contender.step
    start = clock()
    for _ in range(steps):
        step()
    return (clock() - start) / steps


def contenders_of(table: Table, arrays: Arrays, names: Sequence[str]) -> dict[str, Contender]:
    """Those that are there, and right."""
    case, contenders, checks = table.case, dict[str, Contender](), dict[Case, Check]()
    for name in names:
        arrays.reset()
        try:
            contender = ENGINES[name](case, arrays)
            does = contender.case or case
            what = replace(does, state_dtype=None)
            if what not in checks:
                checks[what] = Check(what, arrays)
            off = 0.0 if name == "limit" else error(checks[what], does, arrays, contender)
        except Missing as why:
            if str(why):
                table.left_out[name] = str(why)
        except Exception as why:
            if name.startswith("lookstep"):
                raise
            table.left_out[name] = f"{type(why).__name__}: {str(why).partition(chr(10))[0]}"
        else:
            if off <= 1:
                contenders[name] = contender
            else:
                table.wrong[name] = off
    return contenders


def compare(case: Case, names: Sequence[str], rounds: int) -> Table:
    """One table: the engines of a case take turns, in another order each round."""
    table, arrays = Table(case), Arrays(case)
    contenders = contenders_of(table, arrays, names)
    steps, every, times = {}, {}, {}
    for name, contender in contenders.items():
        cycle = (contender.case or case).cycle
        once = sample(contender, cycle)
        if once < 0.1:
            once = min(once, sample(contender, cycle), sample(contender, cycle))
        steps[name] = cycle * max(1, math.ceil(SAMPLE / (once * cycle)))
        every[name] = math.ceil(once * steps[name] * rounds / PATIENCE)
        times[name] = np.full(rounds, np.nan)
    turns = list(contenders)
    shuffle = random.Random(0).shuffle
    clock = time.perf_counter if on_wall(case) else time.thread_time
    gc.collect()
    gc.disable()
    for turn in range(rounds):
        shuffle(turns)
        for name in turns:
            if turn % every[name]:
                continue
            contender = contenders[name]
            cycle = (contender.case or case).cycle
            if case.threads > 1:
                time.sleep(PAUSE)
            if steps[name] > cycle or case.threads > 1:  # what is in the cache, and who sleeps, is not this one's doing
                sample(contender, cycle)
            times[name][turn] = sample(contender, steps[name], clock)
    gc.enable()
    for name, mine in times.items():
        contender = contenders[name]
        does = contender.case or case
        median = float(np.nanmedian(mine))
        comparable = "limit" in times and does.bytes == case.bytes
        table.rows.append(
            Row(
                name,
                round(median * 1e6, 2),
                round(float(np.nanquantile(mine, 0.1)) * 1e6, 2),
                round(does.bytes * case.elements / median / 1e9, 2),
                round(float(np.nanmedian(times["limit"] / mine)), 3) if comparable else None,
                round(float(np.nanmedian(mine / times["lookstep"])), 3) if "lookstep" in times else None,
                contender.note,
            )
        )
    return table
