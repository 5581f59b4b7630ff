"""Time of a step: lookstep beside its peers, and all of them beside the memory limit.

    python benches/step.py            # every table, and the chart: a quarter of an hour, 12 GB
    python benches/step.py step --rule AdamW --size 1e6/60 --engine lookstep --engine torch-fused
    python benches/step.py --quick    # all tables, small, in few rounds: does everything run, and is it right?

README.md beside this file says what is measured, and how to read it. A table is a row of `TABLES`, a rule or a size one
in `workload.py`, an engine one in `engines.py`.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lookstep as ls
from engines import ENGINES
from measure import Row, Table, compare, kept_busy, on_wall
from workload import INNER, RULES, Case, cases

HERE = Path(__file__).parent
RESULTS, CHART = HERE / "results.json", HERE.parent / "docs" / "speed.svg"

ONE = "limit lookstep lookstep-torch numpy numpy-naive numba torch-fused torch-foreach torch-single torch-own deepspeed"
TWO = "limit lookstep lookstep-torch numba torch-fused torch-single deepspeed optax"
WRAPPED = "limit lookstep lookstep-plain numpy numba optax lookstep-torch "
WRAPPED += "lookstep-around-torch pytorch_optimizer torch_optimizer timm"
CURVES = "limit lookstep lookstep-lookahead numpy numba torch-fused torch-foreach optax"

TABLES: dict[str, list[Case]] = {
    "step": [
        *cases("AdamW Adam RAdam SGD", "small 1e6/60", ONE),
        *cases("AdamW", "1e7 1e8", ONE),
        *cases("AdamW Adam RAdam SGD", "1e6/60", TWO, threads=[2]),
        *cases("AdamW", "small 1e8 1e8/200", TWO, threads=[2]),
    ],
    "lookahead": [
        *cases("Lookahead(AdamW) Lookahead(SGD)", "small 1e6/60", WRAPPED, threads=[1, 2]),
        *cases("Lookahead(AdamW)", "1e8", WRAPPED, threads=[1, 2]),
    ],
    "every-rule": cases([rule.__name__ for rule in INNER], "1e6 1e7", "limit lookstep"),
    "dtypes": [
        *cases("AdamW", "1e6 1e7", "limit lookstep torch-fused", threads=[1, 2], p="float64", g="float64"),
        *cases("AdamW", "1e6 1e7", "limit lookstep", threads=[1, 2], p="float16", g="float16"),
        # Parameters and gradients of 16 bits; state of 32, but for torch.
        *cases("AdamW", "1e6 1e7", "limit lookstep deepspeed torch-fused", threads=[1, 2], p="bfloat16", g="bfloat16"),
        # torch copies gradients to float32 first.
        *cases("AdamW", "1e6 1e7", "limit lookstep torch-fused", threads=[1, 2], g="bfloat16"),
    ],
    "fewer-bits": [
        *cases("AdamW", "2^24", "limit lookstep lookstep-plain", threads=[1, 2], state_dtype="bfloat16"),
        *cases("AdamW", "2^24", "limit lookstep lookstep-plain torchao bitsandbytes", state_dtype="int8"),
    ],
    "clip": cases(
        "AdamW", "1e6/60 1e8", "limit lookstep lookstep-plain torch-fused", threads=[1, 2], max_grad_norm=1.0
    ),
    "many": cases("AdamW", "16x100000", "limit lookstep numba torch-fused", threads=[1, 2]),
    "busy": [
        *cases("AdamW", "small", "lookstep numba torch-fused torch-foreach", threads=[2]),
        *cases("AdamW", "small", "lookstep numba torch-fused torch-foreach", threads=[2], busy=True),
    ],
    "sweep": cases("AdamW", "1e3 3e3 1e4 3e4 1e5 3e5 1e6 3e6 1e7 3e7 1e8", CURVES, threads=[1, 2]),
}
ASKED_FOR = ("busy",)
"""Tables that a run without arguments leaves out."""


def quick(case: Case) -> Case:
    """The same at a size that takes no time."""
    if case.elements <= 10**6 and case.size != "1e6":
        return case
    return replace(case, size="65536" if case.state_dtype else "1e5")


def rounds_of(case: Case) -> int:
    return 31 if case.elements <= 2 * 10**6 else 15 if case.elements <= 2 * 10**7 else 7


def time_cell(us: float) -> str:
    return f"{us:9.2f} µs" if us < 1e3 else f"{us / 1e3:9.2f} ms"


def cells(row: Row) -> str:
    of_limit = "" if row.of_limit is None else f"{row.of_limit:.3f}"
    ratio = "" if row.vs_lookstep is None else f"{row.vs_lookstep:.2f}"
    return f"{time_cell(row.median_us)}{time_cell(row.p10_us)}{row.gb_per_s:8.1f}{of_limit:>10}{ratio:>13}  {row.note}"


HEAD = f"{'':20}{'median':>12}{'p10':>12}{'GB/s':>8}{'of limit':>10}{'vs lookstep':>13}"


def show(table: Table) -> None:
    case = table.case
    print(f"\n{case.title}: {case.elements} elements, {case.bytes:g} bytes each", end="")
    print(f", {'wall' if on_wall(case) else 'CPU'} time\n{HEAD}")
    for row in table.rows:
        print(f"  {row.engine:18}{cells(row)}".rstrip())
    show_the_rest(table)


def show_line(table: Table, first: bool) -> None:
    """A table of lookstep alone, as a line of one of all rules."""
    case = table.case
    if first:
        print(f"\nevery rule, {case.title.partition(', ')[2]}, CPU time\n{HEAD}{'bytes':>8}")
    if row := table.row("lookstep"):
        print(f"  {case.rule_name:18}{cells(row).rstrip()}{case.bytes:8g}")
    show_the_rest(table)


def show_the_rest(table: Table) -> None:
    for name, off in table.wrong.items():
        print(f"  {name:18}not timed: it is wrong, by {off:.3g} times the tolerance")
    if table.left_out:
        print("  left out:", ", ".join(f"{name} ({why})" for name, why in table.left_out.items()))
    sys.stdout.flush()


def show_busy(tables: Sequence[Table]) -> None:
    """Each engine's time on a busy machine over that on an idle one."""
    for busy in (table for table in tables if table.case.busy):
        idle = next((table for table in tables if table.case == replace(busy.case, busy=False)), Table(busy.case))
        pairs = [(row, other) for row in busy.rows if (other := idle.row(row.engine))]
        print("  over idle:", ", ".join(f"{row.engine} {row.median_us / other.median_us:.2f}" for row, other in pairs))


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    cpus = Path("/proc/cpuinfo")
    names = [line for line in (cpus.read_text() if cpus.exists() else "").splitlines() if line.startswith("model name")]
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    packages = (
        "numpy numba torch torchao pytorch_optimizer torch_optimizer timm deepspeed bitsandbytes jax optax wgpu".split()
    )
    return {
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "command": " ".join(["python", "benches/step.py", *sys.argv[1:]]),
        "cpu": names[0].partition(": ")[2] if names else platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": {
            "lookstep": " ".join([ls.__version__, git.stdout.strip()]).strip(),
            "python": platform.python_version(),
            **{name: version(name) for name in packages if importlib.util.find_spec(name)},
        },
    }


def measured(args: argparse.Namespace) -> list[tuple[str, Case]]:
    """The cases that are asked for, in the order of threads: what a pool leaves behind is not in the way of one."""
    groups = args.tables or [
        name for name in TABLES if name not in ASKED_FOR and not (args.quick and name in ("many", "sweep"))
    ]
    groups += ["busy"] if args.busy and "busy" not in groups else []
    chosen = [(group, quick(case) if args.quick else case) for group in groups for case in TABLES[group]]
    return [
        (group, case)
        for group, case in dict.fromkeys(chosen)
        if (not args.rule or case.rule_name in args.rule)
        and (not args.size or case.size in args.size)
        and (not args.threads or case.threads == args.threads)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"default: all but busy, of {', '.join(TABLES)}")
    parser.add_argument("--rule", action="append", choices=RULES, help="only these; may be repeated")
    parser.add_argument("--size", action="append", help="only these; may be repeated")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="only these; may be repeated")
    parser.add_argument("--threads", type=int, help="only cases of so many threads")
    parser.add_argument("--rounds", type=int, help="default: 31, and fewer at large sizes")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--busy", action="store_true", help="also small steps while all CPUs are kept busy")
    parser.add_argument("--out", type=Path, help=f"file for results; default of a whole run: {RESULTS.name}")
    parser.add_argument(
        "--chart", type=Path, help=f"file for the chart of the sweep; default of a whole run: {CHART.name}"
    )
    args = parser.parse_args()
    if unknown := [name for name in args.tables if name not in TABLES]:
        parser.error(f"there is no table {unknown[0]!r}: choose from {', '.join(TABLES)}")
    whole = not any([args.tables, args.rule, args.size, args.engine, args.threads, args.quick])
    out, chart = args.out or (RESULTS if whole else None), args.chart or (CHART if whole else None)

    about = machine()
    print(about["date"], about["command"], sep="  ")
    print(f"{about['cpu']}, {about['cpus']} CPUs, {about['system']}")
    print(", ".join(f"{name} {number}" for name, number in about["versions"].items()))
    if (about["load_average"] or 0) > 0.5:
        print(f"load average {about['load_average']}: others may be at work here; with 2 threads, torch suffers most")
    if chart and not importlib.util.find_spec("matplotlib"):
        print("no chart: matplotlib is not installed")
        chart = None
    groups: dict[str, list[Table]] = {}
    results: dict[str, Any] = {"tables": {}}
    for group, case in measured(args):
        names = [name for name in case.engines if not args.engine or name in args.engine]
        with kept_busy() if case.busy else nullcontext():
            table = compare(case, names, args.rounds or (3 if args.quick else rounds_of(case)))
        before = groups.setdefault(group, [])
        if group == "every-rule":
            show_line(table, first=not before or before[-1].case.size != case.size)
        else:
            show(table)
        before.append(table)
        results = {**about, "tables": {name: [t.as_dict() for t in tables] for name, tables in groups.items()}}
        if out:  # also of a run that ends too soon
            text = json.dumps(results, indent=1, ensure_ascii=False)
            out.write_text(re.sub(r'{\s+"engine"[^}]*}', lambda row: " ".join(row[0].split()), text) + "\n")
    show_busy(groups.get("busy", []))
    if chart and results["tables"].get("sweep"):
        from chart import draw  # matplotlib

        draw(results, chart)
    print("".join(f"\n{path}" for path in (out, chart) if path))
    wrong = {name for tables in groups.values() for table in tables for name in table.wrong}
    return 1 if any(name.startswith("lookstep") for name in wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
