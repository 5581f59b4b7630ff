"""Who does the step: lookstep, its peers, and the memory limit. An engine is a row of `ENGINES`."""

import ctypes
import importlib
import inspect
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

import lookstep as ls
from workload import Array, Arrays, Case


@dataclass
class Contender:
    """An engine at work. One with arrays of its own takes gradients by `push`, and gives parameters by `pull`."""

    step: Callable[[], object]
    push: Callable[[], object] = lambda: None
    pull: Callable[[], object] = lambda: None
    case: Case | None = None
    """What it does, where that is not what the table is about."""
    note: str = ""


class Missing(Exception):
    """Why an engine has no such row, where that is worth telling."""


def need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(error) from error


def whole_float32(case: Case) -> None:
    """Leaves out what an engine does not do, or is not asked for here."""
    if (case.p, case.g, case.state_dtype, case.max_grad_norm) != ("float32", "float32", None, None):
        raise Missing("float32 only")


def lookstep_engine(case: Case, arrays: Arrays) -> Contender:
    options: dict[str, Any] = {"state_dtype": case.state_dtype, "max_grad_norm": case.max_grad_norm}
    return Contender(partial(ls.Optimizer(arrays.p, case.rule, threads=case.threads, **options).step, arrays.g))


def plain_engine(case: Case, arrays: Arrays) -> Contender:
    """The rule on the same arrays, without Lookahead, clipping and state in fewer bits."""
    rule = type(case.inner).__name__
    plain = replace(case, rule_name=rule, state_dtype=None, max_grad_norm=None)
    if plain == case:
        raise Missing
    return replace(lookstep_engine(plain, arrays), case=plain)


def wrapped_engine(case: Case, arrays: Arrays) -> Contender:
    """The rule inside Lookahead."""
    wrapped = replace(case, rule_name=f"Lookahead({case.rule_name})")
    return replace(lookstep_engine(wrapped, arrays), case=wrapped)


def scalars(case: Case, t: int) -> tuple[float, float, float]:
    """Step t is p = keep * p - size * m / (root * sqrt(v) + eps); where root is 0, there is no denominator."""
    rule = case.inner
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


def weights(case: Case) -> tuple[tuple[float, float], tuple[float, float]]:
    """Of the old value and of the new one, in m and in v."""
    if isinstance(case.inner, ls.SGD):
        return (case.inner.momentum, 1.0), (0.0, 0.0)
    if not isinstance(case.inner, ls.Adam | ls.AdamW | ls.RAdam):
        raise Missing("no such rule")
    b1, b2 = case.inner.betas
    return (b1, 1 - b1), (b2, 1 - b2)


def pieces(case: Case, arrays: Arrays, length: int) -> list[list[Array]]:
    """Pieces of p, g, and of m, v and slow weights, which are made here."""
    cut: list[list[Array]] = [[] for _ in range(5)]
    for p, g in zip(arrays.p, arrays.g, strict=True):
        flat = p.reshape(-1), g.reshape(-1), *(np.zeros(p.size, np.float32) for _ in range(3))
        for at in range(0, p.size, length):
            for into, x in zip(cut, flat, strict=True):
                into.append(x[at : at + length])
    return cut


def numpy_engine(case: Case, arrays: Arrays) -> Contender:
    """As fast as NumPy goes: no temporary arrays, and pieces that stay in the cache for a dozen passes."""
    whole_float32(case)
    if case.threads > 1:
        raise Missing
    (b1, a1), (b2, a2) = weights(case)
    cut = pieces(case, arrays, 1 << 16)
    chunks = list(zip(*cut, strict=True))
    scratch = np.empty(max(p.size for p in cut[0]), np.float32)
    t = 0

    def step() -> None:
        nonlocal t
        t += 1
        keep, root, size = scalars(case, t)
        for p, g, m, v, slow in chunks:
            x = scratch[: p.size]
            if case.lookahead and t % case.cycle == 1:
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
                x += case.inner.eps
                np.divide(m, x, out=x)
                x *= size
            else:
                np.multiply(m, size, out=x)
            if keep != 1:
                p *= keep
            p -= x
            if case.lookahead and t % case.cycle == 0:
                np.subtract(p, slow, out=x)
                x *= 1 - case.lookahead.slow_step
                p -= x

    return Contender(step)


def naive_engine(case: Case, arrays: Arrays) -> Contender:
    """As the formulas are written down first."""
    whole_float32(case)
    if case.threads > 1 or case.lookahead or isinstance(case.inner, ls.SGD):
        raise Missing
    (b1, a1), (b2, a2) = weights(case)
    state = [[np.zeros_like(p), np.zeros_like(p)] for p in arrays.p]
    t = 0

    def step() -> None:
        nonlocal t
        t += 1
        keep, root, size = scalars(case, t)
        for p, g, kept in zip(arrays.p, arrays.g, state, strict=True):
            kept[0] = m = b1 * kept[0] + a1 * g
            kept[1] = v = b2 * kept[1] + a2 * g**2
            p[...] = keep * p - size * m / (root * np.sqrt(v) + case.inner.eps if root else 1)

    return Contender(step)


def numba_engine(case: Case, arrays: Arrays) -> Contender:
    whole_float32(case)
    numba, kernels = need("numba"), need("numba_kernels")
    (b1, a1), (b2, a2) = weights(case)
    # To wake threads takes longer than a step of few elements.
    parallel = case.threads > 1 and case.elements > 1 << 18
    numba.set_num_threads(case.threads)
    p, g, m, v, slow = (numba.typed.List(x) for x in pieces(case, arrays, 1 << 14))
    f32, t = np.float32, 0
    step_size = f32(case.lookahead.slow_step if case.lookahead else 1)
    sgd = isinstance(case.inner, ls.SGD)
    kernel = kernels.compiled(kernels.sgd if sgd else kernels.adam, parallel)

    def step() -> None:
        nonlocal t
        t += 1
        phase = {1: 1, 0: 2}.get(t % case.cycle, 0) if case.lookahead else 0
        keep, root, size = map(f32, scalars(case, t))
        if sgd:
            kernel(p, g, m, slow, phase, step_size, size, f32(b1))
        else:
            eps = f32(case.inner.eps if root else 1)
            kernel(p, g, m, v, slow, phase, step_size, keep, root, size, eps, f32(b1), f32(a1), f32(b2), f32(a2))

    return Contender(step)


def as_torch(array: Array) -> Any:
    """A tensor of the same memory."""
    torch = need("torch")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@dataclass
class Tensors:
    """A case's arrays as tensors: of the same memory, or where that will not do, of torch's own."""

    params: list[Any]
    grads: list[Any]
    push: Callable[[], object]
    pull: Callable[[], object]

    def __init__(self, case: Case, arrays: Arrays, own: bool) -> None:
        torch = need("torch")
        torch.set_num_threads(case.threads)
        params, grads = [as_torch(p) for p in arrays.p], [as_torch(g) for g in arrays.g]
        clipped = case.max_grad_norm is not None  # which is written into gradients
        self.params = [p.clone() for p in params] if own else params
        self.grads = [g.clone() for g in grads] if own or clipped else grads
        for p in self.params:
            p.requires_grad_()
        self.push = partial(torch._foreach_copy_, self.grads, grads) if own or clipped else lambda: None
        self.pull = (lambda: torch._foreach_copy_(params, [p.detach() for p in self.params])) if own else lambda: None
        if case.g == case.p:
            for p, g in zip(self.params, self.grads, strict=True):
                p.grad = g

    def contender(self, step: Callable[[], object], **more: Any) -> Contender:
        return Contender(step, self.push, self.pull, **more)


def adapter_engine(case: Case, arrays: Arrays) -> Contender:
    """The same as an optimizer of torch."""
    whole_float32(case)
    need("torch")
    tensors = Tensors(case, arrays, own=False)
    return tensors.contender(ls.torch.Optimizer(tensors.params, case.rule, threads=case.threads).step)


def torch_engine(
    case: Case,
    arrays: Arrays,
    own: bool = False,
    wrapper: str = "",
    names: tuple[str, str] = ("k", "alpha"),
    late: int = 0,
    **mode: bool,
) -> Contender:
    """Gradients of another dtype than their parameters' are copied first: torch takes no others."""
    if bool(case.lookahead) != bool(wrapper) or case.state_dtype:
        raise Missing
    torch = need("torch")
    tensors = Tensors(case, arrays, own)
    rule = getattr(torch.optim, type(case.inner).__name__)
    if not mode.keys() <= inspect.signature(rule).parameters.keys():
        raise Missing("no such rule")
    optimizer = rule(tensors.params, **asdict(case.inner), **mode)
    if case.lookahead:
        values = case.cycle, case.lookahead.slow_step
        optimizer = need(wrapper).Lookahead(optimizer, **dict(zip(names, values, strict=True)))
    step = optimizer.step
    if case.g != case.p:
        copies = [torch.empty_like(p) for p in tensors.params]
        for p, copy in zip(tensors.params, copies, strict=True):
            p.grad = copy

        def step() -> None:
            torch._foreach_copy_(copies, tensors.grads)
            optimizer.step()

    if case.max_grad_norm is not None:

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(tensors.params, case.max_grad_norm, foreach=True)
            optimizer.step()

    if case.p == "bfloat16":  # torch keeps state in the type of the parameter
        return tensors.contender(step, case=replace(case, state_dtype="bfloat16"), note="bfloat16 state")
    if late:
        return tensors.contender(step, case=replace(case, late=late), note=f"first cycle begins after step {late}")
    return tensors.contender(step)


def adamw_arguments(case: Case) -> dict[str, Any]:
    if type(case.inner) is not ls.AdamW or case.lookahead:
        raise Missing
    hyper = asdict(case.inner)
    return {name: hyper[name] for name in ("lr", "betas", "eps", "weight_decay")}


def deepspeed_engine(case: Case, arrays: Arrays) -> Contender:
    """It has OpenMP threads of its own, next to torch's."""
    if case.state_dtype or case.max_grad_norm or case.p != case.g:
        raise Missing
    os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)  # there is ninja, to build it
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    adam = need("deepspeed.ops.adam").DeepSpeedCPUAdam
    tensors = Tensors(case, arrays, own=False)
    ctypes.CDLL("libgomp.so.1").omp_set_num_threads(case.threads)
    optimizer = adam(tensors.params, **adamw_arguments(case), adamw_mode=True, fp32_optimizer_states=True)
    return tensors.contender(optimizer.step)


def eight_bit_engine(case: Case, arrays: Arrays, module: str) -> Contender:
    if case.state_dtype != "int8" or case.max_grad_norm:
        raise Missing
    adam = need(module).AdamW8bit
    tensors = Tensors(case, arrays, own=False)
    return tensors.contender(adam(tensors.params, **adamw_arguments(case)).step)


def optax_engine(case: Case, arrays: Arrays) -> Contender:
    """It takes as many threads as there are CPUs; so it has no rows for one."""
    whole_float32(case)
    if case.threads == 1 and (os.cpu_count() or 1) > 1:
        raise Missing
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax, optax, inner = need("jax"), need("optax"), case.inner
    make: Any = {
        ls.SGD: lambda: optax.sgd(inner.lr, inner.momentum),
        ls.Adam: lambda: optax.adam(inner.lr, *inner.betas, inner.eps),
        ls.AdamW: lambda: optax.adamw(inner.lr, *inner.betas, inner.eps, weight_decay=inner.weight_decay),
        ls.RAdam: lambda: optax.radam(inner.lr, *inner.betas, inner.eps),
    }
    rule, copy = make[type(inner)](), lambda: [jax.numpy.array(p) for p in arrays.p]
    params: Any = copy()
    if case.lookahead:
        rule = optax.lookahead(rule, case.cycle, case.lookahead.slow_step)
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
        for p, own in zip(arrays.p, params.fast if case.lookahead else params, strict=True):
            p[...] = own

    cpus = os.cpu_count() or 1
    return Contender(step, push, pull, note=f"{cpus} threads" if cpus != case.threads else "")


class Leaf(ctypes.Structure):
    """As `limit.rs` declares it: p, g, up to four state arrays, slow weights, and how many elements they have."""

    _fields_ = (("arrays", ctypes.c_void_p * 7), ("n", ctypes.c_size_t))


class Part(ctypes.Structure):
    """What one thread does."""

    _fields_ = (("leaves", ctypes.POINTER(Leaf)), ("count", ctypes.c_size_t))


@cache
def limit_library() -> Any:
    if shutil.which("rustc") is None:
        raise Missing("rustc is not installed")
    here = Path(__file__).parent
    library = here.parent / "target" / "limit.so"
    library.parent.mkdir(exist_ok=True)
    options = "--edition 2024 --crate-type cdylib -C opt-level=3 -C codegen-units=1 -D warnings limit.rs -o"
    built = subprocess.run(["rustc", *options.split(), library], cwd=here, capture_output=True, text=True)
    if built.returncode:
        raise Missing(next(line for line in built.stderr.splitlines() if line.startswith("error")))
    return ctypes.CDLL(str(library))


def limit_engine(case: Case, arrays: Arrays) -> Contender:
    """Where numbers are not of 4 bytes, or are read twice: as many arrays, with elements for as many bytes in all."""
    limit = limit_library().limit
    part_of = case.bytes / replace(case, p="float32", g="float32", state_dtype=None, max_grad_norm=None).bytes
    used = [*range(2 + case.states), 6]
    leaves = []
    for p, g in zip(arrays.p, arrays.g, strict=True):
        n = round(p.size * part_of)
        shared = (p, g) if (case.p, case.g) == ("float32", "float32") and n == p.size else ()
        leaves.append((*shared, *(np.zeros(n, np.float32) for _ in used[len(shared) :])))
    # To wake threads takes longer than a step of few elements.
    parts = case.threads if case.elements > 1 << 18 else 1
    passed = (Part * parts)()
    for k, part in enumerate(passed):
        part.leaves, part.count = (Leaf * len(leaves))(), len(leaves)
        for leaf, own in zip(part.leaves[: len(leaves)], leaves, strict=True):
            start, end = (own[-1].size * at // parts for at in (k, k + 1))
            for at, x in zip(used, own, strict=True):
                leaf.arrays[at] = x.ctypes.data + 4 * start
            leaf.n = end - start
    call = partial(limit, passed, *map(ctypes.c_size_t, (parts, case.states)))
    slow = [1, *[0] * (case.cycle - 2), 2] if case.lookahead else [0]
    t = 0

    def step(keep_alive: Any = (leaves, passed)) -> None:
        nonlocal t
        call(slow[t % case.cycle])
        t += 1

    if not leaves[0][1].any():
        for own in leaves:
            own[1][...] = 1
    for _ in slow:
        step()
    if not all(x[-1] for own in leaves for x in own[2 : 2 + case.states]):
        raise Missing("it has not touched the state")
    return Contender(step)


ENGINES: dict[str, Callable[[Case, Arrays], Contender]] = {
    "limit": limit_engine,
    "lookstep": lookstep_engine,
    "lookstep-plain": plain_engine,
    "lookstep-lookahead": wrapped_engine,
    "lookstep-torch": adapter_engine,
    "lookstep-around-torch": partial(
        torch_engine, wrapper="lookstep.torch", names=("sync_period", "slow_step"), fused=True
    ),
    "numpy": numpy_engine,
    "numpy-naive": naive_engine,
    "numba": numba_engine,
    "torch-fused": partial(torch_engine, fused=True),
    "torch-foreach": partial(torch_engine, foreach=True),
    "torch-single": partial(torch_engine, foreach=False),
    "torch-own": partial(torch_engine, own=True, fused=True),
    "pytorch_optimizer": partial(torch_engine, wrapper="pytorch_optimizer", fused=True),
    "torch_optimizer": partial(torch_engine, wrapper="torch_optimizer", late=1, fused=True),
    "timm": partial(torch_engine, wrapper="timm.optim", late=5, fused=True),
    "deepspeed": deepspeed_engine,
    "torchao": partial(eight_bit_engine, module="torchao.optim"),
    "bitsandbytes": partial(eight_bit_engine, module="bitsandbytes.optim"),
    "optax": optax_engine,
}
