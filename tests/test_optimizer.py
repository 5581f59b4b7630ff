"""What an optimizer offers around the step: slow weights, live settings, views, and calls from several threads."""

import copy
import gc
import pickle
import signal
import threading
import weakref
from typing import NamedTuple

import numpy as np
import pytest

import lookstep as ls

LOOKAHEAD = ls.Lookahead(ls.SGD(lr=1.0), sync_period=3)


def stepped(steps, rule=LOOKAHEAD):
    p = np.array([10.0, 20.0])
    opt = ls.Optimizer(p, rule)
    for _ in range(steps):
        opt.step(np.ones(2))
    return p, opt


def test_slow_weights_are_in_params_inside_and_fast_ones_after():
    p, opt = stepped(2)
    with opt.slow_weights() as inside:
        assert inside is p
        assert p.tolist() == [10, 20]
        assert opt.slow.tolist() == [10, 20]
    assert p.tolist() == [8, 18]
    assert opt.slow.tolist() == [10, 20]


@pytest.mark.parametrize("slice_", [np.s_[::2], np.s_[::-1]])
def test_slow_weights_of_strided_arrays(slice_):
    p = np.arange(4000.0)[slice_]
    start = p.copy()
    opt = ls.Optimizer(p, LOOKAHEAD)
    opt.step(np.ones_like(p))
    with opt.slow_weights():
        assert (p == start).all()
    assert (p == start - 1).all()


def test_fast_weights_come_back_when_the_body_raises():
    p, opt = stepped(2)
    with pytest.raises(ZeroDivisionError), opt.slow_weights():
        1 / 0  # noqa: B018
    assert p.tolist() == [8, 18]
    opt.step(np.ones(2))
    assert p.tolist() == [8.5, 18.5]


def test_between_cycles_and_without_lookahead_slow_is_fast():
    for opt, p in ((opt, p) for p, opt in (stepped(0), stepped(3), stepped(2, ls.SGD(lr=1.0)))):
        before = p.tolist()
        assert opt.slow.tolist() == before
        with opt.slow_weights():
            assert p.tolist() == before
        assert p.tolist() == before


def test_what_is_written_inside_goes_to_the_slow_weights():
    p, opt = stepped(2)
    with opt.slow_weights():
        p[:] = 100
    assert p.tolist() == [8, 18]
    opt.step(np.ones(2))
    assert p.tolist() == [53.5, 58.5]


def test_inside_slow_weights_nothing_may_move():
    p, opt = stepped(2)
    with opt.slow_weights():
        for call in (lambda: opt.step(np.ones(2)), opt.sync, opt.slow_weights().__enter__):
            with pytest.raises(RuntimeError, match="params hold the slow weights"):
                call()
        assert p.tolist() == [10, 20]
    assert p.tolist() == [8, 18]
    with pytest.raises(RuntimeError, match="slow_weights\\(\\) was not entered"):
        opt.slow_weights().__exit__(None, None, None)


def test_only_the_context_that_was_entered_can_be_left():
    p, opt = stepped(2)
    with opt.slow_weights():
        with pytest.raises(RuntimeError, match="not entered"):
            opt.slow_weights().__exit__(None, None, None)
        assert p.tolist() == [10, 20]
    assert p.tolist() == [8, 18]


def test_fast_weights_come_back_into_an_array_that_was_locked_inside():
    p, opt = stepped(2)
    with opt.slow_weights():
        p.flags.writeable = False
    assert p.tolist() == [8, 18]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fast_weights_wait_for_an_array_that_was_reshaped_inside():
    p, opt = stepped(2)
    context = opt.slow_weights()
    context.__enter__()
    p.shape = (2, 1)
    with pytest.raises(RuntimeError, match="params was"):
        context.__exit__(None, None, None)
    p.shape = (2,)
    context.__exit__(None, None, None)
    assert p.tolist() == [8, 18]
    with pytest.raises(RuntimeError, match="was not entered"):
        context.__exit__(None, None, None)


def test_fast_weights_come_back_with_the_next_call_where_the_end_of_a_context_could_not_bring_them():
    p, opt = stepped(2)
    with pytest.raises(RuntimeError, match="params was"), opt.slow_weights():
        p.shape = (2, 1)
    with pytest.raises(RuntimeError, match="params was"):
        opt.step(np.ones((2, 1)))
    p.shape = (2,)
    opt.step(np.ones(2))
    other, alone = stepped(3)
    assert p.tobytes() == other.tobytes()
    # And where a context is forgotten; but not while another one is open.
    opt.step(np.ones(2))
    alone.step(np.ones(2))
    context = opt.slow_weights()
    context.__enter__()
    del context
    stale = opt.slow_weights()
    stale.__enter__()
    stale.__exit__(None, None, None)
    with opt.slow_weights():
        del stale
        with pytest.raises(RuntimeError, match="params hold the slow weights"):
            opt.step(np.ones(2))
    assert p.tobytes() == other.tobytes()


def test_sync_ends_the_cycle_now():
    p, opt = stepped(2)
    opt.sync()
    assert p.tolist() == [9, 19]
    assert (opt.steps, opt.syncs) == (2, 1)
    opt.sync()
    assert opt.syncs == 1
    for _ in range(3):
        opt.step(np.ones(2))
    assert p.tolist() == [7.5, 17.5]
    plain, opt = stepped(2, ls.SGD(lr=1.0))
    opt.sync()
    assert (plain.tolist(), opt.syncs) == ([8, 18], 0)


@pytest.mark.parametrize("value", [np.inf, 3e38, -0.0])
def test_sync_at_a_slow_step_of_one_leaves_every_bit(value):
    p = np.array([-3e38, 1.0], "f4")
    opt = ls.Optimizer(p, ls.Lookahead(ls.SGD(lr=1.0), slow_step=1.0))
    opt.step(np.zeros(2, "f4"))
    p[0] = value
    before = p.tobytes()
    opt.sync()
    assert (p.tobytes(), opt.syncs) == (before, 1)


def test_lr_is_live():
    p, opt = stepped(1)
    assert opt.lr == 1
    opt.lr = np.float32(0.5)
    assert opt.rule == ls.Lookahead(ls.SGD(lr=0.5), sync_period=3)
    assert type(opt.lr) is float
    opt.step(np.ones(2))
    assert p.tolist() == [8.5, 18.5]
    _, opt = stepped(0, ls.Adam())
    opt.lr = 0.1
    assert opt.rule == ls.Adam(lr=0.1)


class Pair(NamedTuple):
    w: np.ndarray
    b: np.ndarray


def test_views_have_the_structure_and_paths_of_params():
    params = {"layers": [Pair(np.ones((2, 3)), np.zeros(3, "f4"))], 7: (np.ones(1),)}
    opt = ls.Optimizer(params, ls.Lookahead(ls.Adam()))
    opt.step(params | {"layers": [Pair(np.ones((2, 3)), np.ones(3, "f4"))], 7: [None]})
    slow = opt.slow
    assert isinstance(slow["layers"][0], Pair)
    assert isinstance(slow[7], tuple)
    assert (slow["layers"][0].w == 1).all()
    assert list(opt.state) == ["layers/0/0", "layers/0/1", "7/0"]
    assert opt.state["layers/0/1"]["v"].dtype == "f4"
    np.testing.assert_allclose(opt.state["layers/0/0"]["m"], np.full((2, 3), 0.1))


@pytest.mark.parametrize("steps", [0, 1])
def test_views_are_read_only(steps):
    _, opt = stepped(steps, ls.Lookahead(ls.Adam()))
    for view in (opt.slow, opt.state[""]["m"]):
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
    m = opt.state[""]["m"]
    with pytest.raises(ValueError, match="cannot set WRITEABLE flag to True"):
        m.flags.writeable = True
    with pytest.raises(ValueError, match="cannot resize"):
        m.base.resize(1000, refcheck=False)


def test_views_of_transposed_arrays_pair_by_index():
    p = np.asfortranarray(np.zeros((2, 3)))
    opt = ls.Optimizer(p, ls.SGD(lr=1.0, momentum=0.5))
    g = np.arange(6.0).reshape(2, 3)
    opt.step(g)
    assert (opt.state[""]["m"] == g).all()


def test_views_outlive_the_optimizer():
    _, opt = stepped(1, ls.Lookahead(ls.Adam(lr=0.1)))
    slow, m = opt.slow, opt.state[""]["m"]
    del opt
    gc.collect()
    assert slow.tolist() == [10, 20]
    np.testing.assert_allclose(m, 0.1)


def test_an_optimizer_lets_go_of_its_arrays():
    p, opt = stepped(1)
    alive = weakref.ref(p)
    del p, opt
    gc.collect()
    assert alive() is None


def test_rules_are_data():
    rule = ls.Lookahead(ls.AdamW(lr=1e-2), sync_period=7)
    assert rule == ls.Lookahead(ls.AdamW(lr=1e-2), 7)
    assert hash(rule) == hash(copy.deepcopy(rule))
    assert eval(repr(rule), vars(ls)) == rule
    with pytest.raises(AttributeError):
        rule.sync_period = 3


def test_a_copy_has_arrays_of_its_own():
    p, opt = stepped(1)
    with pytest.raises(TypeError, match="bound to its arrays"):
        copy.copy(opt)
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        before = p.tobytes()
        assert other.params.tobytes() == before
        other.step(np.ones_like(p))
        assert p.tobytes() == before != other.params.tobytes()


def test_repr_says_how_far_it_is():
    _, opt = stepped(4)
    assert repr(opt) == f"Optimizer(1 leaf, {LOOKAHEAD}, steps=4, syncs=1)"


BIG = 30_000_000


def test_another_thread_runs_during_a_step():
    opt = ls.Optimizer(np.zeros(BIG, "f4"), ls.SGD(lr=1.0))
    started = threading.Event()

    def work():
        started.set()
        opt.step(np.ones(BIG, "f4"))

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    ticks = 0
    while thread.is_alive():
        ticks += 1
    assert ticks > 1, "the lock of the interpreter was not released"


def test_calls_of_several_threads_run_one_after_another_and_whole():
    p, g = np.zeros(BIG // 8, "f4"), np.ones(BIG // 8, "f4")
    opt = ls.Optimizer(p, ls.Lookahead(ls.SGD(lr=1.0), 10**6))
    done = threading.Event()
    seen = []

    def read():
        while not done.is_set():
            state = opt.state_dict()
            seen.append((state["steps"], set(state["leaves"][""]["params"].tolist())))

    reader = threading.Thread(target=read)
    steppers = [threading.Thread(target=lambda: [opt.step(g) for _ in range(10)]) for _ in range(2)]
    for thread in (reader, *steppers):
        thread.start()
    for thread in steppers:
        thread.join()
    done.set()
    reader.join()
    assert (p == -20).all()
    assert opt.steps == 20
    assert seen
    assert all(numbers == {-steps} for steps, numbers in seen)


def test_counters_can_be_read_during_a_step():
    p, g = np.zeros(BIG, "f4"), np.ones(BIG, "f4")
    opt = ls.Optimizer(p, ls.SGD(lr=1.0))
    thread = threading.Thread(target=opt.step, args=(g,))
    thread.start()
    while opt.steps == 0:
        pass
    assert (p == -1).all(), "a step is counted when it is done"
    thread.join()
    assert opt.steps == 1


def test_a_signal_handler_may_read_the_counters():
    """Also one that runs while the engine asks NumPy whether two interleaved arrays share memory."""
    buffer = np.zeros(2000)
    opt = ls.Optimizer(buffer[::2], ls.SGD(lr=1.0))
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(opt.steps))
    try:
        for step in range(50):
            signal.raise_signal(signal.SIGINT)
            opt.step(buffer[1::2] if step % 2 else np.ones(1000))
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == list(range(50))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timer")
def test_an_interrupt_finds_a_step_done_whole():
    p, g = np.zeros(1000), np.ones(1000)
    opt = ls.Optimizer(p, ls.Lookahead(ls.SGD(lr=1.0), sync_period=10**9))

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(20):
            signal.setitimer(signal.ITIMER_REAL, 0.003)
            try:
                while True:
                    with opt.slow_weights():
                        pass
                    opt.step(g)
            except KeyboardInterrupt:
                pass
            assert (p == -opt.steps).all()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert opt.steps > 20
