"""Time of a step on a GPU: lookstep beside the copy ceiling of the adapter, and torch's fused AdamW where it sees one.

    python benches/gpu.py             # 2^12 to 2^28 elements, as far as memory and limits go; on software to 2^20
    python benches/gpu.py 2^20 2^24   # these
    python benches/gpu.py --quick     # small, in few rounds: does everything run, and is it right?

README.md beside this file says what is measured, and how to read it.
"""

import argparse
import gc
import json
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import wgpu

import lookstep as ls
import lookstep.gpu
from engines import Contender, Missing, need
from measure import error
from step import machine, time_cell
from workload import Arrays, Case, Check

SIZES = [f"2^{k}" for k in range(12, 29, 2)]
SOFTWARE, QUICK = SIZES[:5], SIZES[:3:2]
SAMPLE = 50e-3
"""Seconds that a sample lasts at least: a submission and the wait for it take about a millisecond besides."""
AT_ONCE = 512
"""Steps of a submission at most."""
RULES = "AdamW", "Lookahead(AdamW)"

COPY = """
@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> y: array<vec4<f32>>;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let i = id.y * groups.x * 256u + id.x;
    if i < arrayLength(&y) {
        y[i] = x[i];
    }
}
"""
LIMIT = """
@group(0) @binding(0) var<storage, read> g: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> p: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> m: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> v: array<vec4<f32>>;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let i = id.y * groups.x * 256u + id.x;
    if i < arrayLength(&p) {
        let new_m = m[i] + g[i];
        let new_v = v[i] + g[i];
        m[i] = new_m;
        v[i] = new_v;
        p[i] += new_m - new_v;
    }
}
"""


class Device:
    """The adapter's device, with its own limits of buffers where they are above the default ones."""

    def __init__(self) -> None:
        adapter = wgpu.gpu.request_adapter_sync(power_preference="high-performance")
        raised = "max-buffer-size", "max-storage-buffer-binding-size"
        self.device = adapter.request_device_sync(required_limits={name: adapter.limits[name] for name in raised})
        self.name = "{device} ({adapter_type}, {backend_type}; {description})".format_map(adapter.info)
        self.software = adapter.info["adapter_type"] == "CPU"
        self.binding = min(adapter.limits["max-storage-buffer-binding-size"], 2**31) // 256 * 256
        self._done = self.buffer(256)

    def buffer(self, size: int) -> Any:
        usage = wgpu.BufferUsage
        return self.device.create_buffer(size=size, usage=usage.STORAGE | usage.COPY_SRC | usage.COPY_DST)

    def wait(self) -> None:
        """By a readback: `on_submitted_work_done` raises in wgpu 0.32."""
        self.device.queue.read_buffer(self._done, 0, 4)

    def shader(self, code: str, ranges: Sequence[tuple[Any, int]], size: int) -> Callable[[Any], None]:
        """A shader over ranges of buffers of that size, in as few dispatches as bindings allow: it records them all."""
        device = self.device
        pipeline = device.create_compute_pipeline(
            layout="auto", compute={"module": device.create_shader_module(code=code), "entry_point": "main"}
        )
        dispatches = []
        for at in range(0, size, self.binding):
            length = min(self.binding, size - at)
            entries = [
                {"binding": i, "resource": {"buffer": buffer, "offset": offset + at, "size": length}}
                for i, (buffer, offset) in enumerate(ranges)
            ]
            group = device.create_bind_group(layout=pipeline.get_bind_group_layout(0), entries=entries)
            groups = math.ceil(length / (16 * 256))
            rows = math.ceil(groups / 65535)
            dispatches.append((group, math.ceil(groups / rows), rows))

        def record(work: Any) -> None:
            work.set_pipeline(pipeline)
            for group, columns, rows in dispatches:
                work.set_bind_group(0, group)
                work.dispatch_workgroups(columns, rows)

        return record


@dataclass
class Engine:
    """What does steps: `sample` takes how many, and returns the seconds of one."""

    sample: Callable[[int], float]
    bytes: float
    """What a step moves for an element."""
    cycle: int = 1
    record: Callable[[Any, int], object] | None = None
    """Records steps into an encoder: where that is lookstep's doing, it is timed, too."""


def submitted(gpu: Device, record: Callable[[Any, int], object], steps: int) -> float:
    """Records steps, then submits them all and waits."""
    commands = []
    for at in range(0, steps, AT_ONCE):
        encoder = gpu.device.create_command_encoder()
        record(encoder, min(AT_ONCE, steps - at))
        commands.append(encoder.finish())
    start = time.perf_counter()
    gpu.device.queue.submit(commands)
    gpu.wait()
    return (time.perf_counter() - start) / steps


def recorded(gpu: Device, record: Callable[[Any, int], object]) -> float:
    """The seconds of the host for a step that is recorded; none is submitted."""
    start = time.perf_counter()
    encoder = gpu.device.create_command_encoder()
    record(encoder, AT_ONCE)
    encoder.finish()
    return (time.perf_counter() - start) / AT_ONCE


def in_a_pass(record: Callable[[Any], object], encoder: Any, steps: int) -> None:
    work = encoder.begin_compute_pass()
    for _ in range(steps):
        record(work)
    work.end()


def ceilings(gpu: Device, arena: ls.gpu.Arena, elements: int) -> dict[str, Engine]:
    """A copy by a shader and by the driver, and the reads and writes of AdamW with next to no arithmetic."""
    size = 4 * elements
    p, g = ((tree[0].buffer, tree[0].offset) for tree in (arena.params, arena.grads))
    m, v = ((gpu.buffer(size), 0) for _ in range(2))

    def copy(encoder: Any, steps: int) -> None:
        for _ in range(steps):
            encoder.copy_buffer_to_buffer(*g, *m, size)

    def shader(code: str, *ranges: tuple[Any, int]) -> Callable[[int], float]:
        return partial(submitted, gpu, partial(in_a_pass, gpu.shader(code, ranges, size)))

    return {
        "copy by a shader": Engine(shader(COPY, g, m), 8),
        "copy by the driver": Engine(partial(submitted, gpu, copy), 8),
        "limit": Engine(shader(LIMIT, g, p, m, v), 28),
    }


def held_to_the_oracle(case: Case, arrays: Arrays, contender: Contender, engine: Engine) -> Engine:
    """The engine, where it is right."""
    arrays.reset()
    off = error(Check(case, arrays), case, arrays, contender)
    if not off <= 1:
        raise Missing(f"wrong by {off:.3g} tolerances")
    return engine


def lookstep_engine(gpu: Device, case: Case, arrays: Arrays, arena: ls.gpu.Arena) -> Engine:
    arrays.reset()
    arena.upload(arrays.p)
    opt = ls.Optimizer(arena.params, case.rule)
    view = arena.grads[0]

    def push() -> None:
        gpu.device.queue.write_buffer(view.buffer, view.offset, arrays.g[0])

    def pull() -> None:
        arrays.p[0][...] = arena.download()[0]

    contender = Contender(partial(opt.step, arena.grads), push, pull)
    record = partial(in_a_pass, lambda work: opt.step(arena.grads, into=work))
    engine = Engine(partial(submitted, gpu, record), case.bytes, case.cycle, record)
    return held_to_the_oracle(case, arrays, contender, engine)


def torch_engine(case: Case, arrays: Arrays) -> Engine:
    """On tensors of its own: no memory of CUDA can be shared with wgpu."""
    torch = need("torch")
    if not torch.cuda.is_available():
        raise Missing("torch sees no GPU")
    p, g = (torch.empty(case.elements, device="cuda") for _ in range(2))
    arrays.reset()
    p.copy_(torch.from_numpy(arrays.p[0]))
    p.grad = g
    opt = torch.optim.AdamW([p], **asdict(case.inner), fused=True)

    def sample(steps: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(steps):
            opt.step()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / steps

    def push() -> None:
        g.copy_(torch.from_numpy(arrays.g[0]))

    def pull() -> None:
        arrays.p[0][...] = p.cpu().numpy()

    return held_to_the_oracle(case, arrays, Contender(opt.step, push, pull), Engine(sample, case.bytes))


@dataclass
class Row:
    """What a step of an engine took."""

    engine: str
    median_us: float
    p10_us: float
    gb_per_s: float
    of_copy: float
    """Its bytes a second over the shader's that copies; the median of the rounds' ratios."""
    vs_torch: float | None
    host_us: float | None


def engines_of(gpu: Device, size: str, left_out: dict[str, str]) -> dict[str, Engine]:
    """Those that are there, and right; all work on the same arrays, but for torch."""
    arrays = Arrays(Case("AdamW", size))
    arena = ls.gpu.Arena(gpu.device, [p.shape for p in arrays.p])
    makers = {rule: partial(lookstep_engine, gpu, Case(rule, size), arrays, arena) for rule in RULES}
    makers["torch fused"] = partial(torch_engine, Case("AdamW", size), arrays)
    engines = ceilings(gpu, arena, arrays.p[0].size)
    for name, make in makers.items():
        try:
            engines[name] = make()
        except (Missing, MemoryError, RuntimeError) as why:  # torch has no other type for memory that is full
            left_out[name] = str(why).partition("\n")[0]
    return engines


def measure(gpu: Device, size: str, rounds: int, left_out: dict[str, str]) -> list[Row]:
    """One table: engines take turns, in another order each round."""
    engines = engines_of(gpu, size, left_out)
    elements = Case("AdamW", size).elements
    steps = {}
    for name, engine in engines.items():
        once = min(engine.sample(engine.cycle) for _ in range(3))
        once = engine.sample(engine.cycle * max(1, round(SAMPLE / 5 / once / engine.cycle)))
        steps[name] = engine.cycle * math.ceil(SAMPLE / once / engine.cycle)
    times = {name: np.empty(rounds) for name in engines}
    turns = list(engines)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    for turn in range(rounds):
        shuffle(turns)
        for name in turns:
            times[name][turn] = engines[name].sample(steps[name])
    # Last, because the counters of what is recorded and not submitted go wrong.
    hosts = {
        name: float(np.median([recorded(gpu, engine.record) for _ in range(rounds)]) * 1e6)
        for name, engine in engines.items()
        if engine.record
    }
    gc.enable()
    rates = {name: engine.bytes * elements / times[name] for name, engine in engines.items()}
    torch = times.get("torch fused")
    return [
        Row(
            name,
            float(np.median(mine) * 1e6),
            float(np.quantile(mine, 0.1) * 1e6),
            float(np.median(rates[name]) / 1e9),
            float(np.median(rates[name] / rates["copy by a shader"])),
            None if torch is None else float(np.median(mine / torch)),
            hosts.get(name),
        )
        for name, mine in times.items()
    ]


HEAD = f"{'':20}{'median':>12}{'p10':>12}{'GB/s':>8}{'of copy':>9}{'vs torch':>10}{'host µs':>9}"


def show(size: str, rows: Sequence[Row], left_out: dict[str, str]) -> None:
    print(f"\n{size} elements of float32\n{HEAD}")
    for row in rows:
        ratio = "" if row.vs_torch is None else f"{row.vs_torch:.2f}"
        host = "" if row.host_us is None else f"{row.host_us:.2f}"
        print(
            f"  {row.engine:18}{time_cell(row.median_us)}{time_cell(row.p10_us)}{row.gb_per_s:8.1f}{row.of_copy:9.3f}"
            f"{ratio:>10}{host:>9}".rstrip()
        )
    if left_out:
        print("  left out:", ", ".join(f"{name} ({why})" for name, why in left_out.items()))
    sys.stdout.flush()


def no_room(gpu: Device, size: str) -> str:
    """Why there is no table of that size, or nothing."""
    bytes_of_one = 4 * Case("AdamW", size).elements
    largest = gpu.device.limits["max-buffer-size"]
    if bytes_of_one > largest:
        return f"a buffer may have {largest} bytes"
    # Where the device is the CPU: 2 arrays for the host, 2 of parameters and gradients, 5 of state, 2 for limits, and
    # as much as the largest in passing.
    free = free_memory() if gpu.software else math.inf
    return f"it takes {13 * bytes_of_one >> 20} MiB of memory" if 13 * bytes_of_one > free else ""


def free_memory() -> float:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return math.inf
    return 1024.0 * int(meminfo.read_text().partition("MemAvailable:")[2].split()[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=f"default: {' '.join(SIZES)}")
    parser.add_argument("--rounds", type=int, help="default: 15, and 3 with --quick")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--out", type=Path, help="file for results")
    args = parser.parse_args()
    gpu = Device()
    about = machine() | {"command": " ".join(["python", "benches/gpu.py", *sys.argv[1:]]), "adapter": gpu.name}
    print(about["date"], about["command"], sep="  ")
    print(gpu.name)
    print(", ".join(f"{name} {number}" for name, number in about["versions"].items()))
    wrong, tables = False, {}
    for size in args.sizes or (QUICK if args.quick else SOFTWARE if gpu.software else SIZES):
        if why := no_room(gpu, size):
            print(f"\n{size} elements: left out, {why}")
            continue
        left_out: dict[str, str] = {}
        try:
            rows = measure(gpu, size, args.rounds or (3 if args.quick else 15), left_out)
        except MemoryError as why:
            print(f"\n{size} elements: left out, {why}")
            continue
        show(size, rows, left_out)
        tables[size] = {"rows": [vars(row) for row in rows], "left_out": left_out}
        wrong |= bool(left_out.keys() & set(RULES))
        if args.out:  # also of a run that ends too soon
            args.out.write_text(json.dumps({**about, "tables": tables}, indent=1, ensure_ascii=False) + "\n")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
