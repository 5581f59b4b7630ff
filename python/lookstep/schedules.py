"""Schedules of a hyper-parameter as pure data: one frozen dataclass a shape.

A schedule is called with the number of steps taken so far and gives the value for the next one. It holds numbers and
nothing else, so it can be printed, compared, hashed and pickled, and any step can be asked for at any time.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from typing import Any, Literal

from .hyper import Check, Checked, above_zero, at_least_zero, count, finite, flag, positive_integer, up_to_one


def _cosine_or_linear(name: str, value: Any) -> str:
    if not (isinstance(value, str) and value in ("cos", "linear")):
        raise ValueError(f'{name} must be "cos" or "linear", got {value!r}')
    return str(value)


def _schedules(name: str, value: Any) -> tuple["Schedule", ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} must be a list or tuple of schedules, got {type(value).__name__}")
    for i, schedule in enumerate(value):
        if not isinstance(schedule, Schedule):
            got = f"the class {schedule.__name__}" if isinstance(schedule, type) else type(schedule).__name__
            raise TypeError(f"{name}[{i}] must be a schedule such as Constant(1e-3), got {got}")
    if not value:
        raise ValueError(f"{name} must have at least 1 schedule")
    return tuple(value)


def _boundaries(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} must be a list or tuple of integers, got {type(value).__name__}")
    steps = tuple(positive_integer(f"{name}[{i}]", step) for i, step in enumerate(value))
    if any(here >= after for here, after in pairwise(steps)):
        raise ValueError(f"{name} must be strictly increasing, got {steps}")
    return steps


_CHECKS: dict[str, Check] = {
    "value": finite,
    "start": finite,
    "end": finite,
    "peak": finite,
    "steps": positive_integer,
    "warmup_steps": count,
    "every": positive_integer,
    "factor": at_least_zero,
    "pct_start": up_to_one,
    "anneal": _cosine_or_linear,
    "div_factor": above_zero,
    "final_div_factor": above_zero,
    "three_phase": flag,
    "schedules": _schedules,
    "boundaries": _boundaries,
}
"""What each argument must be, by name: the one place for all schedules."""


def _way(step: float, steps: float) -> tuple[float, float]:
    """The fractions of a way of `steps` that are done and left.

    Each is rounded once, so that what is left is not lost in 1 - done.
    """
    step = min(step, steps)
    return step / steps, (steps - step) / steps


def _half_cosine(done: float, left: float) -> tuple[float, float]:
    """The same, along a half cosine: (1 - cos(pi x)) / 2 = sin(pi x / 2)^2, which keeps small fractions small.

    The smaller of both is computed: there the sine is steep, so that its rounding does not turn the way back.
    """
    smaller = math.sin(math.pi / 2 * min(done, left)) ** 2
    return (smaller, 1 - smaller) if done <= left else (1 - smaller, smaller)


def _between(start: float, end: float, done: float, left: float) -> float:
    """`left * start + done * end`: exact at the ends, between them elsewhere, and monotone in `done`.

    Every operation is monotone in `done` and cannot overflow. Between ends of one sign, that sum would be neither
    monotone nor constant where they are equal; between ends of two, `end - start` could overflow.
    """
    if not done:
        return start
    if not left:
        return end
    if min(start, end) <= 0 <= max(start, end):
        return left * start + done * end
    value = start + done * (end - start)
    return min(value, end) if start <= end else max(value, end)


def _decayed(start: float, factor: float, times: int) -> float:
    """`start * factor**times`: start itself, zero or infinity where the power is out of range."""
    try:
        # At 2^64 every factor but 1 has underflowed or overflowed, and larger integers need not fit a float.
        power = math.pow(factor, min(times, 2**64))
    except OverflowError:
        power = math.inf
    return start * power if start else start


@dataclass(frozen=True)
class Schedule(Checked):
    """What every schedule has in common.

    Args:
        start: the value at step 0, finite.
        end: the value from the last step on, finite.
        peak: the value at the turn, finite.
        steps: the step from which on the schedule holds its end value, an integer >= 1.
        factor: what the value is multiplied by, finite and >= 0.

    Raises:
        TypeError: if an argument is of another type, or unknown; when called, if the step is no integer.
        ValueError: if it is out of range; when called, if the step is negative.
    """

    _checks = _CHECKS

    def __call__(self, step: int) -> float:
        """The value for the step that `step` others came before: any integer >= 0."""
        return self._at(count("step", step))

    def _at(self, step: int) -> float:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(step)")


@dataclass(frozen=True)
class Constant(Schedule):
    r"""The same value at every step.

    $$\eta_t = \eta$$

    Args:
        value: the value, finite.

    Raises:
        TypeError, ValueError: see `Schedule`.

    Example:
        >>> from lookstep.schedules import Constant
        >>> Constant(0.1)(1000)
        0.1
    """

    value: float

    def _at(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class Linear(Schedule):
    r"""A straight line from one value to another.

    $$\eta_t = \eta_0 + \frac{t}{T} (\eta_T - \eta_0)$$

    for $t \le T$, and $\eta_T$ from then on.

    Args:
        start: see `Schedule`.
        end: see `Schedule`.
        steps: see `Schedule`; $T$.

    Raises:
        TypeError, ValueError: see `Schedule`.

    Example:
        >>> from lookstep.schedules import Linear
        >>> line = Linear(0.0, 1.0, steps=4)
        >>> [line(step) for step in range(6)]
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """

    start: float
    end: float
    _: KW_ONLY
    steps: int

    def _at(self, step: int) -> float:
        return _between(self.start, self.end, *_way(step, self.steps))


@dataclass(frozen=True)
class Cosine(Schedule):
    r"""Half a cosine from one value to another: slow at both ends, fast in the middle.

    $$\eta_t = \eta_T + \frac{1}{2} (\eta_0 - \eta_T) \left(1 + \cos \frac{\pi t}{T}\right)$$

    for $t \le T$, and $\eta_T$ from then on, where torch's CosineAnnealingLR climbs again. For the paper's warm
    restarts, join several.

    Args:
        start: see `Schedule`.
        end: see `Schedule`.
        steps: see `Schedule`; $T$.

    Raises:
        TypeError, ValueError: see `Schedule`.

    Example:
        >>> from lookstep.schedules import Cosine
        >>> cosine = Cosine(1.0, steps=3)
        >>> [round(cosine(step), 3) for step in range(5)]
        [1.0, 0.75, 0.25, 0.0, 0.0]

    References:
        Loshchilov & Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017,
        https://arxiv.org/abs/1608.03983
    """

    start: float
    end: float = 0.0
    _: KW_ONLY
    steps: int

    def _at(self, step: int) -> float:
        return _between(self.start, self.end, *_half_cosine(*_way(step, self.steps)))


@dataclass(frozen=True)
class WarmupCosine(Schedule):
    r"""A straight line up to a peak, then half a cosine down.

    $$\eta_t = \eta_0 + \frac{t}{W} (\eta_W - \eta_0) \quad (t < W), \qquad
    \eta_t = \eta_T + \frac{1}{2} (\eta_W - \eta_T) \left(1 + \cos \frac{\pi (t - W)}{T - W}\right) \quad (t \ge W)$$

    for $t \le T$, and $\eta_T$ from then on. Step 0 has the start value: with the default of 0 it does not move the
    weights.

    Args:
        peak: the value at step `warmup_steps`, finite; $\eta_W$.
        warmup_steps: the length of the line, an integer in [0, `steps`); $W$. With 0 the schedule begins at its peak.
        steps: see `Schedule`; $T$. Warm-up is included.
        start: see `Schedule`.
        end: see `Schedule`.

    Raises:
        TypeError, ValueError: see `Schedule`.

    Example:
        >>> from lookstep.schedules import WarmupCosine
        >>> schedule = WarmupCosine(1.0, warmup_steps=2, steps=5)
        >>> [round(schedule(step), 3) for step in range(7)]
        [0.0, 0.5, 1.0, 0.75, 0.25, 0.0, 0.0]

    References:
        Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017,
        https://arxiv.org/abs/1706.02677
        Loshchilov & Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017,
        https://arxiv.org/abs/1608.03983
    """

    peak: float
    _: KW_ONLY
    warmup_steps: int
    steps: int
    start: float = 0.0
    end: float = 0.0

    def __post_init__(self) -> None:
        """Checks that the cosine has a step of its own."""
        super().__post_init__()
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps must be < steps, got {self.warmup_steps} of {self.steps}")

    def _at(self, step: int) -> float:
        if step < self.warmup_steps:
            return _between(self.start, self.peak, *_way(step, self.warmup_steps))
        way = _way(step - self.warmup_steps, self.steps - self.warmup_steps)
        return _between(self.peak, self.end, *_half_cosine(*way))


@dataclass(frozen=True)
class Step(Schedule):
    r"""Multiplied by a factor every so many steps: torch's StepLR.

    $$\eta_t = \eta_0 \gamma^{\lfloor t / E \rfloor}$$

    It has no last step.

    Args:
        start: see `Schedule`.
        factor: see `Schedule`; $\gamma$, torch's `gamma`.
        every: how many steps a value is held, an integer >= 1; $E$, torch's `step_size`.

    Raises:
        TypeError, ValueError: see `Schedule`.

    Example:
        >>> from lookstep.schedules import Step
        >>> stairs = Step(1.0, factor=0.5, every=2)
        >>> [stairs(step) for step in range(6)]
        [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    """

    start: float
    _: KW_ONLY
    factor: float = 0.1
    every: int

    def _at(self, step: int) -> float:
        return _decayed(self.start, self.factor, step // self.every)


@dataclass(frozen=True)
class Exponential(Schedule):
    r"""Multiplied by a factor every step: torch's ExponentialLR.

    $$\eta_t = \eta_0 \gamma^t$$

    It has no last step. A factor above 1 ends in infinity, which no hyper-parameter takes.

    Args:
        start: see `Schedule`.
        factor: see `Schedule`; $\gamma$, torch's `gamma`.

    Raises:
        TypeError, ValueError: see `Schedule`.

    Example:
        >>> from lookstep.schedules import Exponential
        >>> halved = Exponential(1.0, factor=0.5)
        >>> [halved(step) for step in range(4)]
        [1.0, 0.5, 0.25, 0.125]
    """

    start: float
    _: KW_ONLY
    factor: float

    def _at(self, step: int) -> float:
        return _decayed(self.start, self.factor, step)


@dataclass(frozen=True)
class OneCycle(Schedule):
    r"""Up to a peak, then down to far below the start: torch's OneCycleLR.

    From $\eta_0 = \eta / d$ up to the peak $\eta$ at step $P = pT - 1$, then down to $\eta_0 / f$ at step $T - 1$, the
    last of $T$; there it stays. With three phases, down to $\eta_0$ at step $2P$ before that. A phase from step $a$ to
    step $b$ goes from $\eta_a$ to $\eta_b$ along half a cosine or a straight line:

    $$\eta_t = \eta_b + \frac{1}{2} (\eta_a - \eta_b) \left(1 + \cos \frac{\pi (t - a)}{b - a}\right), \qquad
    \eta_t = \eta_a + \frac{t - a}{b - a} (\eta_b - \eta_a)$$

    $P$ need not be whole, and then the peak lies between two steps. Where $P \le 0$ the schedule begins at its peak;
    torch's begins a fraction of a step later. Momentum is left alone, as with torch's `cycle_momentum=False`.

    Args:
        peak: see `Schedule`; $\eta$, torch's `max_lr`.
        steps: see `Schedule`; $T$, torch's `total_steps`. The end value is that of step `steps - 1` already.
        pct_start: the fraction of the steps that goes up, in [0, 1]; $p$.
        anneal: the form of each phase, `"cos"` or `"linear"`; torch's `anneal_strategy`.
        div_factor: peak over start, finite and > 0; $d$.
        final_div_factor: start over end, finite and > 0; $f$.
        three_phase: come down as long as up, and use the rest for the way to the end; needs pct_start <= 0.5.

    Raises:
        TypeError, ValueError: see `Schedule`.

    Example:
        >>> from lookstep.schedules import OneCycle
        >>> cycle = OneCycle(1.0, steps=6, pct_start=0.5, anneal="linear", div_factor=10, final_div_factor=10)
        >>> [round(cycle(step), 3) for step in range(7)]
        [0.1, 0.55, 1.0, 0.67, 0.34, 0.01, 0.01]

    References:
        Smith & Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates", 2018,
        https://arxiv.org/abs/1708.07120
    """

    peak: float
    _: KW_ONLY
    steps: int
    pct_start: float = 0.3
    anneal: Literal["cos", "linear"] = "cos"
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    three_phase: bool = False

    def __post_init__(self) -> None:
        """Checks that the phases fit into the steps, and the other values into a float."""
        super().__post_init__()
        if self.three_phase and self.pct_start > 0.5:
            raise ValueError(f"three_phase needs pct_start <= 0.5, got {self.pct_start}")
        start = self.peak / self.div_factor
        for name, value in ("div_factor", start), ("final_div_factor", start / self.final_div_factor):
            if not math.isfinite(value):
                raise ValueError(f"{name} is too small for this peak, got {getattr(self, name)!r}")

    def _at(self, step: int) -> float:
        start = self.peak / self.div_factor
        end = start / self.final_div_factor
        turn = max(self.pct_start * self.steps - 1, 0.0)
        down = [(2 * turn, start)] if self.three_phase else []
        phases = [(turn, self.peak), *down, (self.steps - 1, end)]
        if step >= self.steps:
            return end
        since, value = 0.0, start
        for until, goal in phases:
            # A phase without length only sets the value that the next one begins with.
            if since < until and step <= until:
                way = _way(step - since, until - since)
                return _between(value, goal, *(_half_cosine(*way) if self.anneal == "cos" else way))
            since, value = until, goal
        return value


@dataclass(frozen=True)
class Joined(Schedule):
    r"""One schedule after another, each counting steps from its own start: as optax.join_schedules.

    $$\eta_t = \eta^{(i)}_{t - B_i} \quad (B_i \le t < B_{i + 1})$$

    with $B_0 = 0$ and the boundaries $B_1, B_2, \ldots$

    Args:
        schedules: the schedules, at least 1.
        boundaries: the step at which each schedule but the first begins: integers >= 1, strictly increasing.

    Raises:
        TypeError, ValueError: see `Schedule`.

    Example:
        >>> from lookstep.schedules import Constant, Joined, Linear
        >>> schedule = Joined([Linear(0.0, 1.0, steps=2), Constant(1.0), Linear(1.0, 0.0, steps=2)], [2, 4])
        >>> [schedule(step) for step in range(8)]
        [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0]
    """

    schedules: Sequence[Schedule]
    boundaries: Sequence[int]

    def __post_init__(self) -> None:
        """Checks that there is one boundary between any two schedules."""
        super().__post_init__()
        needed, got = len(self.schedules) - 1, len(self.boundaries)
        if got != needed:
            raise ValueError(f"boundaries must have {needed} values, one fewer than schedules, got {got}")

    def _at(self, step: int) -> float:
        i = bisect_right(self.boundaries, step)
        return self.schedules[i](step - self.boundaries[i - 1] if i else step)
