"""`lookstep.torch.Optimizer` is the compiled rule, and an optimizer of torch."""

import copy
import io
import pickle
import warnings
from collections import defaultdict
from dataclasses import fields, replace

import ml_dtypes
import numpy as np
import pytest

import lookstep as ls
from cases import CASES, every_case

torch = pytest.importorskip("torch", reason="torch is not installed")
from lookstep.torch import Optimizer  # noqa: E402

DTYPES = {"float64": "f8", "float32": "f4", "float16": "f2", "bfloat16": ml_dtypes.bfloat16}
OF_TORCH = {name: case for name, case in CASES.items() if case.torch}
LOOKAHEAD = {
    "plain": ls.AdamW(lr=0.1),
    "keep": ls.Lookahead(ls.AdamW(lr=0.1), 3),
    "reset": ls.Lookahead(ls.AdamW(lr=0.1), 3, inner_state="reset"),
    "pullback": ls.Lookahead(ls.RAdam(lr=0.1), 3, inner_state="pullback"),
    "outer": ls.Lookahead(ls.SGD(lr=0.1, momentum=0.9), 3, 0.7, outer=ls.Nesterov(0.5)),
    "nested": ls.Lookahead(ls.Lookahead(ls.NAdam(lr=0.1), 2), 3),
    "optimal": ls.Lookahead(ls.SGD(lr=0.1), 3, slow_step=ls.OptimalSlowStep(low=0.5)),
    "carrying": ls.Lookahead(ls.Prodigy(), 3),
    "schedule-free": ls.ScheduleFreeAdamW(lr=0.1),
}
every_rule = pytest.mark.parametrize("rule", LOOKAHEAD.values(), ids=LOOKAHEAD.keys())


def parameters(dtype=None, seed=0):
    """A matrix, a vector and a scalar."""
    rng = np.random.default_rng(seed)
    return [
        torch.tensor(rng.standard_normal(shape), dtype=dtype or torch.float64).requires_grad_()
        for shape in [(3, 4), (5,), ()]
    ]


def gradients(params, step):
    rng = np.random.default_rng(step)
    return [torch.tensor(rng.standard_normal(p.shape)).to(p.dtype) for p in params]


def run(opt, params, steps):
    for step in steps:
        for p, grad in zip(params, gradients(params, step), strict=True):
            p.grad = grad
        opt.step()


def bits(params):
    return [p.detach().contiguous().view(torch.uint8 if p.ndim else p.dtype).tolist() for p in params]


def of_torch(case):
    """Makes torch's optimizer of the rule."""
    hyper = {field.name: getattr(case.rule, field.name) for field in fields(case.rule)}
    return lambda params: getattr(torch.optim, case.torch)(params, **hyper)


def test_a_cycle_is_the_papers():
    p = torch.tensor([10.0], requires_grad=True)
    opt = Optimizer([p], ls.Lookahead(ls.SGD(lr=1.0), sync_period=3, slow_step=0.5))
    path = []
    for _ in range(9):
        p.grad = torch.ones(1)
        opt.step()
        path.append(p.item())
    assert path == [9, 8, 8.5, 7.5, 6.5, 7, 6, 5, 5.5]
    assert (opt.steps, opt.syncs) == (9, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@every_case
def test_the_bits_are_those_of_the_numpy_optimizer(case, dtype):
    rule = ls.Lookahead(case.rule, 3)
    params = parameters(getattr(torch, dtype))
    names = ["w", "b", "s"]
    arrays = {
        name: p.detach().to(torch.float64).numpy().astype(DTYPES[dtype]) for name, p in zip(names, params, strict=True)
    }
    ours, other = Optimizer(zip(names, params, strict=True), rule), ls.Optimizer(arrays, rule)
    for step in range(7):
        run(ours, params, [step])
        grads = [g.to(torch.float64).numpy().astype(DTYPES[dtype]) for g in gradients(params, step)]
        other.step(dict(zip(names, grads, strict=True)))
    for p, array in zip(params, arrays.values(), strict=True):
        assert p.detach().to(torch.float64).numpy().tobytes() == np.float64(array).tobytes()


@pytest.mark.parametrize("case", OF_TORCH.values(), ids=OF_TORCH.keys())
@pytest.mark.parametrize("direction", ["from-torch", "to-torch"])
def test_state_goes_from_one_to_the_other(case, direction):
    """Both halves of a run agree with torch's whole run, to the rounding of 12 steps of some ten operations."""
    make = of_torch(case)
    whole, params = parameters(), parameters()
    theirs = make(whole)
    run(theirs, whole, range(12))
    makers = [make, lambda params: Optimizer(params, case.rule)]
    first, second = makers if direction == "from-torch" else makers[::-1]
    half = first(params)
    run(half, params, range(6))
    again = second(params)
    again.load_state_dict(copy.deepcopy(half.state_dict()))
    run(again, params, range(6, 12))
    for p, q in zip(params, whole, strict=True):
        # torch keeps what NAdam carries in float32, and ASGD's rate.
        tolerance = 1e-6 if isinstance(case.rule, ls.NAdam | ls.ASGD) else 1e-12
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    ours = half if direction == "to-torch" else again
    keys = [[set(opt.state[p]) - {"step"} for p in tensors] for opt, tensors in ((ours, params), (theirs, whole))]
    assert keys[0] == keys[1]


@every_rule
@pytest.mark.parametrize("stop", range(8))
@pytest.mark.parametrize("way", ["state_dict", "weights_only", "deepcopy", "pickle", "rebuilt"])
def test_a_run_continues_bit_for_bit(rule, stop, way):
    whole, params = parameters(torch.float32), parameters(torch.float32)
    opt = Optimizer(whole, rule)
    run(opt, whole, range(11))
    first = Optimizer(params, rule)
    run(first, params, range(stop))
    match way:
        case "state_dict":
            again = Optimizer(params, rule)
            again.load_state_dict(first.state_dict())
        case "weights_only":
            file = io.BytesIO()
            torch.save(first.state_dict(), file)
            file.seek(0)
            again = Optimizer(params, rule)
            again.load_state_dict(torch.load(file, weights_only=True))
        case "deepcopy":
            params, again = copy.deepcopy((params, first))
        case "pickle":
            params, again = pickle.loads(pickle.dumps((params, first)))
        case "rebuilt":
            again = first
            for p in params:
                p.data = p.data.clone()
    run(again, params, range(stop, 11))
    assert bits(params) == bits(whole)
    assert (again.steps, again.syncs) == (opt.steps, opt.syncs)


def test_nothing_is_copied():
    params = parameters(torch.float32)
    pointers = [p.data_ptr() for p in params]
    opt = Optimizer(params, ls.Adam(lr=0.1))
    run(opt, params, [0])
    average = opt.state[params[0]]["exp_avg"]
    before = average.clone()
    run(opt, params, [1])
    assert not average.equal(before)
    assert average.data_ptr() == opt.state[params[0]]["exp_avg"].data_ptr()
    assert opt.state_dict()["state"][0]["exp_avg"].data_ptr() == average.data_ptr()
    assert pointers == [p.data_ptr() for p in params]


EDITS = {
    "in-place": lambda opt, p: opt.state[p]["exp_avg"].zero_(),
    "counted": lambda opt, p: opt.state[p]["step"].fill_(7),
    "replaced": lambda opt, p: opt.state[p].update(exp_avg=torch.zeros_like(p)),
    "removed": lambda opt, p: opt.state.pop(p),
    "cleared": lambda opt, p: opt.state.clear(),
    "set": lambda opt, p: setattr(opt, "state", defaultdict(dict)),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_state_may_be_written_to(edit):
    ours, theirs = parameters(), parameters()
    opts = Optimizer(ours, ls.Adam(lr=0.1)), torch.optim.Adam(theirs, lr=0.1)
    for opt, params in zip(opts, (ours, theirs), strict=True):
        run(opt, params, range(2))
        edit(opt, params[0])
        run(opt, params, [2])
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_a_parameter_that_grows_takes_its_state_along():
    """As Gaussian splatting does it: another parameter of another size under the same group, with grown state."""
    ours, theirs = parameters(), parameters()
    opts = Optimizer(ours, ls.Adam(lr=0.1)), torch.optim.Adam(theirs, lr=0.1)
    for opt, params in zip(opts, (ours, theirs), strict=True):
        run(opt, params, range(2))
        state = opt.state.pop(params[1])
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.cat([state[key], torch.zeros(2, dtype=torch.float64)])
        params[1] = torch.cat([params[1].detach(), torch.ones(2, dtype=torch.float64)]).requires_grad_()
        opt.state[params[1]] = state
        opt.param_groups[0]["params"][1] = params[1]
        run(opt, params, range(2, 4))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_autograd_is_told_what_was_written():
    params = parameters()
    opt = Optimizer(params, ls.Lookahead(ls.SGD(lr=0.1), 2))
    stale = [p.square().sum() for p in params]
    params[0].grad = torch.ones_like(params[0])
    opt.step()
    stale[1].backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale[0].backward()
    stale = [p.square().sum() for p in params]
    opt.step()  # The second one syncs, and writes all.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale[2].backward()
    stale = [p.square().sum() for p in params]
    with opt.slow_weights():
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale[2].backward()


SCHEDULERS = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[4],
    ),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_schedulers_set_what_they_set_in_torch(make):
    ours, theirs = parameters(), parameters()
    opts = Optimizer(ours, ls.Adam(lr=0.1)), torch.optim.Adam(theirs, lr=0.1)
    for opt, params in zip(opts, (ours, theirs), strict=True):
        scheduler = make(opt)
        for step in range(12):
            run(opt, params, [step])
            scheduler.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert opts[0].param_groups[0]["lr"] == opts[1].param_groups[0]["lr"] != 0.1
    assert opts[0].param_groups[0]["betas"] == opts[1].param_groups[0]["betas"]


def test_a_plateau_lowers_the_rate():
    params = parameters()
    opt = Optimizer(params, ls.SGD(lr=0.5))
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0)
    before = params[0].detach().clone()
    for _ in range(2):
        scheduler.step(1.0)
    params[0].grad = torch.ones_like(params[0])
    opt.step()
    torch.testing.assert_close(before - params[0].detach(), torch.full((3, 4), 0.05, dtype=torch.float64))


def test_groups_have_hyper_parameters_of_their_own():
    a, b, c = (torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    groups = [{"params": [a]}, {"params": [b], "lr": torch.tensor(0.5)}, {"params": [c], "slow_step": 1.0}]
    opt = Optimizer(groups, ls.Lookahead(ls.SGD(lr=1.0), 2, 0.5))
    for _ in range(2):
        for p in (a, b, c):
            p.grad = torch.full_like(p, -1.0)
        opt.step()
        opt.param_groups[1]["lr"] = 0.25
    assert (a[0].item(), b[0].item(), c[0].item()) == (1, 0.375, 2)


@every_rule
def test_a_group_joins_a_run(rule):
    """In the middle of a cycle: it has the cycle of the others, and they go on as if it were not there."""
    alone, params = parameters(), parameters()
    opt, other = Optimizer(params[:2], rule), Optimizer(alone[:2], rule)
    run(opt, params[:2], range(4))
    run(other, alone[:2], range(4))
    before = params[2].item()
    opt.add_param_group({"params": params[2:], "lr": 0.0})
    assert (opt.steps, opt.syncs) == (other.steps, other.syncs)
    if not isinstance(rule, ls.Lookahead) or not isinstance(rule.inner, ls.Prodigy):  # It adds up over all leaves.
        run(opt, params, range(4, 9))
        run(other, alone[:2], range(4, 9))
        assert bits(params[:2]) == bits(alone[:2])
        assert params[2].item() == pytest.approx(before, abs=1e-12)


def test_a_group_that_cannot_join_does_not():
    params = parameters()
    opt = Optimizer(params[:2], ls.SGD())
    with pytest.raises(TypeError, match="int64"):
        opt.add_param_group({"params": [torch.zeros(3, dtype=torch.int64)]})
    assert len(opt.param_groups) == 1
    run(opt, params[:2], [0])
    assert opt.steps == 1


def test_a_closure_is_called_once_with_gradients():
    p = torch.ones(3, requires_grad=True)
    opt = Optimizer([p], ls.SGD(lr=0.5))
    calls = []

    def closure():
        opt.zero_grad()
        loss = p.square().sum()
        loss.backward()
        calls.append(loss)
        return loss

    with torch.no_grad():
        loss = opt.step(closure)
    assert len(calls) == 1
    assert loss.item() == 3
    assert p.tolist() == [0, 0, 0]
    assert opt.step() is None


def test_hooks_are_called():
    params = parameters()
    opt = Optimizer(params, ls.SGD())
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    opt.register_state_dict_pre_hook(lambda _: seen.append("saves"))
    opt.register_state_dict_post_hook(lambda _, state: state | {"note": 1})
    opt.register_load_state_dict_pre_hook(lambda _, state: state["param_groups"][0].update(lr=0.5))
    opt.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    run(opt, params, [0])
    state = opt.state_dict()
    opt.load_state_dict(state)
    assert state["note"] == 1
    assert seen == ["before", "after", "saves", "loaded"]
    assert opt.param_groups[0]["lr"] == 0.5


def test_a_step_that_the_scaler_drops_is_none():
    p = torch.ones(4, requires_grad=True)
    opt = Optimizer([p], ls.Lookahead(ls.SGD(lr=0.5), 2))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (1.0, float("inf"), 1.0):
        opt.zero_grad()
        scaler.scale((p * factor).sum()).backward()
        scaler.step(opt)
        scaler.update()
    assert (opt.steps, opt.syncs) == (2, 1)
    assert p.tolist() == [0.5] * 4
    assert scaler.get_scale() == 4


def test_steps_may_be_dropped_here_too():
    p = torch.ones(4, requires_grad=True)
    opt = Optimizer([p], ls.SGD(lr=0.5), nonfinite="skip", max_grad_norm=1.0)
    for number in (float("nan"), 3.0):
        p.grad = torch.full_like(p, number)
        opt.step()
    assert (opt.steps, opt.skipped, opt.grad_norm) == (1, 1, 6)
    assert p.tolist() == [0.75] * 4


def test_what_has_no_gradient_has_no_state():
    a, b = torch.ones(2, requires_grad=True), torch.ones(2)
    opt = Optimizer([a, b], ls.Adam(lr=0.5))
    a.grad = torch.ones(2)
    opt.step()
    assert list(opt.state) == [a]
    assert b.tolist() == [1, 1]


@pytest.mark.parametrize("copied", [False, True])
def test_what_has_no_gradient_is_synced(copied):
    params = [torch.ones(2, requires_grad=True), torch.ones(2)]
    opt = Optimizer(params, ls.Lookahead(ls.Adam(lr=0.5), 2))
    params[0].grad = torch.ones(2)
    opt.step()
    with torch.no_grad():
        params[1] += 1
    if copied:
        params, opt = copy.deepcopy((params, opt))
        params[0].grad = torch.ones(2)
    opt.step()
    assert params[1].tolist() == [1.5, 1.5]


@pytest.mark.parametrize("layout", ["channels-last", "transposed", "strided", "expanded-gradient"])
def test_layouts_are_stepped_in_place(layout):
    rng = np.random.default_rng(0)
    plain = torch.tensor(rng.standard_normal((2, 3, 4, 5))).requires_grad_()
    grad = torch.tensor(rng.standard_normal((2, 3, 4, 5)))
    p, g = plain.detach().clone(), grad
    match layout:
        case "channels-last":
            p = p.to(memory_format=torch.channels_last)
            g = g.to(memory_format=torch.channels_last)
        case "transposed":
            p = p.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
        case "strided":
            p = torch.stack([p, p], -1)[..., 0]
        case "expanded-gradient":
            g = torch.tensor(0.5, dtype=torch.float64).expand(2, 3, 4, 5)
    one, other = Optimizer([p], ls.Adam(lr=0.1)), Optimizer([plain], ls.Adam(lr=0.1))
    for _ in range(3):
        p.grad, plain.grad = g, g.contiguous().clone()
        one.step()
        other.step()
    assert p.equal(plain)


@pytest.mark.parametrize("move", [lambda p: setattr(p, "data", p.data.clone()), lambda p: p.share_memory_()])
def test_memory_is_followed_where_it_goes(move):
    """Also inside `slow_weights`: the fast weights go there, too. Where it was, there may be something else."""
    params, others = parameters(), parameters()
    rule = ls.Lookahead(ls.Adam(lr=0.1), 5)
    opt, other = Optimizer(params, rule), Optimizer(others, rule)
    for one, tensors in ((opt, params), (other, others)):
        run(one, tensors, range(3))
        with one.slow_weights():
            slow = bits(tensors)
            if one is opt:
                for p in tensors:
                    move(p)
        run(one, tensors, range(3, 7))
    assert slow == bits(parameters())
    assert bits(params) == bits(others)


def test_tensors_that_groups_get_instead_are_stepped():
    """Those that stay keep their state, and a run that was wrapped by its attributes goes on with it."""
    params = parameters()
    opt = Optimizer(params, ls.Lookahead(ls.Adam(lr=0.1), 5))
    run(opt, params, range(3))
    other = torch.ones(7, dtype=torch.float64)
    moment = opt.state[params[0]]["exp_avg"].clone()
    opt.param_groups[0]["params"] = [params[0], other]
    gone = bits(params[1:])
    run(opt, [params[0], other], [3])
    assert bits(params[1:]) == gone
    assert (opt.steps, opt.state[other]["step"], opt.state[params[0]]["step"]) == (4, 1, 4)
    assert not other.equal(torch.ones_like(other))
    gradient = gradients(params, 3)[0]
    torch.testing.assert_close(opt.state[params[0]]["exp_avg"], 0.9 * moment + 0.1 * gradient)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype_is_followed(dtype):
    """State that is loaded after it is that dtype's, too."""
    model = torch.nn.Linear(3, 2)
    opt = Optimizer(model.parameters(), ls.Adam(lr=0.1))
    run(opt, list(model.parameters()), range(2))
    model.to(dtype)
    params = list(model.parameters())
    theirs = [p.detach().clone().requires_grad_() for p in params]
    peer = Optimizer(theirs, ls.Adam(lr=0.1))
    peer.load_state_dict(opt.state_dict())
    opt.load_state_dict(peer.state_dict())
    for one, tensors in ((opt, params), (peer, theirs)):
        run(one, tensors, range(2, 4))
    assert bits(params) == bits(theirs)
    assert opt.state[params[0]]["exp_avg"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_an_exchange_of_axes_is_followed():
    p = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    opt = Optimizer([p], ls.SGD(lr=1.0, momentum=0.5))
    p.grad = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    opt.step()
    p.grad = None
    p.data = p.data.t()
    p.grad = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    opt.step()
    assert p.tolist() == [[1.0, 1.5], [1.0, 4.0]]


def test_slow_weights_are_for_evaluation():
    params = parameters()
    opt = Optimizer(params, ls.Lookahead(ls.SGD(lr=0.1), 5))
    run(opt, params, range(3))
    fast = bits(params)

    def evaluate():
        with opt.slow_weights():
            assert bits(params) == bits(parameters())
            with pytest.raises(RuntimeError, match="slow"):
                opt.step()
            with pytest.raises(RuntimeError, match="slow"):
                opt.add_param_group({"params": [torch.zeros(2)]})
            with pytest.raises(RuntimeError, match="slow"):
                opt.state_dict()
            raise KeyError

    with pytest.raises(KeyError):
        evaluate()
    assert bits(params) == fast
    opt.sync()
    assert opt.syncs == 1


def test_state_of_16_bits_is_loaded_whole():
    """Where torch itself rounds it to the parameter's 16 bits."""
    params = parameters(torch.bfloat16)
    opt = Optimizer(params, ls.Lookahead(ls.Adam(lr=0.1), 5))
    run(opt, params, range(3))
    other = Optimizer([p.detach().clone() for p in params], ls.Lookahead(ls.Adam(lr=0.1), 5))
    other.load_state_dict(opt.state_dict())
    mine, theirs = (next(iter(o.state.values()))["exp_avg_sq"] for o in (opt, other))
    assert theirs.dtype == torch.float32
    assert theirs.equal(mine)
    assert not theirs.equal(theirs.bfloat16().float())


@pytest.mark.parametrize(
    "options",
    [{"state_dtype": "bfloat16"}, {"state_dtype": "int8"}, {"master_weights": True}],
    ids=["bfloat16", "int8", "master"],
)
@pytest.mark.parametrize(
    "inner", [ls.AdamW(lr=0.1), ls.Rprop(lr=0.1), ls.NAdam(lr=0.1)], ids=["adamw", "rprop", "nadam"]
)
def test_fewer_and_more_bits_continue(inner, options):
    whole, params = parameters(torch.bfloat16), parameters(torch.bfloat16)
    rule = ls.Lookahead(inner, 4)
    opt, first = Optimizer(whole, rule, **options), Optimizer(params, rule, **options)
    run(opt, whole, range(9))
    run(first, params, range(6))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    again = Optimizer(params, rule, **options)
    again.load_state_dict(torch.load(file, weights_only=True))
    run(again, params, range(6, 9))
    assert bits(params) == bits(whole)


def test_a_plain_run_goes_on_inside_lookahead():
    params = parameters()
    plain = torch.optim.AdamW(params, lr=0.1)
    run(plain, params, range(4))
    opt = Optimizer(params, ls.Lookahead(ls.AdamW(lr=0.7), 3))
    opt.load_state_dict(plain.state_dict())
    assert (opt.steps, opt.syncs, opt.param_groups[0]["lr"]) == (4, 0, 0.1)
    start = bits(params)
    run(opt, params, range(2))
    with opt.slow_weights():
        assert bits(params) == start
    run(opt, params, range(1))
    assert opt.syncs == 1


@pytest.mark.parametrize("state", [lambda opt: opt.state, lambda opt: {}], ids=["its-own", "none"])
def test_a_state_that_is_set_keeps_the_cycle(state):
    params = parameters()
    opt = Optimizer(params, ls.Lookahead(ls.Adam(lr=0.1), 5))
    run(opt, params, range(3))
    opt.state = state(opt)
    assert (opt.steps, opt.syncs) == (3, 0)
    run(opt, params, range(2))
    assert (opt.steps, opt.syncs) == (5, 1)


def test_compiled_code_may_step():
    params = parameters()
    opt = Optimizer(params, ls.SGD(lr=0.5))
    for p in params:
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in params]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(opt.step, backend="eager")()
    assert all(p.equal(q - 0.5) for p, q in zip(params, before, strict=True))


REFUSED = {
    "sparse": (lambda: torch.eye(3).to_sparse(), TypeError, r'params\["0/0"\] is sparse_coo.*lookstep.torch.Lookahead'),
    "meta": (lambda: torch.zeros(3, device="meta"), TypeError, "is on meta.*lookstep.torch.Lookahead"),
    "complex": (lambda: torch.zeros(3, dtype=torch.complex64), TypeError, "complex64"),
    "integer": (lambda: torch.zeros(3, dtype=torch.int32), TypeError, "int32"),
    "expanded": (lambda: torch.zeros(1).expand(3), ValueError, "overlaps itself"),
    "lazy": (lambda: torch.nn.parameter.UninitializedParameter(), ValueError, "run the model once"),
}


@pytest.mark.parametrize(("make", "error", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_a_parameter_that_cannot_be_stepped_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        Optimizer([make()], ls.SGD())


def test_a_module_is_told_from_its_parameters():
    with pytest.raises(TypeError, match=r"got a Linear: pass its .parameters\(\)"):
        Optimizer(torch.nn.Linear(2, 1), ls.SGD())


def test_the_core_s_lookahead_names_the_one_for_torch():
    with pytest.raises(TypeError, match=r"got SGD: around that, use lookstep\.torch\.Lookahead"):
        ls.Lookahead(torch.optim.SGD(parameters()))


def test_the_core_s_optimizer_names_the_one_for_tensors():
    with pytest.raises(
        TypeError, match=r"params\[0\] must be a NumPy array, got \w+: .*use lookstep\.torch\.Optimizer"
    ):
        ls.Optimizer(parameters(), ls.SGD())
    with pytest.raises(TypeError, match=r"grads\[0\] must be a NumPy array, got Tensor"):
        ls.Optimizer([np.zeros(2)], ls.SGD()).step([torch.zeros(2)])


def test_two_parameters_of_one_memory_are_refused():
    p = torch.zeros(4)
    with pytest.raises(ValueError, match="shares memory"):
        Optimizer([p, p[1:].detach()], ls.SGD())


@pytest.mark.parametrize(
    ("rule", "error", "match"),
    [
        (torch.optim.SGD, TypeError, "rule must be a rule"),
        (ls.SGD(lr=ls.schedules.Linear(1.0, 0.0, steps=5)), ValueError, "lr follows Linear.*lr_scheduler"),
    ],
    ids=["torch's", "scheduled"],
)
def test_a_rule_that_cannot_be_is_refused(rule, error, match):
    with pytest.raises(error, match=match):
        Optimizer([torch.zeros(3)], rule)


@pytest.mark.parametrize(
    ("hyper", "error"),
    [
        ({"lr": -1.0}, ValueError),
        ({"lr": "1"}, TypeError),
        ({"betas": (0.9, 2.0)}, ValueError),
        ({"amsgrad": True}, ValueError),
    ],
    ids=["negative", "text", "betas", "amsgrad"],
)
def test_a_group_that_cannot_be_stepped_moves_nothing(hyper, error):
    params = parameters()
    opt = Optimizer(params, ls.Adam())
    run(opt, params, [0])
    before = bits(params)
    opt.param_groups[0].update(hyper)
    with pytest.raises(error):
        run(opt, params, [1])
    assert (bits(params), opt.steps) == (before, 1)


def test_a_sparse_gradient_moves_nothing():
    params = [torch.ones(3, requires_grad=True), torch.ones(3, 3, requires_grad=True)]
    opt = Optimizer(zip(["a", "b"], params, strict=True), ls.SGD())
    before = bits(params)
    params[0].grad = torch.ones(3)
    torch.nn.functional.embedding(torch.tensor([1]), params[1], sparse=True).sum().backward()
    with pytest.raises(TypeError, match=r'grads\["b"\] is sparse_coo.*SparseAdam'):
        opt.step()
    assert (bits(params), opt.steps) == (before, 0)


def spoiled(state, key, value):
    state["state"][1][key] = value
    return state


STATES = {
    "missing": (lambda s: (s["state"][1].pop("exp_avg"), s)[1], r'params\["0/1"\] has no "exp_avg"'),
    "no-step": (lambda s: (s["state"][1].pop("step"), s)[1], 'has no "step"'),
    "no-slow": (lambda s: (s["state"][1].pop("slow"), s)[1], 'has no "slow"'),
    "unknown": (lambda s: spoiled(s, "sum", torch.ones(5)), 'unknown key "sum"'),
    "shape": (lambda s: spoiled(s, "exp_avg", torch.ones(4)), r"of shape \(4,\)"),
    "no-tensor": (lambda s: spoiled(s, "exp_avg", 1.0), "must be a tensor"),
    "negative": (lambda s: spoiled(s, "exp_avg_sq", -torch.ones(5)), "negative"),
    "nan": (lambda s: spoiled(s, "exp_avg", torch.full((5,), torch.nan)), "allow_nonfinite"),
    "half-step": (lambda s: spoiled(s, "step", torch.tensor(1.5)), "integer"),
    "nobody's": (lambda s: s | {"state": s["state"] | {7: {}}}, "none of its groups"),
    "groups": (lambda s: s | {"param_groups": s["param_groups"] * 2}, "groups of"),
    "rule": (lambda s: (s["param_groups"][0]["lookstep"].update(rule="RAdam"), s)[1], "the state is of RAdam"),
    "cycles": (lambda s: (s["param_groups"][0]["lookstep"].update(cycles=[5]), s)[1], "pairs"),
    "run": (lambda s: (s["param_groups"][0].update(lookstep=5), s)[1], "must be a dict"),
    "cycle": (lambda s: (s["param_groups"][0]["lookstep"].update(cycles=[[9, 0]]), s)[1], "steps of the cycle"),
    "lr": (lambda s: (s["param_groups"][0].update(lr=-1.0), s)[1], "lr must be"),
}


@pytest.mark.parametrize(("spoil", "match"), STATES.values(), ids=STATES.keys())
def test_a_state_that_does_not_fit_is_not_loaded(spoil, match):
    params = parameters()
    opt = Optimizer(params, ls.Lookahead(ls.Adam(lr=0.1), 5))
    run(opt, params, range(3))
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=match):
        opt.load_state_dict(spoil(copy.deepcopy(before)))
    after = opt.state_dict()
    assert repr(after["param_groups"]) == repr(before["param_groups"])
    for index, state in before["state"].items():
        assert all(value.equal(after["state"][index][key]) for key, value in state.items())


def test_the_state_of_another_kind_is_not_loaded():
    params = parameters()
    opt = Optimizer(params, ls.Lookahead(ls.Adam(), 5))
    run(opt, params, [0])
    for rule in (ls.Adam(), ls.SGD(momentum=0.9), replace(opt.rule, sync_period=5, inner=ls.Adam(amsgrad=True))):
        with pytest.raises(ValueError, match="state"):
            Optimizer(params, rule).load_state_dict(opt.state_dict())
