"""The chart of the sweep: memory moved a second against the number of parameters.

python benches/chart.py [results.json] [chart.svg]    # draws it again, from the file that step.py has written
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

CURVES: dict[str, tuple[str, dict[str, Any]]] = {
    "limit": ("memory limit", {"color": "black", "linestyle": (0, (4, 2)), "linewidth": 1.2}),
    "lookstep": ("lookstep", {"color": "#0072B2", "linewidth": 2.6, "marker": "o"}),
    "lookstep-lookahead": ("lookstep, Lookahead", {"color": "#56B4E9", "linewidth": 2.2, "marker": "o"}),
    "numba": ("numba", {"color": "#009E73", "marker": "^"}),
    "torch-fused": ("torch fused", {"color": "#D55E00", "marker": "s"}),
    "torch-foreach": ("torch foreach", {"color": "#E69F00", "marker": "D"}),
    "optax": ("optax, jitted", {"color": "#CC79A7", "marker": "v"}),
    "numpy": ("NumPy, out=", {"color": "#777777", "marker": "x"}),
}
"""What a curve is called, and how it is drawn; colours of Okabe and Ito, which colour-blind people can tell apart."""


def spread(wanted: list[float], apart: float) -> list[float]:
    """Heights as near to those wanted as labels of some height allow, in the same order."""
    order = np.argsort(wanted)
    rest = np.asarray(wanted, float)[order] - apart * np.arange(len(wanted))
    # The nearest sequence that never falls: pools of neighbours share their mean.
    pools: list[list[float]] = []
    for height in rest:
        pools.append([height])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    placed = np.concatenate([[np.mean(pool)] * len(pool) for pool in pools]) + apart * np.arange(len(wanted))
    heights = np.empty(len(wanted))
    heights[order] = np.maximum(placed, placed + max(0.0, -placed.min()))
    return heights.tolist()


def panel(ax: Axes, tables: list[dict[str, Any]], top: float) -> None:
    ends = {}
    for engine, (label, look) in CURVES.items():
        points = [(t["elements"], row["gb_per_s"]) for t in tables for row in t["rows"] if row["engine"] == engine]
        if points:
            x, y = zip(*sorted(points), strict=True)
            ax.plot(x, y, **{"linewidth": 1.4, "markersize": 4, **look})
            ends[label] = x[-1], y[-1], look["color"]
    sizes = [t["elements"] for t in tables]
    ax.set(xscale="log", xlim=(min(sizes) * 0.8, max(sizes) * 1.3), ylim=(0, top), xlabel="parameters")
    heights = spread([y for _, y, _ in ends.values()], apart=top * 0.047)
    for (label, (x, y, color)), height in zip(ends.items(), heights, strict=True):
        ax.annotate(
            label,
            (x, y),
            (1.06, height),
            textcoords=("axes fraction", "data"),
            color=color,
            va="center",
            fontsize=9,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.6,
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )
    threads = tables[0]["threads"]
    ax.set_title(f"{threads} thread{'s' * (threads > 1)}", loc="left", fontsize=10)
    ax.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws what `step.py` has found in its sweep, a panel for each number of threads."""
    sweep = results["tables"].get("sweep") or sys.exit("there is no sweep in these results")
    panels = [[t for t in sweep if t["threads"] == count] for count in sorted({t["threads"] for t in sweep})]
    top = 1.06 * max(row["gb_per_s"] for t in sweep for row in t["rows"])
    # Text as outlines: it looks the same wherever the file is shown. No date and no chance in the file itself.
    with mpl.rc_context({"svg.hashsalt": "lookstep", "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=(4.9 * len(panels), 4.1), layout="constrained", facecolor="white")
        for ax, tables in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            panel(ax, tables, top)
        figure.axes[0].set_ylabel("GB/s that an AdamW step in float32 moves")
        about = f"{results['cpu']}, {results['cpus']} CPUs, {results['date'].split()[0]}"
        figure.supxlabel(about, fontsize=8, color="#555555", x=0.99, ha="right")
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    here = Path(__file__).parent
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else here / "results.json"
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else here.parent / "docs" / "speed.svg"
    draw(json.loads(source.read_text()), target)
    print(target)
