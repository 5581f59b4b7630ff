"""What is measured: a case, its arrays, and where a float64 oracle says that they end up."""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import lookstep as ls
from lookstep.rules import InnerRule, Rule

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import reference  # the oracle of the tests, from the papers

Array = np.ndarray[Any, Any]
F64 = np.ndarray[Any, np.dtype[np.float64]]

INNER = [rule for name in ls.__all__ if isinstance(rule := getattr(ls, name), type) and issubclass(rule, InnerRule)]
SGD = ls.SGD(lr=1e-3, momentum=0.9)
RULES: dict[str, Rule] = {
    **{rule.__name__: rule() for rule in INNER},
    "SGD": SGD,
    "Prodigy": ls.Prodigy(d0=1e-2),  # from 1e-6 on, its first steps are within the rounding of the parameters
    "Lookahead(AdamW)": ls.Lookahead(ls.AdamW(), sync_period=5, slow_step=0.5),
    "Lookahead(SGD)": ls.Lookahead(SGD, sync_period=5, slow_step=0.5),
}
SIZES: dict[str, list[tuple[int, ...]]] = {
    "small": [(64, 48), (48,), (48, 32), (32,), (32, 10), (10,)],
    "1e6/60": [(180, 184), (184,)] * 30,
    "1e8/200": [(500_000,)] * 200,
    "16x100000": [(16,)] * 100_000,
    **{f"2^{k}": [(1 << k,)] for k in range(12, 29)},
}
"""Shapes of parameters; a size that is not here is a number of elements in one array."""

ORACLES = {name.replace("_", ""): oracle for name, oracle in vars(reference).items()}
"""A rule's oracle has the name of its class, in the spelling of functions."""

SCALES = (1.0, -0.5, 2.0, 0.25, -1.0, 4.0, 0.5, -2.0, 1.0, 0.5)
"""What gradients are multiplied by in each step of a check: two cycles, all exact in binary."""

LOOSE = {"bfloat16": 0.02, "int8": 0.1}
"""How far off the way may end, in parts of the way, with state in fewer bits."""


def dtype_of(name: str) -> np.dtype[Any]:
    """A dtype by name; what NumPy does not have comes from ml_dtypes."""
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


@cache
def states_of(rule: Rule) -> int:
    """How many arrays of state a rule keeps for a parameter."""
    return len(ls.Optimizer(np.zeros(1, np.float32), rule).state[""])


@dataclass(frozen=True)
class Case:
    """A row of `TABLES`: what is done, over what, by which engines."""

    rule_name: str
    size: str
    engines: tuple[str, ...] = ()
    threads: int = 1
    p: str = "float32"
    g: str = "float32"
    state_dtype: str | None = None
    max_grad_norm: float | None = None
    late: int = 0
    """Steps before the first cycle of Lookahead begins."""
    wall: bool = False
    """Whether the clock is the wall's also with one thread."""
    busy: bool = False
    """Whether other processes keep all CPUs busy meanwhile."""

    @property
    def rule(self) -> Rule:
        return RULES[self.rule_name]

    @property
    def lookahead(self) -> ls.Lookahead | None:
        return self.rule if isinstance(self.rule, ls.Lookahead) else None

    @property
    def inner(self) -> Any:
        return self.lookahead.inner if self.lookahead else self.rule

    @property
    def cycle(self) -> int:
        return self.lookahead.sync_period if self.lookahead else 1

    @property
    def states(self) -> int:
        return states_of(self.inner)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return SIZES.get(self.size) or [(int(float(self.size)),)]

    @property
    def elements(self) -> int:
        return sum(map(math.prod, self.shapes))

    @property
    def bytes(self) -> float:
        """What a step cannot do without, for an element.

        It reads p, g and the state, and writes p and the state; Lookahead writes slow weights once a cycle, and reads
        them once; to clip by the norm takes a look at all gradients beforehand.
        """
        computed = 8 if self.p == "float64" else 4
        kept = {None: computed, "bfloat16": 2, "int8": 1 + 4 / 256}[self.state_dtype]
        slow = 2 * computed / self.cycle if self.lookahead else 0
        p, g = (dtype_of(name).itemsize for name in (self.p, self.g))
        return 2 * p + g * (1 if self.max_grad_norm is None else 2) + 2 * kept * self.states + slow

    @property
    def title(self) -> str:
        """What it is, in a line."""
        words = [self.rule_name, self.size, f"{self.threads} thread{'s' * (self.threads > 1)}"]
        if (self.p, self.g) != ("float32", "float32"):
            words.append(f"{self.p} parameters, {self.g} gradients")
        words += [f"state in {self.state_dtype}"] if self.state_dtype else []
        words += ["clipped by norm"] if self.max_grad_norm else []
        words += ["all CPUs kept busy by others"] if self.busy else []
        return ", ".join(words)


class Arrays:
    """Parameters and gradients of a case, which all engines share, and the elements by which results are checked.

    A large array repeats a block of numbers. So rules that sum over an array are checked by as few elements as others:
    one of each place in the block, each from another repetition of it.
    """

    BLOCK = 10_000

    def __init__(self, case: Case) -> None:
        rng = np.random.default_rng(0)
        shapes, p, g = case.shapes, dtype_of(case.p), dtype_of(case.g)
        sizes = [min(n, self.BLOCK) if n > 1 << 16 else n for n in map(math.prod, shapes)]
        # A parameter of 16 bits is small, or it would hardly see the steps.
        scale = 2.0 ** (0 if p.itemsize >= 4 else -6)
        cuts = np.cumsum(sizes)[:-1]
        draw = rng.standard_normal(sum(sizes), np.float32)
        self.start = np.split((draw * np.float32(scale)).astype(p), cuts)
        # No gradient is near zero: there it would show that engines add eps in different places.
        draw = (rng.random(sum(sizes), np.float32) * np.float32(0.9) + np.float32(0.1)) * rng.choice(
            [-1, 1], sum(sizes)
        )
        self.gradients = np.split(draw.astype(g), cuts)
        self.p: list[Array] = [np.empty(shape, p) for shape in shapes]
        self.g: list[Array] = [np.empty(shape, g) for shape in shapes]
        self.places = [
            np.arange(block.size) + block.size * rng.integers(array.size // block.size, size=block.size)
            for array, block in zip(self.p, self.start, strict=True)
        ]
        self.scale_gradients(1.0)
        self.norm = math.sqrt(sum(float(np.vdot(x, x)) for x in (np.asarray(g, np.float64) for g in self.g)))

    def sample(self) -> F64:
        """The parameters that are looked at."""
        return np.concatenate([p.reshape(-1)[places] for p, places in zip(self.p, self.places, strict=True)]).astype(
            np.float64
        )

    def reset(self) -> None:
        for p, block in zip(self.p, self.start, strict=True):
            fill(p, block)

    def scale_gradients(self, scale: float) -> None:
        for g, block in zip(self.g, self.gradients, strict=True):
            fill(g, block if scale == 1 else block * block.dtype.type(scale))


def fill(array: Array, block: Array) -> None:
    """Repeats a block, the last time maybe not to its end."""
    flat = array.reshape(-1)
    whole = flat.size - flat.size % block.size
    flat[:whole].reshape(-1, block.size)[...] = block
    flat[whole:] = block[: flat.size - whole]


class Check:
    """Holds engines to the float64 oracle, after the steps of `SCALES`."""

    def __init__(self, case: Case, arrays: Arrays) -> None:
        hyper = asdict(case.inner)
        del hyper["maximize"]
        oracle = ORACLES[type(case.inner).__name__.lower()]
        start, g = (np.concatenate(blocks).astype(np.float64) for blocks in (arrays.start, arrays.gradients))
        clip = [min(1.0, (case.max_grad_norm or math.inf) / (abs(scale) * arrays.norm)) for scale in SCALES]
        p, state, path = start, dict[str, Any](), [start]
        for t, scale in enumerate(SCALES):
            if case.lookahead and t >= case.late and (t - case.late) % case.cycle == 0:
                slow = p
            p = oracle(p, clip[t] * scale * g, state, t + 1, **hyper)
            if case.lookahead and t >= case.late and (t - case.late) % case.cycle == case.cycle - 1:
                p = slow + case.lookahead.slow_step * (p - slow)
            path.append(p)
        self.end, self.top = p, np.max(np.abs(path), axis=0)
        self.way = sum(abs(after - before) for before, after in pairwise(path))

    def error(self, case: Case, found: F64) -> float:
        """The largest error in tolerances; NaN where the engine has gone astray.

        Each step rounds p twice, to decay and to move it, and its update about a dozen times, by half a unit in the
        last place of their types; a step in float64 is no more exact than the oracle. Engines that form `1 - b2**t` in
        float32 lose up to `1 / (1 - b2)` such halves of the update besides. Lookahead takes back a part of the way, but
        not of its errors. With state in fewer bits it is the norms that count.
        """
        off = found - self.end
        if case.state_dtype:
            return float(np.linalg.norm(off) / (LOOSE[case.state_dtype] * np.linalg.norm(self.way)))
        stored = 2.0 ** -{"float64": 53, "float32": 24, "float16": 11, "bfloat16": 9}[case.p]
        computed = min(stored, 2.0**-24)
        loss = 1 / (1 - max(case.inner.betas)) if hasattr(case.inner, "betas") else 0
        steps = len(SCALES) * (2 if case.p == "float64" else 1)
        return float(np.max(abs(off) / (stored * 2 * steps * self.top + computed * (16 * steps + loss) * self.way)))


def cases(
    rules: str | Sequence[str],
    sizes: str,
    engines: str,
    *,
    threads: Sequence[int] = (1,),
    **same: Any,
) -> list[Case]:
    """Every rule at every size with every number of threads."""
    names = rules.split() if isinstance(rules, str) else rules
    return [
        Case(rule, size, tuple(engines.split()), threads=count, **same)
        for count in threads
        for size in sizes.split()
        for rule in names
    ]
