"""Time of a step: lookstep beside NumPy, torch and optax, and all of them beside the memory limit.

    python benches/step.py            # every rule, size and engine: a quarter of an hour, 10 GB
    python benches/step.py --rule AdamW --size 1e6/60 --engine lookstep --engine torch-fused
    python benches/step.py --quick    # the small sizes, few rounds: does everything run, and is it right?

Engines of one rule and size take turns in one process, in another order each round, on the same arrays where they can.
Each is held against a float64 reference first; one that is off is reported and not timed. Peers that are not installed,
or do not have the rule, are named. With one thread the clock is its CPU time, otherwise wall time. jax's threads cannot
be limited from here, so optax is always timed by the wall. lookstep and NumPy use one thread.

Columns: the median time of a step, and its 10th percentile; GB/s, of the bytes that a step cannot do without (it reads
p, g and the state, and writes p and the state; Lookahead writes slow weights once a cycle, and reads them once); "of
limit", the time of the same reads and writes without arithmetic (`limit.rs`, built by cargo) over the engine's time;
"vs lookstep", the engine's time over lookstep's. Ratios are medians of the rounds' ratios; compare within a run only.
Lookahead is timed in whole cycles, and beside its inner rule alone ("lookstep-inner").

A rule is a row of `RULES`, a size one of `SIZES`, an engine one of `ENGINES`.
"""

import argparse
import ctypes
import gc
import importlib.util
import inspect
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import lookstep as ls
from lookstep.rules import Rule

F32 = np.ndarray[Any, np.dtype[np.float32]]
F64 = np.ndarray[Any, np.dtype[np.float64]]


class Row:
    """A rule, and how many state arrays it keeps for a parameter."""

    def __init__(self, rule: Rule, states: int) -> None:
        self.rule, self.states = rule, states
        self.lookahead = rule if isinstance(rule, ls.Lookahead) else None
        self.inner: Any = self.lookahead.inner if self.lookahead else rule
        self.cycle = self.lookahead.sync_period if self.lookahead else 1
        self.bytes = 4 * (3 + 2 * states + (2 / self.cycle if self.lookahead else 0))


RULES = {
    "SGD": Row(ls.SGD(lr=1e-3, momentum=0.9), states=1),
    "Adam": Row(ls.Adam(), states=2),
    "AdamW": Row(ls.AdamW(), states=2),
    "RAdam": Row(ls.RAdam(), states=2),
    "Lookahead(AdamW)": Row(ls.Lookahead(ls.AdamW(), sync_period=5, slow_step=0.5), states=2),
    "Lookahead(SGD)": Row(ls.Lookahead(ls.SGD(lr=1e-3, momentum=0.9), sync_period=5, slow_step=0.5), states=1),
}
SIZES: dict[str, list[tuple[int, ...]]] = {
    "small": [(64, 48), (48,), (48, 32), (32,), (32, 10), (10,)],
    "1e6/60": [(180, 184), (184,)] * 30,
    "1e8": [(10**8,)],
}
QUICK = ["small", "1e6/60"]


class Arrays:
    """Parameters and gradients, which all engines share, and the elements by which results are checked."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        rng = np.random.default_rng(0)
        self.p: list[F32] = [rng.standard_normal(shape, np.float32) for shape in shapes]
        # No gradient is near zero: there it would show that engines add eps in different places.
        self.g: list[F32] = [rng.random(shape, np.float32) * np.float32(0.9) + np.float32(0.1) for shape in shapes]
        for g in self.g:
            g.reshape(-1)[::2] *= -1
        self.size = sum(p.size for p in self.p)
        self.places = [np.linspace(0, p.size - 1, min(p.size, 10_000)).astype(int) for p in self.p]
        self.start = self.sample(self.p)

    def sample(self, arrays: Sequence[F32]) -> F64:
        pairs = zip(arrays, self.places, strict=True)
        return np.concatenate([x.reshape(-1)[places] for x, places in pairs]).astype(np.float64)

    def reset(self) -> None:
        ends = np.cumsum([places.size for places in self.places])[:-1]
        for p, places, start in zip(self.p, self.places, np.split(self.start, ends), strict=True):
            p.reshape(-1)[places] = start


def scalars(row: Row, t: int) -> tuple[float, float, float]:
    """Step t is p = keep * p - size * m / (root * sqrt(v) + eps); where root is 0, there is no denominator."""
    rule = row.inner
    if isinstance(rule, ls.SGD):
        return 1.0, 0.0, rule.lr
    c1, c2 = (1 - b**t for b in rule.betas)
    if not isinstance(rule, ls.RAdam):
        return 1 - rule.lr * rule.weight_decay, 1 / math.sqrt(c2), rule.lr / c1
    end = 2 / (1 - rule.betas[1]) - 1
    rho = end - 2 * t * (1 - c2) / c2
    if rho <= 5:
        return 1.0, 0.0, rule.lr / c1
    r = math.sqrt((rho - 4) * (rho - 2) * end / ((end - 4) * (end - 2) * rho))
    return 1.0, 1.0, rule.lr * r * math.sqrt(c2) / c1


def weights(row: Row) -> tuple[tuple[float, float], tuple[float, float]]:
    """Of the old value and of the new one, in m and in v."""
    if isinstance(row.inner, ls.SGD):
        return (row.inner.momentum, 1.0), (0.0, 0.0)
    b1, b2 = row.inner.betas
    return (b1, 1 - b1), (b2, 1 - b2)


SCALES = (1.0, -0.5, 2.0, 0.25, -1.0, 4.0, 0.5, -2.0, 1.0, 0.5)
"""What gradients are multiplied by in each step of a check: two cycles, all exact in binary."""


def reference(row: Row, p: F64, g: F64) -> tuple[F64, F64]:
    """Where `p` is after the steps of `SCALES`, in float64; and how far off a sound float32 engine may be.

    Each step rounds p once, and its update about a dozen times, by half a unit in the last place. Engines that form
    `1 - b2**t` in float32 lose up to `1 / (1 - b2)` such halves of the update besides.
    """
    (b1, a1), (b2, a2) = weights(row)
    m, v, moved, top, slow = 0 * p, 0 * p, 0 * p, abs(p), p
    for t, scale in enumerate(SCALES, 1):
        keep, root, size = scalars(row, t)
        m = b1 * m + a1 * (scale * g)
        v = b2 * v + a2 * (scale * g) ** 2
        after = keep * p - size * m / (root * np.sqrt(v) + row.inner.eps if root else 1)
        p, moved, top = after, moved + abs(after - p), np.maximum(top, abs(after))
        if row.lookahead and t % row.cycle == 0:
            p = slow = slow + row.lookahead.slow_step * (p - slow)
    return p, 2**-24 * (len(SCALES) * top + (12 * len(SCALES) + (1 / a2 if a2 else 0)) * moved)


@dataclass
class Contender:
    """An engine at work. One with arrays of its own takes gradients by `push`, and gives parameters by `pull`."""

    step: Callable[[], object]
    push: Callable[[], object] = lambda: None
    pull: Callable[[], object] = lambda: None
    wall: bool = False
    row: Row | None = None  # what it does, where that is not what the table is about


class Missing(Exception):
    """Why an engine has no such row, where that is worth telling."""


def need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(error) from error


def lookstep_engine(row: Row, arrays: Arrays, threads: int) -> Contender:
    return Contender(partial(ls.Optimizer(arrays.p, row.rule).step, arrays.g))


def inner_engine(row: Row, arrays: Arrays, threads: int) -> Contender:
    if not row.lookahead:
        raise Missing
    inner = Row(row.inner, row.states)
    return replace(lookstep_engine(inner, arrays, threads), row=inner)


CHUNK = 1 << 16
"""Elements that NumPy passes over a dozen times while they are in the cache; with fewer, its calls are what counts."""


def numpy_engine(row: Row, arrays: Arrays, threads: int) -> Contender:
    (b1, a1), (b2, a2) = weights(row)
    scratch = np.empty(CHUNK, np.float32)
    chunks = []
    for p, g in zip(arrays.p, arrays.g, strict=True):
        flat = p.reshape(-1), g.reshape(-1), *(np.zeros(p.size, np.float32) for _ in range(3))
        for at in range(0, p.size, CHUNK):
            cut = [x[at : at + CHUNK] for x in flat]
            chunks.append((*cut, scratch[: cut[0].size]))
    t = 0

    def step() -> None:
        nonlocal t
        t += 1
        keep, root, size = scalars(row, t)
        for p, g, m, v, slow, x in chunks:
            if row.lookahead and t % row.cycle == 1:
                slow[...] = p
            m *= b1
            m += g if a1 == 1 else np.multiply(g, a1, out=x)
            if a2:
                np.multiply(g, g, out=x)
                x *= a2
                v *= b2
                v += x
            if root:
                np.sqrt(v, out=x)
                x *= root
                x += row.inner.eps
                np.divide(m, x, out=x)
                x *= size
            else:
                np.multiply(m, size, out=x)
            if keep != 1:
                p *= keep
            p -= x
            if row.lookahead and t % row.cycle == 0:
                np.subtract(p, slow, out=x)
                x *= 1 - row.lookahead.slow_step
                p -= x

    return Contender(step)


def torch_engine(row: Row, arrays: Arrays, threads: int, wrapper: str = "", **mode: bool) -> Contender:
    if bool(row.lookahead) != bool(wrapper):
        raise Missing(*[] if wrapper else ["no Lookahead"])
    torch = need("torch")
    torch.set_num_threads(threads)
    params = [torch.from_numpy(p).requires_grad_() for p in arrays.p]
    for param, g in zip(params, arrays.g, strict=True):
        param.grad = torch.from_numpy(g)
    rule = getattr(torch.optim, type(row.inner).__name__)
    if not mode.keys() <= inspect.signature(rule).parameters.keys():
        raise Missing("no such rule")
    optimizer = rule(params, **asdict(row.inner), **mode)
    if row.lookahead:
        optimizer = need(wrapper).Lookahead(optimizer, k=row.cycle, alpha=row.lookahead.slow_step)
    return Contender(optimizer.step)


def optax_engine(row: Row, arrays: Arrays, threads: int) -> Contender:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax, optax, inner = need("jax"), need("optax"), row.inner
    make: Any = {
        ls.SGD: lambda: optax.sgd(inner.lr, inner.momentum),
        ls.Adam: lambda: optax.adam(inner.lr, *inner.betas, inner.eps),
        ls.AdamW: lambda: optax.adamw(inner.lr, *inner.betas, inner.eps, weight_decay=inner.weight_decay),
        ls.RAdam: lambda: optax.radam(inner.lr, *inner.betas, inner.eps),
    }
    rule, copy = make[type(inner)](), lambda: [jax.numpy.array(p) for p in arrays.p]
    params: Any = copy()
    if row.lookahead:
        rule = optax.lookahead(rule, row.cycle, row.lookahead.slow_step)
        params = optax.LookaheadParams(params, copy())
    state, grads = rule.init(params), list[Any]()

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = rule.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def step() -> None:
        nonlocal params, state
        params, state = jax.block_until_ready(update(params, state, grads))

    def push() -> None:
        grads[:] = [jax.numpy.array(g) for g in arrays.g]

    def pull() -> None:
        for p, own in zip(arrays.p, params.fast if row.lookahead else params, strict=True):
            p[...] = own

    return Contender(step, push, pull, wall=True)


class Leaf(ctypes.Structure):
    """As `limit.rs` declares it: p, g, up to four state arrays, slow weights, and how many elements they have."""

    _fields_ = (("arrays", ctypes.c_void_p * 7), ("n", ctypes.c_size_t))


@cache
def limit_library() -> Any:
    if shutil.which("cargo") is None:
        raise Missing("cargo is not installed")
    command = "cargo build --release --no-default-features --example limit --message-format json"
    built = subprocess.run(command.split(), cwd=Path(__file__).parent, capture_output=True, text=True)
    if built.returncode:
        raise Missing(next(line for line in built.stderr.splitlines() if line.startswith("error")))
    artifacts = [json.loads(line) for line in built.stdout.splitlines()]
    return ctypes.CDLL(next(a["filenames"][0] for a in artifacts if a.get("target", {}).get("name") == "limit"))


def limit_engine(row: Row, arrays: Arrays, threads: int) -> Contender:
    limit = limit_library().limit
    state = [[np.zeros(p.size, np.float32) for _ in range(row.states + 1)] for p in arrays.p]
    # To wake threads takes longer than a step of few elements.
    parts = threads if arrays.size > 1 << 18 else 1
    calls = []
    for part in range(parts):
        leaves = (Leaf * len(arrays.p))()
        for leaf, p, g, own in zip(leaves, arrays.p, arrays.g, state, strict=True):
            start, end = (p.size * k // parts for k in (part, part + 1))
            used = [*range(2 + row.states), 6]
            for k, x in zip(used, (p, g, *own), strict=True):
                leaf.arrays[k] = x.ctypes.data + 4 * start
            leaf.n = end - start
        calls.append(partial(limit, leaves, *map(ctypes.c_size_t, (len(leaves), row.states))))
    over = ThreadPoolExecutor(parts).map if parts > 1 else map
    slow = [1, *[0] * (row.cycle - 2), 2] if row.lookahead else [0]
    t = 0

    def step(keep_alive: Any = state) -> None:
        nonlocal t
        phase = slow[t % row.cycle]
        t += 1
        for _ in over(lambda call: call(phase), calls):
            pass

    for _ in slow:
        step()
    if not all(x[-1] for own in state for x in own[: row.states]):
        raise Missing("it has not touched the state")
    return Contender(step)


ENGINES: dict[str, Callable[[Row, Arrays, int], Contender]] = {
    "limit": limit_engine,
    "lookstep": lookstep_engine,
    "lookstep-inner": inner_engine,
    "numpy": numpy_engine,
    "torch-fused": partial(torch_engine, fused=True),
    "torch-foreach": partial(torch_engine, foreach=True),
    "torch-single": partial(torch_engine, foreach=False),
    "pytorch_optimizer": partial(torch_engine, wrapper="pytorch_optimizer", fused=True),
    "timm": partial(torch_engine, wrapper="timm.optim", fused=True),
    "optax": optax_engine,
}


def error(row: Row, arrays: Arrays, contender: Contender) -> float:
    """The largest error of an engine that has just been built, in tolerances; NaN where it has gone astray."""
    expected, tolerance = reference(row, arrays.start, arrays.sample(arrays.g))
    for scale in SCALES:
        for g in arrays.g:
            g *= scale
        contender.push()
        contender.step()
        for g in arrays.g:
            g /= scale
    contender.push()
    contender.pull()
    return float(np.max(abs(arrays.sample(arrays.p) - expected) / tolerance))


def sample(contender: Contender, steps: int, clock: Callable[[], float] = time.perf_counter) -> float:
    step = contender.step
    start = clock()
    for _ in range(steps):
        step()
    return (clock() - start) / steps


SAMPLE = 2e-3
"""Seconds that a sample lasts at least."""


def compare(row: Row, arrays: Arrays, names: Sequence[str], threads: int, rounds: int) -> bool:
    """Prints the table of one rule and size; returns whether lookstep is right."""
    contenders: dict[str, Contender] = {}
    missing, wrong = [], []
    for name in names:
        arrays.reset()
        try:
            contender = ENGINES[name](row, arrays, threads)
        except Missing as why:
            missing += [f"{name} ({why})"] if str(why) else []
            continue
        if name == "limit" or (off := error(contender.row or row, arrays, contender)) <= 1:
            contenders[name] = contender
        else:
            wrong.append(name)
            print(f"  {name:18}not timed: it is wrong, by {off:.3g} times the tolerance")
    steps, times = {}, {}
    for name, contender in contenders.items():
        once = min(sample(contender, row.cycle) for _ in range(3))
        steps[name] = row.cycle * max(1, math.ceil(SAMPLE / (once * row.cycle)))
        times[name] = np.empty(rounds)
    turns = list(contenders)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    for turn in range(rounds):
        shuffle(turns)
        for name in turns:
            contender = contenders[name]
            if steps[name] > row.cycle:  # what the engine before has left in the cache, is not this one's doing
                sample(contender, row.cycle)
            clock = time.thread_time if threads == 1 and not contender.wall else time.perf_counter
            times[name][turn] = sample(contender, steps[name], clock)
    gc.enable()
    for name, mine in times.items():
        median, low = np.median(mine), np.quantile(mine, 0.1)
        unit, word = (1e3, "ms") if median >= 1e-3 else (1e6, "µs")
        of_limit = f"{np.median(times['limit'] / mine):.3f}" if "limit" in times and not contenders[name].row else ""
        ratio = f"{np.median(mine / times['lookstep']):.2f}" if "lookstep" in times else ""
        speed = (contenders[name].row or row).bytes * arrays.size / median / 1e9
        cells = f"{median * unit:9.2f} {word}{low * unit:9.2f} {word}{speed:8.1f}{of_limit:>10}{ratio:>13}"
        print(f"  {name:18}{cells}{'  wall' if contenders[name].wall else ''}")
    if missing:
        print("  left out:", ", ".join(missing))
    return "lookstep" not in wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rule", action="append", choices=RULES, help="may be repeated; default: all")
    parser.add_argument("--size", action="append", choices=SIZES, help="may be repeated; default: all")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="may be repeated; default: all")
    parser.add_argument("--threads", type=int, default=1, help="of torch and of the limit; default: 1")
    parser.add_argument("--rounds", type=int, help="default: 31, and 9 at 1e8")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    args = parser.parse_args()
    cpus = Path("/proc/cpuinfo")
    names = [line for line in (cpus.read_text() if cpus.exists() else "").splitlines() if line.startswith("model name")]
    peers = ("lookstep", "numpy", "torch", "pytorch_optimizer", "timm", "jax", "optax")
    print(f"{datetime.now():%Y-%m-%d %H:%M}  {' '.join(sys.argv)}")
    print(names[0].partition(": ")[2] if names else platform.machine(), f"{os.cpu_count()} CPUs", sep=", ")
    print(*(f"{peer} {version(peer)}" for peer in peers if importlib.util.find_spec(peer)), sep=", ")
    print(f"{args.threads} thread(s), {'CPU' if args.threads == 1 else 'wall'} time")
    right = True
    for size in args.size or (QUICK if args.quick else SIZES):
        arrays = Arrays(SIZES[size])
        rounds = args.rounds or (5 if args.quick else 9 if arrays.size > 10**7 else 31)
        for rule in args.rule or RULES:
            row = RULES[rule]
            print(f"\n{rule}, {size}: {arrays.size} elements, {row.bytes:g} bytes each")
            print(f"  {'':18}{'median':>12}{'p10':>12}{'GB/s':>8}{'of limit':>10}{'vs lookstep':>13}", flush=True)
            right &= compare(row, arrays, args.engine or list(ENGINES), args.threads, rounds)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
