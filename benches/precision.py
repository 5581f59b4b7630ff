"""What parameters and state in fewer bits cost: the demo's network learns handwritten digits.

    python benches/precision.py            # 16 seeds, 40 epochs: a minute or two; needs pip install ".[dev]"
    python benches/precision.py --quick    # 3 seeds, 4 epochs: does everything run? Bold means nothing here

Prints a Markdown table, a row for a rate and what is kept in which type: validation accuracy, and loss on the training
set in thousandths of a nat, after the last epoch, by AdamW alone and inside Lookahead (`slow_weights`), each the mean ±
standard deviation of the seeds. From one seed, every row gets the same first weights, up to their rounding, and the
same order of digits. A cell is bold where it differs from float32's by more than three standard errors of the
differences, seed by seed.

Gradients are computed in float32 always: from bfloat16 parameters they are those at the parameters' own values. State
is the rule's moments; slow weights stay in float32. With master weights, too, the rounded ones are evaluated.
"""

import argparse
import platform
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from threadpoolctl import threadpool_limits

import lookstep as ls
from lookstep.digits import MLP, SLOW_STEP, SYNC_PERIOD, Array, Digits, Params, evaluate
from lookstep.hyper import Rule

RATES = {"right": 5e-3, "5 times that": 2.5e-2}


@dataclass(frozen=True)
class Kept:
    """What parameters and moments are kept in."""

    params: str
    state: str
    dtype: Any
    options: dict[str, Any]


WHOLE = Kept("float32", "float32", np.float32, {})
KEPT = [
    WHOLE,
    *(
        Kept("float32", f"{dtype}, {rounding}", np.float32, {"state_dtype": dtype, "rounding": rounding})
        for dtype in ("bfloat16", "int8")
        for rounding in ("stochastic", "nearest")
    ),
    Kept("bfloat16, master weights", "float32", ml_dtypes.bfloat16, {"master_weights": True}),
    Kept("bfloat16", "float32", ml_dtypes.bfloat16, {}),
]


def copied(target: Params, source: Params) -> Params:
    for name, array in target.items():
        array[...] = source[name]
    return target


def train(rule: Rule, kept: Kept, digits: Digits, seed: int, epochs: int) -> tuple[float, float]:
    """Validation accuracy in percent, and loss on the training set in thousandths, of one network."""
    rng = np.random.default_rng((0, seed))
    mlp = MLP(rng)
    params = {name: param.astype(kept.dtype) for name, param in mlp.params.items()}
    opt = ls.Optimizer(params, rule, seed=seed, **kept.options)
    for _ in range(epochs):
        for x, y in digits.epoch(rng):
            copied(mlp.params, params)
            opt.step(mlp.backward(x, y))
    with opt.slow_weights() as slow:
        copied(mlp.params, slow)
    loss, _ = evaluate(mlp.params, digits.x, digits.y)
    _, accuracy = evaluate(mlp.params, digits.x_val, digits.y_val)
    return 100 * accuracy, 1000 * loss


def cell(values: Array, whole: Array) -> str:
    """Mean ± standard deviation, bold where the seeds' differences from `whole` are more than chance."""
    change = values - whole
    clear = abs(change.mean()) > 3 * change.std(ddof=1) / np.sqrt(len(change))
    text = f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"
    return f"**{text}**" if clear else text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, help="default: 16")
    parser.add_argument("--epochs", type=int, help="default: 40")
    parser.add_argument("--quick", action="store_true", help="3 seeds, 4 epochs")
    args = parser.parse_args()
    seeds = args.seeds or (3 if args.quick else 16)
    epochs = args.epochs or (4 if args.quick else 40)
    digits = Digits.load(0)
    print(f"{seeds} seeds, {epochs} epochs; sync_period={SYNC_PERIOD}, slow_step={SLOW_STEP:g}; lookstep", end=" ")
    print(f"{ls.__version__}, NumPy {np.__version__}, {platform.system()} {platform.machine()}\n")
    print("| learning rate | parameters | state | AdamW, % | loss, 1/1000 | Lookahead(AdamW), % | loss, 1/1000 |")
    print("|---|---|---|---|---|---|---|")
    for role, lr in RATES.items():
        inner = ls.AdamW(lr)
        rules = inner, ls.Lookahead(inner, sync_period=SYNC_PERIOD, slow_step=SLOW_STEP)
        whole = None
        for kept in KEPT:
            runs = np.array([[train(rule, kept, digits, seed, epochs) for seed in range(seeds)] for rule in rules])
            columns = runs.transpose(0, 2, 1).reshape(4, seeds)
            whole = columns if whole is None else whole
            cells = map(cell, columns, whole)
            print("|", " | ".join([f"{lr:g}, {role}", kept.params, kept.state, *cells]), "|", flush=True)


if __name__ == "__main__":
    # Threads only cost time on arrays this small.
    with threadpool_limits(1):
        main()
