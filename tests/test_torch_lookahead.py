"""Lookahead around torch's optimizers is the paper's, and an optimizer of torch in all that users do with one."""

import copy
import inspect
import io
import pickle

import numpy as np
import pytest

import lookstep as ls

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch.optim import lr_scheduler  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from lookstep.torch import Lookahead, Optimizer  # noqa: E402

OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "sgd-nesterov": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd-dampening": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, dampening=0.5),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.1),
    "adam-amsgrad": lambda ps: torch.optim.Adam(ps, lr=0.1, amsgrad=True, maximize=True),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.1),
    "adamw-fused": lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True),
    "adamw-foreach": lambda ps: torch.optim.AdamW(ps, lr=0.1, foreach=True),
    "adamax": lambda ps: torch.optim.Adamax(ps, lr=0.1),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=0.1),
    "radam": lambda ps: torch.optim.RAdam(ps, lr=0.1),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.1, momentum=0.9, centered=True),
    "rprop": lambda ps: torch.optim.Rprop(ps, lr=0.1),
    "adadelta": lambda ps: torch.optim.Adadelta(ps, lr=1.0),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.1, initial_accumulator_value=0.1),
    "asgd": lambda ps: torch.optim.ASGD(ps, lr=0.1),
    "adafactor": lambda ps: torch.optim.Adafactor([p for p in ps if p.numel()], lr=0.1),
    "muon": lambda ps: torch.optim.Muon([p for p in ps if p.ndim == 2], lr=0.1),
    "lbfgs": lambda ps: torch.optim.LBFGS(ps, lr=0.1, max_iter=3, history_size=2),
    "sparse-adam": lambda ps: torch.optim.SparseAdam([p for p in ps if p.ndim], lr=0.1),
}


def optimizers(but=()):
    """A parameter of tests."""
    names = [name for name in OPTIMIZERS if name not in but]
    return pytest.mark.parametrize("make", [OPTIMIZERS[name] for name in names], ids=names)


def with_inner_states(names, inner_states=("keep", "reset", "pullback")):
    """Parameters of tests; the state of LBFGS is not pulled back."""
    rows = [(name, kept) for name in names for kept in inner_states if (name, kept) != ("lbfgs", "pullback")]
    return pytest.mark.parametrize(
        ("make", "inner_state"), [(OPTIMIZERS[name], kept) for name, kept in rows], ids=map("-".join, rows)
    )


INSIDE = "params hold the slow weights"


def params_of(dtype=torch.float64, seed=0):
    """Parameters of several shapes, without axes and without elements among them."""
    random = torch.Generator().manual_seed(seed)
    shapes = [(4, 3), (5,), (), (0, 2), (2, 6)]
    return [torch.nn.Parameter(torch.randn(s, generator=random, dtype=torch.float64).to(dtype)) for s in shapes]


def closure_of(params, opt, i=0):
    """A loss that has other gradients at each step."""

    def closure():
        opt.zero_grad()
        loss = sum((torch.sin(p * (j + 1) + i).sum() + (p * p).sum()).real for j, p in enumerate(params))
        loss.backward()
        if isinstance(getattr(opt, "inner", opt), torch.optim.SparseAdam):
            for p in params:
                p.grad = p.grad.to_sparse() if p.ndim else None
        return loss

    return closure


def step(params, opt, i):
    return opt.step(closure_of(params, opt, i))


def bits(tensors):
    return [t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors]


def one_step(p, opt, gradient=1.0):
    """A step by a constant gradient."""
    p.grad = torch.full_like(p, gradient)
    opt.step()


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def ten(**kwargs):
    """The parameter of the analytic trajectory, and its optimizer."""
    p = torch.nn.Parameter(torch.tensor([10.0]))
    return p, Lookahead(torch.optim.SGD([p], lr=1.0), **{"sync_period": 3, **kwargs})


# The algorithm


def test_the_first_cycle_is_a_whole_cycle():
    # 10, then three steps of -1 to 7, and half of the way back: 8.5; and so on.
    p, opt = ten()
    path = []
    for _ in range(9):
        one_step(p, opt)
        path.append(p.item())
    assert path == [9, 8, 8.5, 7.5, 6.5, 7, 6, 5, 5.5]
    assert (opt.steps, opt.syncs) == (9, 3)


@pytest.mark.parametrize(
    ("make", "inner_state", "golden"),
    [
        ("sgd", "keep", {5: (0.48542, -1.8716340259), 6: (0.206514, -1.782263574261)}),
        ("sgd", "reset", {6: (0.436878, -1.852917685641), 10: (0.2356325764, -1.7515069634533207)}),
        ("sgd", "pullback", {6: (0.321696, -1.817590629951), 10: (0.0882226528, -1.6821735821353005)}),
        (
            "adam",
            "keep",
            {5: (0.75398183096361049, -1.7514779029782575), 10: (0.51955606288234346, -1.507051659861132)},
        ),
    ],
)
def test_golden_trajectory(make, inner_state, golden):
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    inner = torch.optim.SGD([p], lr=0.1, momentum=0.9) if make == "sgd" else torch.optim.Adam([p], lr=0.1)
    opt = Lookahead(inner, inner_state=inner_state)
    for t in range(1, 11):
        p.grad = p.detach() * torch.tensor([1, 0.1], dtype=p.dtype)
        opt.step()
        if t in golden:
            np.testing.assert_allclose(p.detach(), golden[t], rtol=1e-14)


@pytest.mark.parametrize(
    ("inner_state", "after_syncs"),
    [("keep", [2.71, 4.68559, 6.12579, 7.1757]), ("pullback", [1.355, 2.5264, 3.53907, 4.41453])],
)
def test_momentum_after_a_sync(inner_state, after_syncs):
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt = Lookahead(torch.optim.SGD([p], lr=1.0, momentum=0.9), 3, inner_state=inner_state)
    momentum = []
    for _ in range(12):
        one_step(p, opt)
        momentum.append(opt.inner.state[p]["momentum_buffer"].item())
    # The numbers are given to 6 digits.
    np.testing.assert_allclose(momentum[2::3], after_syncs, rtol=2e-6)


@pytest.mark.parametrize("sync_period", [1, 3])
@with_inner_states(OPTIMIZERS, ["keep", "pullback"])
def test_slow_step_one_is_the_inner_optimizer_bit_for_bit(make, inner_state, sync_period):
    plain, wrapped = params_of(), params_of()
    alone, opt = make(plain), Lookahead(make(wrapped), sync_period, 1.0, inner_state=inner_state)
    for i in range(8):
        step(plain, alone, i)
        step(wrapped, opt, i)
        assert bits(plain) == bits(wrapped)
    assert bits(wrapped) != bits(params_of())


SCALARS = ("step", "mu_product", "mu", "eta")


@pytest.mark.parametrize(("sync_period", "slow_step"), [(1, 0.5), (3, 0.3), (2, 0.8)])
@with_inner_states(OPTIMIZERS)
def test_lookahead_is_the_paper_s_around_every_optimizer(make, inner_state, sync_period, slow_step):
    """Held to the same loop by hand, where `reset` is a new optimizer each cycle."""
    params, by_hand = params_of(), params_of()
    inner, before = make(by_hand), {}
    opt = Lookahead(make(params), sync_period, slow_step, inner_state=inner_state)
    for i in range(7):
        if i % sync_period == 0:
            slow = [p.detach().clone() for p in by_hand]
            inner = make(by_hand) if inner_state == "reset" else inner
        step(params, opt, i)
        step(by_hand, inner, i)
        if (i + 1) % sync_period == 0:
            for p, phi in zip(by_hand, slow, strict=True):
                p.data = phi + slow_step * (p.data - phi)
            for p in by_hand if inner_state == "pullback" else []:
                for name, value in inner.state[p].items():
                    if name not in SCALARS and value.shape == p.shape:
                        value.lerp_(before.get((p, name), torch.zeros_like(value)), 1 - slow_step)
                        before[p, name] = value.clone()
        for p, exact in zip(params, by_hand, strict=True):
            torch.testing.assert_close(p, exact, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("slow_step", [0.0, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_numbers_are_those_of_the_numpy_engine(dtype, slow_step):
    """A power of two for a rate makes a step of gradient descent the same in any arithmetic: the rest is the sync.

    torch's may round once where the engine rounds its product and its sum; at both ends, neither does.
    """
    start = torch.randn(257, generator=torch.Generator().manual_seed(0)).to(dtype)
    p, array = torch.nn.Parameter(start.clone()), start.numpy().copy()
    opt = Lookahead(torch.optim.SGD([p], lr=0.5), 3, slow_step)
    engine = ls.Optimizer(array, ls.Lookahead(ls.SGD(lr=0.5), 3, slow_step))

    def are_the_same(step):
        farthest = np.abs(start.numpy()) + 0.5 * step
        tolerance = 0 if slow_step in (0, 1) else 2 * np.finfo(array.dtype).eps * opt.syncs * farthest
        return (np.abs(p.detach().numpy() - array) <= tolerance).all()

    for step in range(1, 11):
        p.grad = torch.cos(torch.arange(257) + step).to(dtype)
        opt.step()
        engine.step(p.grad.numpy())
        assert are_the_same(step)
        with opt.slow_weights(), engine.slow_weights():
            assert are_the_same(step)


@pytest.mark.parametrize("slow_step", [0.0, 0.1, 0.5, 0.7, 1.0])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64], ids=str
)
def test_after_a_sync_slow_is_fast_bit_for_bit(dtype, slow_step):
    params = params_of(dtype)
    opt = Lookahead(torch.optim.Adam(params, lr=0.1, eps=1e-3), 3, slow_step)
    for i in range(1, 10):
        step(params, opt, i)
        slow = [opt.state[p]["slow"] for p in params]
        assert (bits(s.to(dtype) for s in slow) == bits(params)) == (i % 3 == 0)
        assert {s.dtype for s in slow} == {torch.float32 if dtype.itemsize == 2 else dtype}


def test_slow_weights_of_16_bits_keep_their_digits_from_cycle_to_cycle():
    """Steps of 2^-8 of which a sync keeps a half: in bfloat16 alone, 1 would stay 1 for ever."""
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    opt = Lookahead(torch.optim.SGD([p], lr=1.0), 1, 0.25)
    for _ in range(32):
        one_step(p, opt, -(2**-7))
    assert p.item() > 1
    with torch.no_grad():
        p.fill_(1)  # Other weights have other digits.
    one_step(p, opt, 0.0)
    assert opt.state[p]["slow"] == 1


def test_slow_step_zero_returns_to_slow_weights_also_from_nowhere():
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    opt = Lookahead(torch.optim.SGD([p], lr=1.0), 2, 0.0)
    for _ in range(2):
        p.grad = torch.tensor([torch.inf, torch.nan])
        opt.step()
    assert p.tolist() == [1, 2]


def test_what_is_not_finite_between_syncs_does_not_reach_slow_weights():
    p, opt = ten()
    one_step(p, opt, torch.inf)
    assert opt.state[p]["slow"] == 10


def test_weights_loaded_after_the_optimizer_was_built_are_the_slow_weights():
    p, opt = ten()
    for start, end in ((10, 8.5), (20, 18.5)):
        with torch.no_grad():
            p.fill_(start)
        for _ in range(3):
            one_step(p, opt)
        assert p == end


def test_weights_that_were_moved_to_another_dtype_between_cycles_go_on():
    p, opt = ten()
    for _ in range(3):
        one_step(p, opt)
    p.data = p.data.double()
    for _ in range(3):
        one_step(p, opt)
    assert p == 7
    assert opt.state[p]["slow"].dtype == torch.float64


def test_a_parameter_without_a_gradient_takes_part_in_the_sync():
    a, b = (torch.nn.Parameter(torch.tensor([10.0])) for _ in range(2))
    opt = Lookahead(torch.optim.SGD([a, b], lr=1.0), 3)
    for i in range(6):
        a.grad = torch.ones(1)
        b.grad = None if i in (2, 3) else torch.ones(1)
        opt.step()
        if i == 2:
            assert (a, b) == (8.5, 9.0)
    # And in the start of a cycle: the second one brings b from 9 to 7, and back to 8.
    assert (a, b) == (7.0, 8.0)


@optimizers(but=["lbfgs"])
def test_a_parameter_may_get_its_first_gradient_within_a_cycle(make):
    """Optimizers make state for it then, where they find none: slow weights must not stand in their place."""
    params = params_of()
    opt = Lookahead(make(params), 3)
    late = opt.param_groups[0]["params"][-1]
    for i in range(5):
        closure_of(params, opt, i)()
        if i < 2:
            late.grad = None
        opt.step()
    assert opt.syncs == 1


def test_frozen_parameters_stay_and_take_no_memory():
    frozen, p = torch.nn.Parameter(torch.tensor([1.0, torch.inf]), requires_grad=False), params_of()[0]
    opt = Lookahead(torch.optim.Adam([frozen, p]), 2)
    for i in range(4):
        step([p], opt, i)
    assert frozen.tolist() == [1, torch.inf]
    assert frozen not in opt.state
    assert p in opt.state


@pytest.mark.parametrize("how", ["unfrozen", "added"])
def test_a_parameter_that_joins_within_a_cycle_starts_there_and_syncs_with_the_others(how):
    p, opt = ten()
    late = torch.nn.Parameter(torch.tensor([10.0]), requires_grad=how == "added")
    if how == "unfrozen":
        opt.add_param_group({"params": [late]})
    one_step(p, opt)
    if how == "added":
        opt.add_param_group({"params": [late], "slow_step": 0.25})
    late.requires_grad_()
    for _ in range(5):
        p.grad = late.grad = torch.ones(1)
        opt.step()
    # Two of three steps in the first cycle, all in the second.
    assert late == {"unfrozen": 7.5, "added": 8.75}[how]
    assert p == 7.0


def test_groups_have_slow_steps_of_their_own_which_can_be_changed():
    a, b = (torch.nn.Parameter(torch.tensor([10.0])) for _ in range(2))
    opt = Lookahead(torch.optim.SGD([{"params": [a]}, {"params": [b], "slow_step": 1.0}], lr=1.0), 3)
    for _ in range(3):
        a.grad = b.grad = torch.ones(1)
        opt.step()
    assert (a, b) == (8.5, 7)
    opt.param_groups[0]["slow_step"], opt.param_groups[1]["slow_step"] = 0.0, 0.5
    opt.sync_period = 2
    for _ in range(2):
        a.grad = b.grad = torch.ones(1)
        opt.step()
    assert (a, b) == (8.5, 6)


def test_two_players_that_sync_together_converge():
    """Min over x, max over y of xy by simultaneous gradient steps, which diverge alone."""
    x, y = (torch.nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    players = [Lookahead(torch.optim.SGD([z], lr=0.1), 10**9) for z in (x, y)]
    for _ in range(100):
        for _ in range(5):
            x.grad, y.grad = y.detach().clone(), -x.detach()
            for player in players:
                player.step()
        for player in players:
            player.sync()
            player.sync()  # Without a step in between, nothing happens.
    assert np.hypot(x.item(), y.item()) == pytest.approx(0.2147266799, rel=1e-9)
    assert [player.syncs for player in players] == [100, 100]


# What users of torch do with an optimizer


def test_a_closure_that_is_called_several_times_is_one_step():
    params = params_of()
    opt = Lookahead(torch.optim.LBFGS(params, lr=0.1, max_iter=4), 3)
    calls = []

    def counted():
        calls.append(1)
        return closure_of(params, opt)()

    first = opt.step(counted)
    assert first > opt.step(counted)
    assert len(calls) > 4
    assert (opt.steps, opt.syncs) == (2, 0)


def test_a_step_of_the_inner_optimizer_by_hand_moves_fast_weights_and_is_not_counted():
    p, opt = ten()
    late = torch.nn.Parameter(torch.zeros(1))
    opt.add_param_group({"params": [late]})
    one_step(p, opt)
    late.grad = torch.ones(1)
    opt.inner.step()
    assert (p, opt.steps) == (8, 1)
    one_step(p, opt)
    one_step(p, opt)
    assert (p, opt.syncs) == (8, 1)


def test_a_step_that_fails_is_none():
    p, opt = ten()

    def closure():
        raise KeyError("loss")

    with pytest.raises(KeyError, match="loss"):
        opt.step(closure)
    with torch.no_grad():
        p.fill_(20)
    for _ in range(3):
        one_step(p, opt)
    assert (p, opt.steps) == (18.5, 3)


SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 1 / (t + 1)),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda t: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 4]),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, total_iters=3),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.9),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 6),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 6),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, step_size_up=3),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=10),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=1),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt), lr_scheduler.CosineAnnealingLR(opt, 3)], [3]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(opt), lr_scheduler.ExponentialLR(opt, 0.9)], opt
    ),
    "SWALR": lambda opt: torch.optim.swa_utils.SWALR(opt, 0.01, anneal_epochs=3),
}


def test_every_scheduler_of_torch_is_in_the_table():
    classes = {name for name in lr_scheduler.__all__ if inspect.isclass(getattr(lr_scheduler, name))}
    assert classes <= SCHEDULERS.keys() | {"LRScheduler"}


@pytest.mark.parametrize("attached_to", ["wrapper", "inner"])
@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_schedulers_rule_the_inner_optimizer(schedule, attached_to):
    plain, wrapped = params_of(), params_of()
    alone = torch.optim.SGD(plain, lr=0.1, momentum=0.9)
    opt = Lookahead(torch.optim.SGD(wrapped, lr=0.1, momentum=0.9), 2, 1.0)
    schedulers = schedule(alone), schedule(opt if attached_to == "wrapper" else opt.inner)
    rates = set()
    for i in range(8):
        for params, one, scheduler in zip((plain, wrapped), (alone, opt), schedulers, strict=True):
            step(params, one, i)
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        rates.add(opt.param_groups[0]["lr"])
        assert opt.param_groups[0]["lr"] == alone.param_groups[0]["lr"]
        assert opt.param_groups[0]["momentum"] == alone.param_groups[0]["momentum"]
    assert bits(plain) == bits(wrapped)
    assert len(rates) > 1


def test_hooks_are_called_once_each():
    params = params_of()
    opt = Lookahead(torch.optim.SGD(params, lr=0.1))
    called = []
    for register in [name for name in dir(opt) if name.startswith("register_")]:
        getattr(opt, register)(lambda *_, name=register: called.append(name))
    opt.inner.register_step_post_hook(lambda *_: called.append("inner"))
    opt.step()
    opt.load_state_dict(opt.state_dict())
    assert called == [
        "register_step_pre_hook",
        "inner",
        "register_step_post_hook",
        "register_state_dict_pre_hook",
        "register_state_dict_post_hook",
        "register_load_state_dict_pre_hook",
        "register_load_state_dict_post_hook",
    ]


def test_hooks_of_states_may_put_others_in_their_place():
    p, opt = ten()
    one_step(p, opt)
    opt.register_state_dict_post_hook(lambda _, state: {**state, "note": 1})
    assert opt.state_dict()["note"] == 1
    opt.register_load_state_dict_pre_hook(lambda _, state: state["nested"])
    opt.load_state_dict({"nested": opt.state_dict()})
    assert opt.steps == 1


def test_the_profiler_sees_the_step():
    p, opt = ten()
    with torch.autograd.profiler.profile() as profile:
        one_step(p, opt)
        opt.zero_grad()
    names = {event.name for event in profile.function_events}
    assert {"Optimizer.step#Lookahead.step", "Optimizer.step#SGD.step"} <= names


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deepcopy", "pickle"]
)
@with_inner_states(["sgd-nesterov", "adam", "adagrad", "asgd"])
def test_copies_go_on_bit_for_bit_and_apart(make, inner_state, how):
    params = params_of()
    late = params[-1]
    opt = Lookahead(make(params), 3, 0.3, inner_state=inner_state)
    for i in range(7):
        if i == 5:
            others, other = how((params, opt))
        closure_of(params, opt, i)()
        late.grad = late.grad if i > 5 else None  # It has slow weights, and no other state yet.
        opt.step()
    for i in (5, 6):
        closure_of(others, other, i)()
        others[-1].grad = others[-1].grad if i > 5 else None
        other.step()
    assert bits(others) == bits(params)
    assert (other.steps, other.syncs) == (opt.steps, opt.syncs) == (7, 2)
    step(others, other, 9)
    assert opt.steps == 7


@pytest.mark.parametrize("at", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@with_inner_states(["sgd", "sgd-nesterov", "adam", "adagrad", "adamw-fused", "lbfgs"])
def test_a_resumed_run_is_the_same_bit_for_bit(make, dtype, inner_state, at):
    params = params_of(dtype)
    opt = Lookahead(make(params), 3, 0.3, inner_state=inner_state)
    for i in range(9):
        if i == at:
            weights, state = through_a_file(([p.data for p in params], opt.state_dict()))
        step(params, opt, i)
    others = params_of(dtype, seed=1)
    other = Lookahead(make(others), 4, 0.9)
    for p, w in zip(others, weights, strict=True):
        p.data.copy_(w)
    other.load_state_dict(state)
    for i in range(at, 9):
        step(others, other, i)
    assert bits(others) == bits(params)
    assert repr(other) == repr(opt)


def test_a_state_has_torch_s_form_and_its_keys_are_the_same_at_any_step():
    params = params_of()
    opt = Lookahead(torch.optim.Adam(params), 2, inner_state="pullback")
    for i in range(5):
        step(params, opt, i)
        state = opt.state_dict()
        assert state.keys() == {"state", "param_groups"}
        assert list(state["state"]) == list(range(5))
        for entry, p in zip(state["state"].values(), params, strict=True):
            assert entry.keys() == {"step", "exp_avg", "exp_avg_sq", "slow", "slow_exp_avg", "slow_exp_avg_sq"}
            assert entry["slow"].shape == p.shape
        progress = {"sync_period": 2, "inner_state": "pullback", "steps": i + 1, "syncs": (i + 1) // 2}
        assert state["param_groups"][0]["lookahead"] == progress | {"cycle_steps": (i + 1) % 2}


def test_a_state_keeps_its_counters_while_the_run_goes_on():
    p, opt = ten()
    one_step(p, opt)
    state = opt.state_dict()
    one_step(p, opt)
    assert state["param_groups"][0]["lookahead"]["steps"] == 1


def test_a_loaded_state_shares_no_slow_weights_with_the_run_that_it_was_of():
    p, opt = ten()
    one_step(p, opt)
    other, again = ten()
    again.load_state_dict(opt.state_dict())
    opt.state[p]["slow"].zero_()
    assert again.state[other]["slow"] == 10


# Torch itself loads the product that NAdam keeps in another dtype than it was saved in.
@optimizers(but=["lbfgs", "muon", "nadam"])
def test_a_plain_run_goes_on_inside_lookahead_and_back(make):
    """The state of the inner optimizer alone starts a cycle; what Lookahead adds is nothing to the inner optimizer."""
    plain, wrapped = params_of(), params_of()
    alone, opt = make(plain), Lookahead(make(wrapped), 3, 1.0)
    step(wrapped, opt, 9)
    for i in range(4):
        step(plain, alone, i)
    for p, w in zip(wrapped, plain, strict=True):
        p.data.copy_(w.data)
    opt.load_state_dict(through_a_file(alone.state_dict()))
    assert (opt.steps, opt.syncs, opt.sync_period) == (0, 0, 3)
    assert opt.param_groups[0]["slow_step"] == 1
    for i in range(4, 6):
        step(plain, alone, i)
        step(wrapped, opt, i)
    assert bits(plain) == bits(wrapped)
    back = make(wrapped)
    back.load_state_dict(through_a_file(opt.state_dict()))
    step(plain, alone, 6)
    step(wrapped, back, 6)
    assert bits(plain) == bits(wrapped)


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (lambda s: s["param_groups"].pop(), ValueError, "number of parameter groups"),
        (lambda s: s["param_groups"][0]["params"].pop(), ValueError, "size of optimizer's group"),
        (
            lambda s: s["state"][0].update(slow=torch.zeros(3)),
            ValueError,
            r"slow of parameter 0 .* \(4, 3\), got \(3,\)",
        ),
        (lambda s: s["state"][0].update(slow=3), ValueError, "must be a tensor .*, got int"),
        (lambda s: [e.pop("slow") for e in s["state"].values()], ValueError, "has no slow weights"),
        (lambda s: s["param_groups"][0]["lookahead"].pop("steps"), ValueError, "lacks 'steps'"),
        (lambda s: s["param_groups"][0]["lookahead"].update(steps=-1), ValueError, "steps must be an integer >= 0"),
        (lambda s: s["param_groups"][0]["lookahead"].update(sync_period=0), ValueError, "sync_period must be"),
        (lambda s: s["param_groups"][0]["lookahead"].update(inner_state="rest"), ValueError, "inner_state must be"),
        (lambda s: s["param_groups"][0].update(slow_step=2.0), ValueError, r"slow_step must be in \[0, 1\]"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_loaded(spoil, error, match):
    params = params_of()
    opt = Lookahead(torch.optim.Adam(params), 3)
    step(params, opt, 0)
    step(params, opt, 1)
    state = copy.deepcopy(opt.state_dict())
    before = repr(opt), bits(s["slow"] for s in opt.state.values()), bits(s["exp_avg"] for s in opt.state.values())
    state["param_groups"][0]["lookahead"]["steps"] = 7
    spoil(state)
    with pytest.raises(error, match=match):
        opt.load_state_dict(state)
    after = repr(opt), bits(s["slow"] for s in opt.state.values()), bits(s["exp_avg"] for s in opt.state.values())
    assert before == after


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_does_not_advance_the_cycle(fused):
    """Scales are powers of two: but for the skipped step, the run is that without scaling, bit for bit."""
    plain, scaled = params_of(torch.float32), params_of(torch.float32)
    runs = [Lookahead(torch.optim.AdamW(ps, lr=0.1, fused=fused), 3) for ps in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    taken = 0
    for i in range(9):
        overflow = i in (2, 5)
        if not overflow:
            step(plain, runs[0], taken)
        loss = closure_of(scaled, runs[1], taken)()
        runs[1].zero_grad()
        loss = sum((torch.sin(p * (j + 1) + taken).sum() + (p * p).sum()) for j, p in enumerate(scaled))
        scaler.scale(loss).backward()
        if overflow:
            scaled[0].grad[0, 0] = torch.inf
        if i % 2:
            scaler.unscale_(runs[1])
        scaler.step(runs[1])
        scaler.update()
        taken += not overflow
        assert runs[1].steps == taken
        assert bits(scaled) == bits(plain)
    assert scaler.get_scale() == 256
    assert runs[1].syncs == 2


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_params_hold_slow_weights_inside_and_fast_ones_after(inference):
    p, opt = ten()
    for i in range(5):
        fast = p.item()
        with inference(), opt.slow_weights():
            assert p.item() == {0: 10, 1: 10, 2: 10, 3: 8.5, 4: 8.5}[i]
        assert p.item() == fast
        assert p.is_leaf
        one_step(p, opt)
    assert p == 6.5


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_inside_slow_weights_what_would_lose_weights_is_refused(steps):
    p, opt = ten()
    for _ in range(steps):
        one_step(p, opt)
    fast, state = p.item(), opt.state_dict()
    forbidden = [
        opt.step,
        opt.sync,
        opt.state_dict,
        lambda: opt.load_state_dict(state),
        lambda: copy.deepcopy(opt),
        lambda: pickle.dumps(opt),
        lambda: opt.slow_weights().__enter__(),
    ]

    def evaluate():
        with opt.slow_weights():
            for call in forbidden:
                with pytest.raises(RuntimeError, match=INSIDE):
                    call()
            raise KeyError("body")

    with pytest.raises(KeyError, match="body"):
        evaluate()
    assert p.item() == fast
    assert opt.steps == steps
    one_step(p, opt)
    assert opt.steps == steps + 1


def test_numbers_written_inside_are_written_into_slow_weights():
    p, opt = ten()
    one_step(p, opt)
    with opt.slow_weights(), torch.no_grad():
        p.fill_(20)
    assert p == 9
    for _ in range(2):
        one_step(p, opt)
    assert p == 13.5


def test_the_sync_is_no_part_of_autograd_but_known_to_it():
    p, opt = ten()
    one_step(p, opt)
    loss = (p * p).sum()
    opt.sync()
    assert p.grad_fn is None
    assert not opt.state[p]["slow"].requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_sync_takes_as_many_operations_for_many_parameters_as_for_one():
    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counted.append(func)
            return func(*args, **(kwargs or {}))

    counts = []
    for number in (1, 30):
        params = [torch.nn.Parameter(torch.ones(2)) for _ in range(number)]
        opt = Lookahead(torch.optim.SGD([{"params": [p]} for p in params], lr=0.1), 9)
        for i in range(2):
            step(params, opt, i)
        counted = []
        with Count():
            opt.sync()
        counts.append(len([func for func in counted if "detach" not in str(func)]))
    assert counts[0] == counts[1] > 0


def test_parameters_may_be_on_several_devices():
    a, b = torch.nn.Parameter(torch.tensor([10.0])), torch.nn.Parameter(torch.empty(3, device="meta"))
    opt = Lookahead(torch.optim.SGD([a, b], lr=1.0), 3)
    for _ in range(6):
        a.grad, b.grad = torch.ones(1), torch.empty(3, device="meta")
        opt.step()
    with opt.slow_weights():
        assert a == 7
    assert opt.state[b]["slow"].is_meta


def test_state_that_is_put_in_another_s_place_is_the_optimizer_s():
    """As trainers do to move it to another device."""
    p = params_of()[0]
    opt = Lookahead(torch.optim.Adam([p]), 3)
    step([p], opt, 0)
    for entry in opt.state.values():
        for name, value in entry.items():
            entry[name] = value.clone() + 1
    assert opt.inner.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert opt.inner.state[p]["step"] == 2
    assert "slow" in opt.state[p]
    opt.state = type(opt.inner.state)(dict)
    assert not opt.state


def test_replicas_with_averaged_gradients_stay_replicas():
    replicas = [params_of(seed=3) for _ in range(2)]
    opts = [Lookahead(torch.optim.AdamW(params, lr=0.1), 2) for params in replicas]
    for i in range(5):
        for rank, (params, opt) in enumerate(zip(replicas, opts, strict=True)):
            closure_of(params, opt, 2 * i + rank)()
        for pair in zip(*replicas, strict=True):
            average = sum(p.grad for p in pair) / 2
            for p in pair:
                p.grad = average.clone()
        for opt in opts:
            opt.step()
        assert bits(replicas[0]) == bits(replicas[1])


@pytest.mark.filterwarnings("ignore:Profiler record function:UserWarning")
@pytest.mark.parametrize("what", ["wrapper", "inner"])
def test_a_compiled_step_is_the_same_to_rounding(what):
    params, compiled = params_of(), params_of()
    opt, other = (Lookahead(torch.optim.AdamW(ps, lr=0.1), 2) for ps in (params, compiled))
    owner = other if what == "wrapper" else other.inner
    owner.step = torch.compile(owner.step, backend="eager")
    for i in range(5):
        for ps, one in ((params, opt), (compiled, other)):
            closure_of(ps, one, i)()
            one.step()
    for p, q in zip(params, compiled, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
    assert (other.steps, other.syncs) == (5, 2)


# What is refused


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"sync_period": 0}, ValueError, "sync_period must be an integer >= 1, got 0"),
        ({"sync_period": 2.5}, TypeError, "sync_period must be an integer"),
        ({"sync_period": True}, TypeError, "sync_period must be an integer"),
        ({"slow_step": 1.5}, ValueError, r"slow_step must be in \[0, 1\], got 1.5"),
        ({"slow_step": float("nan")}, ValueError, "slow_step must be in"),
        ({"slow_step": "0.5"}, TypeError, "slow_step must be a real number"),
        ({"slow_step": lambda t: 0.5}, TypeError, "slow_step must be a real number"),
        ({"inner_state": "rest"}, ValueError, 'must be "keep", "reset" or "pullback"'),
        ({"k": 5}, TypeError, "'k' .*did you mean 'sync_period'"),
        ({"la_alpha": 0.5}, TypeError, "'la_alpha' .*did you mean 'slow_step'"),
        ({"pullback_momentum": "reset"}, TypeError, "did you mean 'inner_state'"),
    ],
)
def test_hyper_parameters_that_cannot_be_are_refused(kwargs, error, match):
    inner = torch.optim.SGD(params_of())
    groups = copy.deepcopy(inner.param_groups)
    with pytest.raises(error, match=match):
        Lookahead(inner, **kwargs)
    assert [group.keys() for group in inner.param_groups] == [group.keys() for group in groups]


def test_what_is_no_optimizer_is_refused():
    p, opt = ten()
    compiled = Optimizer([p], ls.SGD())
    with pytest.raises(TypeError, match=r"got lookstep.torch.Optimizer.*lookstep.Lookahead\(rule\)"):
        Lookahead(compiled)
    for what, got in (([p], "list"), (torch.optim.SGD, "the class SGD"), (opt, "Lookahead")):
        with pytest.raises(TypeError, match=f"such as torch.optim.AdamW.*, got {got}"):
            Lookahead(what)
    with pytest.raises(ValueError, match="LBFGS"):
        Lookahead(torch.optim.LBFGS([p]), inner_state="pullback")


def test_a_slow_step_that_cannot_be_is_refused_before_anything_moves():
    p, opt = ten()
    for _ in range(2):
        one_step(p, opt)
    opt.param_groups[0]["slow_step"] = 2.0
    for call in (opt.step, opt.sync):
        with pytest.raises(ValueError, match="slow_step must be in"):
            call()
    assert (p, opt.steps) == (8, 2)
    with pytest.raises(ValueError, match="slow_step must be in"):
        opt.add_param_group({"params": [torch.zeros(1)], "slow_step": -1})
    assert len(opt.param_groups) == 1


def test_another_lookahead_around_the_same_optimizer_takes_its_own_slow_step():
    p, opt = ten(slow_step=0.5)
    again = Lookahead(opt.inner, 3, 1.0)
    for _ in range(3):
        one_step(p, again)
    assert p == 7


def test_a_parameter_in_the_place_of_another_syncs_with_the_others():
    p, opt = ten(slow_step=0.5)
    other = torch.nn.Parameter(torch.tensor(10.0))
    one_step(p, opt)
    opt.param_groups[0]["params"][0] = other
    for _ in range(2):
        one_step(other, opt)
    assert (other, opt.syncs) == (9, 1)
    one_step(other, opt)
    assert list(opt.state) == [other]


def test_fast_weights_come_back_where_the_parameter_became_another():
    p, opt = ten(slow_step=0.5)
    one_step(p, opt)

    def evaluate():
        with opt.slow_weights():
            p.data = torch.zeros(3)
            raise KeyError

    with pytest.raises((KeyError, RuntimeError)):
        evaluate()
    assert p == 9
    one_step(p, opt)
    assert p == 8


@pytest.mark.parametrize("keyword", ["base_optimizer", "fast_optimizer", "inner_optimizer"])
def test_another_library_s_name_for_the_optimizer_gets_ours(keyword):
    _, opt = ten()
    with pytest.raises(TypeError, match="did you mean 'optimizer'"):
        Lookahead(**{keyword: opt.inner})


EDITS = {
    "removed": lambda opt, p: opt.state.pop(p),
    "deleted": lambda opt, p: opt.state.__delitem__(p),
    "cleared": lambda opt, p: opt.state.clear(),
    "put": lambda opt, p: opt.state.__setitem__(p, opt.state[p] | {"momentum_buffer": torch.zeros(1)}),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_state_that_is_taken_out_or_put_in_is_so_for_good(edit):
    p = torch.nn.Parameter(torch.tensor([10.0]))
    opt = Lookahead(torch.optim.SGD([p], lr=1.0, momentum=0.5), 3, 1.0)
    one_step(p, opt)
    edit(opt, p)
    one_step(p, opt)
    assert p == 8  # With the momentum of the first step, 7.5.
    assert opt.state_dict()["state"][0]["momentum_buffer"] == 1


def test_a_parameter_that_grows_takes_its_state_along():
    p, opt = ten(slow_step=0.5)
    opt = Lookahead(torch.optim.SGD([p], lr=1.0, momentum=0.5), 3, 0.5)
    one_step(p, opt)
    entry = opt.state.pop(p)
    entry["momentum_buffer"] = torch.tensor([1.0, 0.0])
    grown = torch.nn.Parameter(torch.tensor([9.0, 10.0]))
    opt.state[grown] = entry
    opt.param_groups[0]["params"][0] = grown
    one_step(grown, opt)
    assert grown.tolist() == [7.5, 9.0]
    one_step(grown, opt)
    assert grown.tolist() == [7.375, 8.75]  # Half of the way from 9 and 10 to 5.75 and 7.5.
