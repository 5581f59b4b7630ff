"""A schedule is its closed form at any step, exact at its ends, and torch's and optax's where they have it."""

import math
import pickle
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import FrozenInstanceError, fields, replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lookstep.schedules import (
    Constant,
    Cosine,
    Exponential,
    Joined,
    Linear,
    OneCycle,
    Schedule,
    Step,
    WarmupCosine,
)

NAN, INF = float("nan"), float("inf")
EPS = float(np.finfo(float).eps)
HUGE = [2**53 + 1, 2**60, 2**63, 2**1100]

SCHEDULES = {
    "constant": Constant(0.1),
    "linear": Linear(0.1, 0.003, steps=37),
    "cosine": Cosine(0.1, 0.003, steps=37),
    "warmup-cosine": WarmupCosine(0.1, warmup_steps=7, steps=37, start=0.01, end=0.003),
    "step": Step(0.1, factor=0.3, every=5),
    "exponential": Exponential(0.1, factor=0.9),
    "one-cycle": OneCycle(0.1, steps=37),
    "one-cycle-linear": OneCycle(0.1, steps=37, pct_start=0.4, anneal="linear", three_phase=True),
    "joined": Joined([Linear(0.0, 0.1, steps=7), Joined([Constant(0.1), Cosine(0.1, steps=20)], [10])], [7]),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())

numbers = st.floats(allow_nan=False, allow_infinity=False)
lengths = st.integers(1, 50) | st.integers(1, 2**62)


@contextmanager
def refuses(error, *texts):
    """The block raises exactly this type, in words that hold all of `texts`."""
    with pytest.raises(error) as caught:
        yield
    assert caught.type is error
    for text in texts:
        assert text in str(caught.value)


def bits(value):
    """A float by its bits, so that -0.0 is not 0.0."""
    assert type(value) is float
    return value.hex()


def steps_of(data, steps):
    """A few steps in order, neighbours and both ends among them."""
    some = data.draw(st.lists(st.integers(0, steps), max_size=10))
    return sorted({0, steps, steps // 2, *some, *(min(step + 1, steps) for step in some)})


# Closed forms


@settings(deadline=None)
@given(numbers, numbers, st.integers(1, 2**62), st.data())
def test_linear_is_a_line(start, end, steps, data):
    step = data.draw(st.integers(0, steps))
    exact = Fraction(start) + (Fraction(end) - Fraction(start)) * Fraction(step, steps)
    error = abs(Fraction(Linear(start, end, steps=steps)(step)) - exact)
    assert error <= 2 * Fraction(EPS) * Fraction(max(abs(start), abs(end))) + Fraction(5e-324)


@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.0, 1.0), (0.1, 0.003), (-1.0, 2.0), (3.0, 3.0)])
@pytest.mark.parametrize("steps", [1, 2, 3, 100, 1001])
def test_cosine_is_a_half_cosine(start, end, steps):
    schedule = Cosine(start, end, steps=steps)
    for step in range(steps + 1):
        form = end + (start - end) / 2 * (1 + math.cos(math.pi * step / steps))
        assert schedule(step) == pytest.approx(form, rel=0, abs=4 * EPS * max(abs(start), abs(end)))


def test_cosine_keeps_its_digits_near_zero():
    """There (pi / 2n)^2 (1 - (pi / 2n)^2 / 3) is all digits, where 1 + cos has lost half of them."""
    for n in (10**3, 10**6, 10**8):
        x = (math.pi / 2 / n) ** 2
        assert Cosine(1.0, steps=n)(n - 1) == pytest.approx(x * (1 - x / 3), rel=1e-11, abs=0)
        assert Cosine(0.0, 1.0, steps=n)(1) == pytest.approx(x * (1 - x / 3), rel=1e-11, abs=0)


def test_warmup_cosine_is_a_line_and_a_cosine():
    schedule = WarmupCosine(0.1, warmup_steps=7, steps=37, start=0.01, end=0.003)
    parts = Joined([Linear(0.01, 0.1, steps=7), Cosine(0.1, 0.003, steps=30)], [7])
    assert [schedule(step) for step in range(50)] == [parts(step) for step in range(50)]
    assert schedule(7) == 0.1


def test_without_warmup_the_cosine_is_left():
    schedule = WarmupCosine(0.1, warmup_steps=0, steps=30)
    assert [schedule(step) for step in range(40)] == [Cosine(0.1, steps=30)(step) for step in range(40)]


def test_step_and_exponential_are_powers():
    for step in range(100):
        assert Exponential(0.3, factor=0.7)(step) == 0.3 * 0.7**step
        assert Step(0.3, factor=0.7, every=4)(step) == 0.3 * 0.7 ** (step // 4)
    assert [Exponential(2.0, factor=0.0)(step) for step in range(3)] == [2.0, 0.0, 0.0]


def test_powers_do_not_gather_rounding():
    exact = Fraction(0.3) * Fraction(0.9999) ** 20_000
    assert abs(Fraction(Exponential(0.3, factor=0.9999)(20_000)) / exact - 1) <= 2 * EPS


def test_one_cycle_turns_at_its_peak():
    cycle = OneCycle(0.1, steps=100, pct_start=0.3)
    assert cycle(0) == 0.1 / 25
    assert cycle(29) == 0.1
    assert cycle(99) == 0.1 / 25 / 1e4
    three = replace(cycle, three_phase=True)
    assert [three(step) for step in (0, 29, 58, 99)] == [0.1 / 25, 0.1, 0.1 / 25, 0.1 / 25 / 1e4]


@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize(("steps", "pct_start"), [(10, 0.0), (10, 0.1), (3, 0.3), (2, 0.3)])
def test_one_cycle_without_room_to_rise_begins_at_its_peak(steps, pct_start, three_phase):
    cycle = OneCycle(1.0, steps=steps, pct_start=pct_start, three_phase=three_phase, final_div_factor=1.0)
    assert cycle(0) == (1 / 25 if three_phase else 1)
    assert cycle(steps - 1) == 1 / 25


def test_one_cycle_of_one_step_is_at_its_end():
    assert OneCycle(1.0, steps=1)(0) == 1 / 25 / 1e4


def test_one_cycle_that_only_rises_drops_afterwards():
    cycle = OneCycle(1.0, steps=10, pct_start=1.0)
    assert [cycle(9), cycle(10)] == [1.0, 1 / 25 / 1e4]


# Ends, bounds, direction


@example(-0.0, 1.0, 3)
@settings(deadline=None)
@given(numbers, numbers, lengths)
def test_both_ends_are_exact(start, end, steps):
    for schedule in (Linear(start, end, steps=steps), Cosine(start, end, steps=steps)):
        assert bits(schedule(0)) == bits(start)
        for step in (steps, steps + 1, *(steps + more for more in HUGE)):
            assert bits(schedule(step)) == bits(end)


@settings(deadline=None)
@given(numbers, numbers, numbers, lengths, st.integers(1, 100))
def test_warmup_cosine_is_exact_at_both_ends_and_its_peak(start, peak, end, warmup_steps, rest):
    schedule = WarmupCosine(peak, warmup_steps=warmup_steps, steps=warmup_steps + rest, start=start, end=end)
    assert bits(schedule(0)) == bits(start)
    assert bits(schedule(warmup_steps)) == bits(peak)
    assert bits(schedule(warmup_steps + rest)) == bits(end)


@example(1.0, 2**62 - 1, 0.5, True, "cos")
@settings(deadline=None)
@given(
    st.floats(1e-6, 1e6), st.integers(1, 2**62), st.floats(0, 0.5), st.booleans(), st.sampled_from(["cos", "linear"])
)
def test_one_cycle_is_exact_at_both_ends(peak, steps, pct_start, three_phase, anneal):
    cycle = OneCycle(peak, steps=steps, pct_start=pct_start, three_phase=three_phase, anneal=anneal)
    if pct_start * steps > 1:
        assert bits(cycle(0)) == bits(peak / 25)
    for step in (steps, steps + 1, *(steps + more for more in HUGE)):
        assert bits(cycle(step)) == bits(peak / 25 / 1e4)
    if steps <= 2**50:  # Beyond, the turns are not rounded to less than a step.
        assert bits(cycle(steps - 1)) == bits(peak / 25 / 1e4)


@pytest.mark.parametrize("shape", [Linear, Cosine])
@settings(deadline=None)
@given(start=numbers, end=numbers, steps=lengths, data=st.data())
def test_a_way_stays_between_its_ends(shape, start, end, steps, data):
    schedule = shape(start, end, steps=steps)
    for step in steps_of(data, steps):
        assert min(start, end) <= schedule(step) <= max(start, end)


@pytest.mark.parametrize("shape", [Linear, Cosine])
@settings(deadline=None)
@given(start=numbers, end=numbers, steps=st.integers(1, 50) | st.integers(1, 2**40), data=st.data())
def test_a_way_never_turns_back(shape, start, end, steps, data):
    schedule = shape(start, end, steps=steps)
    values = [schedule(step) for step in steps_of(data, steps)]
    assert values == sorted(values, reverse=start > end)


@pytest.mark.parametrize("shape", [Linear, Cosine])
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.1, 0.1 + 5 * EPS), (0.3, 0.1), (-0.1, 0.7)])
def test_no_step_of_a_long_way_turns_back(shape, start, end):
    values = [shape(start, end, steps=30_001)(step) for step in range(30_002)]
    assert values == sorted(values, reverse=start > end)


@pytest.mark.parametrize("shape", [Linear, Cosine])
def test_rounding_does_not_carry_a_way_past_its_end(shape):
    """Both sums `start + (end - start)` round to the far side of the end."""
    for start, end in ((0.001, 0.01), (0.1, 0.01)):
        assert start + (end - start) != end
        assert shape(start, end, steps=2**60)(2**60 - 1) == end


@pytest.mark.parametrize("shape", [Linear, Cosine])
def test_the_largest_floats_do_not_overflow(shape):
    largest = float(np.finfo(float).max)
    assert -largest < shape(-largest, largest, steps=3)(1) < 0


@settings(deadline=None)
@given(st.floats(0, 1e300), st.floats(0, 1), st.data())
def test_decay_never_rises(start, factor, data):
    steps = steps_of(data, 2**62)
    for schedule in (Exponential(start, factor=factor), Step(start, factor=factor, every=3)):
        values = [schedule(step) for step in steps]
        assert values == sorted(values, reverse=True)
        assert bits(values[0]) == bits(start)
        assert values[-1] >= 0


@settings(deadline=None)
@given(
    st.floats(0, 1e300),
    st.integers(1, 200) | st.integers(1, 2**40),
    st.floats(0, 0.5),
    st.floats(1, 1e6),
    st.floats(1, 1e6),
    st.sampled_from(["cos", "linear"]),
    st.booleans(),
    st.data(),
)
def test_one_cycle_rises_once_and_falls_once(peak, steps, pct, div, final, anneal, three_phase, data):
    cycle = OneCycle(
        peak,
        steps=steps,
        pct_start=pct,
        anneal=anneal,
        div_factor=div,
        final_div_factor=final,
        three_phase=three_phase,
    )
    values = [cycle(step) for step in steps_of(data, steps)]
    assert all(peak / div / final <= value <= peak for value in values)
    rises = [here < after for here, after in pairwise(values) if here != after]
    assert rises == sorted(rises, reverse=True)


@settings(deadline=None)
@given(st.floats(0, 1e300), st.floats(0, 1e300), lengths, st.data())
def test_what_ends_at_zero_or_above_is_never_negative(start, end, steps, data):
    warm = WarmupCosine(start, warmup_steps=steps // 2, steps=steps, start=end)
    for step in steps_of(data, steps):
        for schedule in (Linear(start, end, steps=steps), Cosine(start, end, steps=steps), warm):
            assert schedule(step) >= 0


@every_schedule
@pytest.mark.parametrize("step", HUGE)
def test_the_end_is_held_for_ever(schedule, step):
    end = {"Constant": 0.1, "Linear": 0.003, "Cosine": 0.003, "WarmupCosine": 0.003, "OneCycle": 0.1 / 25 / 1e4}
    assert bits(schedule(step)) == bits(end.get(type(schedule).__name__, 0.0))


@pytest.mark.parametrize("step", [2**60, 2**60 + 1, 2**61])
def test_a_huge_step_is_counted_exactly(step):
    """Beyond 2^53 a float no longer holds every step."""
    assert Joined([Constant(1.0), Linear(0.0, 4.0, steps=4)], [step])(step + 3) == 3
    assert Joined([Constant(1.0), Constant(2.0)], [step])(step - 1) == 1
    assert Step(1.0, factor=1 + EPS, every=step)(2 * step) == (1 + EPS) ** 2
    assert Step(1.0, factor=0.5, every=step)(2 * step - 1) == 0.5


@pytest.mark.parametrize(("factor", "end"), [(1 - EPS / 2, 0.0), (1.0, 0.1), (1 + EPS, INF)])
def test_powers_have_limits(factor, end):
    for step in (2**64, 2**1100):
        assert Exponential(0.1, factor=factor)(step) == end
        assert Exponential(0.0, factor=factor)(step) == 0
        assert Exponential(-0.1, factor=factor)(step) == -end


# Joined


def test_joined_counts_from_each_start():
    joined = Joined([Exponential(1.0, factor=0.5), Linear(0.0, 10.0, steps=10), Constant(7.0)], [3, 5])
    assert [joined(step) for step in range(8)] == [1.0, 0.5, 0.25, 0.0, 1.0, 7.0, 7.0, 7.0]


def test_joined_may_be_nested():
    inner = Joined([Constant(1.0), Linear(0.0, 10.0, steps=10)], [2])
    outer = Joined([Constant(5.0), inner], [3])
    assert [outer(step) for step in range(8)] == [5.0, 5.0, 5.0, 1.0, 1.0, 0.0, 1.0, 2.0]


def test_joined_of_one_is_that_one():
    assert [Joined([SCHEDULES["cosine"]], [])(step) for step in range(50)] == list(map(SCHEDULES["cosine"], range(50)))


def test_a_schedule_of_ones_own_can_be_joined():
    class Squares(Schedule):
        def __call__(self, step):
            return float(step**2)

    assert [Joined([Constant(5.0), Squares()], [1])(step) for step in range(4)] == [5.0, 0.0, 1.0, 4.0]


# torch and optax


def from_torch(name, start, steps, **arguments):
    """The learning rates of torch's scheduler, the first before any step."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=start)
    scheduler = getattr(torch.optim.lr_scheduler, name)(opt, **arguments)
    rates = [opt.param_groups[0]["lr"]]
    for _ in range(steps - 1):
        opt.step()
        scheduler.step()
        rates.append(opt.param_groups[0]["lr"])
    return rates


def assert_close(schedule, rates, ulps):
    """Within so many ulps of the largest rate, at every step."""
    for step, rate in enumerate(rates):
        assert schedule(step) == pytest.approx(rate, rel=0, abs=ulps * EPS * max(rates)), f"step {step}"


# Torch's first four go from one step to the next, and gather up to about an ulp a step.


@pytest.mark.parametrize("end", [0.0, 0.01, 0.2])
def test_cosine_agrees_with_torch(end):
    rates = from_torch("CosineAnnealingLR", 0.1, 101, T_max=100, eta_min=end)
    assert_close(Cosine(0.1, end, steps=100), rates, 101)


@pytest.mark.parametrize(("first", "last"), [(1 / 3, 1.0), (1.0, 0.0), (0.5, 0.5)])
def test_linear_agrees_with_torch(first, last):
    rates = from_torch("LinearLR", 0.1, 150, start_factor=first, end_factor=last, total_iters=100)
    assert_close(Linear(0.1 * first, 0.1 * last, steps=100), rates, 150)


def test_step_agrees_with_torch():
    assert_close(Step(0.1, factor=0.7, every=7), from_torch("StepLR", 0.1, 100, step_size=7, gamma=0.7), 100)
    assert_close(Step(0.1, every=7), from_torch("StepLR", 0.1, 100, step_size=7), 100)


def test_exponential_agrees_with_torch():
    assert_close(Exponential(0.1, factor=0.97), from_torch("ExponentialLR", 0.1, 100, gamma=0.97), 100)


@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize("pct_start", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("steps", [17, 100, 333])
def test_one_cycle_agrees_with_torch(steps, pct_start, anneal, three_phase):
    same = {"pct_start": pct_start, "div_factor": 20.0, "final_div_factor": 50.0, "three_phase": three_phase}
    rates = from_torch(
        "OneCycleLR", 9.0, steps, max_lr=0.1, total_steps=steps, anneal_strategy=anneal, cycle_momentum=False, **same
    )
    assert_close(OneCycle(0.1, steps=steps, anneal=anneal, **same), rates, 8)


@pytest.mark.parametrize("pct_start", [0.8, 1.0])
def test_one_cycle_that_rises_for_long_agrees_with_torch(pct_start):
    rates = from_torch("OneCycleLR", 9.0, 50, max_lr=0.1, total_steps=50, pct_start=pct_start, cycle_momentum=False)
    assert_close(OneCycle(0.1, steps=50, pct_start=pct_start), rates, 8)


def test_one_cycle_has_the_defaults_of_torch():
    rates = from_torch("OneCycleLR", 9.0, 100, max_lr=0.1, total_steps=100, cycle_momentum=False)
    assert_close(OneCycle(0.1, steps=100), rates, 8)


FLOAT32 = 8 * float(np.finfo("f4").eps) / EPS
"""Ulps that optax's arithmetic in float32 may be off."""


def test_warmup_cosine_agrees_with_optax():
    optax = pytest.importorskip("optax", reason="optax is not installed")
    for start, warmup, end in ((0.0, 10, 0.0), (0.01, 25, 0.003), (0.2, 1, 0.01)):
        peer = optax.warmup_cosine_decay_schedule(start, 0.1, warmup, 60, end)
        schedule = WarmupCosine(0.1, warmup_steps=warmup, steps=60, start=start, end=end)
        assert_close(schedule, [float(peer(step)) for step in range(80)], FLOAT32)


def test_joined_agrees_with_optax():
    optax = pytest.importorskip("optax", reason="optax is not installed")
    peer = optax.join_schedules(
        [
            optax.linear_schedule(0.01, 0.1, 5),
            optax.exponential_decay(0.1, 1, 0.9),
            optax.cosine_decay_schedule(0.05, 20),
            optax.constant_schedule(0.002),
        ],
        [10, 15, 40],
    )
    joined = Joined(
        [Linear(0.01, 0.1, steps=5), Exponential(0.1, factor=0.9), Cosine(0.05, steps=20), Constant(0.002)],
        [10, 15, 40],
    )
    assert_close(joined, [float(peer(step)) for step in range(50)], FLOAT32)


# Pure data


@every_schedule
def test_a_schedule_is_data(schedule):
    names = {shape.__name__: shape for shape in (*(type(s) for s in SCHEDULES.values()), Schedule)}
    for copy in (
        pickle.loads(pickle.dumps(schedule)),
        deepcopy(schedule),
        replace(schedule),
        eval(repr(schedule), names),
    ):
        assert copy == schedule
        assert hash(copy) == hash(schedule)
        assert [copy(step) for step in range(50)] == [schedule(step) for step in range(50)]
    assert len({*SCHEDULES.values()}) == len(SCHEDULES)
    with pytest.raises(FrozenInstanceError):
        setattr(schedule, fields(schedule)[0].name, 1.0)


def test_schedules_of_other_numbers_or_shapes_differ():
    assert Linear(0.1, 0.0, steps=3) != Cosine(0.1, 0.0, steps=3)
    assert Linear(0.1, 0.0, steps=3) != Linear(0.1, 0.0, steps=4)
    assert Joined([Constant(1.0), Constant(2.0)], [3]) == Joined((Constant(1.0), Constant(2.0)), (3,))


def test_numbers_become_plain():
    schedule = Linear(np.float32(1), Fraction(1, 2), steps=np.int64(4))
    assert schedule == Linear(1.0, 0.5, steps=4)
    assert [type(getattr(schedule, field.name)) for field in fields(schedule)] == [float, float, int]
    joined = Joined([Constant(1), Constant(np.array(2))], [np.int8(3)])
    assert type(joined.boundaries[0]) is int
    assert repr(joined) == "Joined(schedules=(Constant(value=1.0), Constant(value=2.0)), boundaries=(3,))"
    assert type(OneCycle(1, steps=3, three_phase=np.False_).three_phase) is bool


@every_schedule
def test_any_integer_is_a_step(schedule):
    for step in (5, 36):
        for same in (np.int8(step), np.uint64(step), np.array(step)):
            assert bits(schedule(same)) == bits(schedule(step))


# Errors


@every_schedule
def test_what_is_no_step(schedule):
    for step in (-1, np.int64(-5), -(2**70)):
        with refuses(ValueError, f"step must be an integer >= 0, got {step!r}"):
            schedule(step)
    for step in (1.0, "1", None, True, np.True_, np.ones(2, int)):
        with refuses(TypeError, f"step must be an integer >= 0, got {type(step).__name__}"):
            schedule(step)


MAKE = {
    "value": lambda value: Constant(value),
    "start": lambda value: Linear(value, 0.0, steps=3),
    "end": lambda value: Cosine(0.1, value, steps=3),
    "peak": lambda value: WarmupCosine(value, warmup_steps=1, steps=3),
    "steps": lambda value: Linear(0.1, 0.0, steps=value),
    "warmup_steps": lambda value: WarmupCosine(0.1, warmup_steps=value, steps=3),
    "every": lambda value: Step(0.1, every=value),
    "factor": lambda value: Exponential(0.1, factor=value),
    "pct_start": lambda value: OneCycle(0.1, steps=9, pct_start=value),
    "div_factor": lambda value: OneCycle(0.1, steps=9, div_factor=value),
    "final_div_factor": lambda value: OneCycle(0.1, steps=9, final_div_factor=value),
    "anneal": lambda value: OneCycle(0.1, steps=9, anneal=value),
    "three_phase": lambda value: OneCycle(0.1, steps=9, three_phase=value),
    "schedules": lambda value: Joined(value, [1]),
    "boundaries": lambda value: Joined([Constant(0.1), Constant(0.2), Constant(0.3)], value),
}


@pytest.mark.parametrize("name", ["value", "start", "end", "peak"])
@pytest.mark.parametrize("value", [NAN, INF, -INF, 10**400, np.float32("nan")])
def test_a_value_that_is_not_finite(name, value):
    with refuses(ValueError, f"{name} must be finite, got "):
        MAKE[name](value)


@pytest.mark.parametrize(
    "name", ["value", "start", "end", "peak", "factor", "pct_start", "div_factor", "final_div_factor"]
)
@pytest.mark.parametrize("value", ["0.1", None, True, np.True_, 1j, np.ones(2), Constant(0.1)])
def test_a_value_that_is_no_number(name, value):
    with refuses(TypeError, f"{name} must be a real number, got {type(value).__name__}"):
        MAKE[name](value)


@pytest.mark.parametrize(("name", "least"), [("steps", 1), ("every", 1), ("warmup_steps", 0)])
def test_a_length_that_is_none(name, least):
    for value in (least - 1, -7):
        with refuses(ValueError, f"{name} must be an integer >= {least}, got {value}"):
            MAKE[name](value)
    for value in (2.0, "2", None, True, np.True_):
        with refuses(TypeError, f"{name} must be an integer >= {least}, got {type(value).__name__}"):
            MAKE[name](value)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("factor", -0.5, "factor must be finite and >= 0, got -0.5"),
        ("factor", INF, "factor must be finite and >= 0, got inf"),
        ("pct_start", 1.5, "pct_start must be in [0, 1], got 1.5"),
        ("pct_start", NAN, "pct_start must be in [0, 1], got nan"),
        ("div_factor", 0, "div_factor must be finite and > 0, got 0"),
        ("div_factor", 1e-320, "div_factor is too small for this peak, got "),
        ("final_div_factor", -1.0, "final_div_factor must be finite and > 0, got -1.0"),
        ("final_div_factor", 1e-320, "final_div_factor is too small for this peak, got "),
        ("anneal", "cosine", 'anneal must be "cos" or "linear", got \'cosine\''),
        ("anneal", None, 'anneal must be "cos" or "linear", got None'),
        ("warmup_steps", 3, "warmup_steps must be < steps, got 3 of 3"),
        ("schedules", [], "schedules must have at least 1"),
        ("schedules", [Constant(0.1)], "boundaries must have 0 values, one fewer than schedules, got 1"),
        ("boundaries", [3], "boundaries must have 2 values, one fewer than schedules, got 1"),
        ("boundaries", [3, 3], "boundaries must be strictly increasing, got (3, 3)"),
        ("boundaries", [5, 4], "boundaries must be strictly increasing, got (5, 4)"),
        ("boundaries", [0, 4], "boundaries[0] must be an integer >= 1, got 0"),
    ],
)
def test_an_argument_out_of_range(name, value, text):
    with refuses(ValueError, text):
        MAKE[name](value)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("three_phase", 1, "three_phase must be True or False, got int 1"),
        ("schedules", Constant(0.1), "schedules must be a list or tuple of schedules, got Constant"),
        ("schedules", "ab", "schedules must be a list or tuple of schedules, got str"),
        ("schedules", [Constant(0.1), 0.1], "schedules[1] must be a schedule such as Constant(1e-3), got float"),
        (
            "schedules",
            [Constant, Constant(0.1)],
            "schedules[0] must be a schedule such as Constant(1e-3), got the class",
        ),
        ("boundaries", 3, "boundaries must be a list or tuple of integers, got int"),
        ("boundaries", {3, 4}, "boundaries must be a list or tuple of integers, got set"),
        ("boundaries", [3, 4.0], "boundaries[1] must be an integer >= 1, got float 4.0"),
    ],
)
def test_an_argument_of_another_type(name, value, text):
    with refuses(TypeError, text):
        MAKE[name](value)


def test_three_phases_need_room_for_the_last():
    with refuses(ValueError, "three_phase needs pct_start <= 0.5, got 0.6"):
        OneCycle(0.1, steps=10, pct_start=0.6, three_phase=True)


def test_an_unknown_keyword_gets_the_known_ones():
    with refuses(TypeError, "Linear got an unexpected keyword 'step' (did you mean 'steps'?)"):
        Linear(0.1, 0.0, step=3)
    with refuses(TypeError, "Exponential got an unexpected keyword 'gamma' (it takes start, factor)"):
        Exponential(0.1, gamma=0.9)


def test_the_base_has_no_values():
    with refuses(NotImplementedError, "Schedule must define __call__(step)"):
        Schedule()(0)
