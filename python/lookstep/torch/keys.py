"""A leaf's state under torch's keys, and back.

What torch has no key for keeps the name that it has here: `slow` and what else Lookahead keeps, `master`, and the
state of rules that torch has not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .. import rules
from .tensors import Array, as_tensor, state_array

_ADAM = {"m": "exp_avg", "v": "exp_avg_sq", "v_max": "max_exp_avg_sq"}
_KEYS: dict[type, dict[str, str]] = {
    rules.SGD: {"m": "momentum_buffer"},
    rules.Adam: _ADAM,
    rules.AdamW: _ADAM,
    rules.RAdam: _ADAM,
    rules.NAdam: _ADAM,
    rules.Adamax: {"m": "exp_avg", "u": "exp_inf"},
    rules.Adagrad: {"v": "sum"},
    rules.Adadelta: {"v": "square_avg", "u": "acc_delta"},
    rules.RMSprop: {"v": "square_avg", "b": "momentum_buffer", "m": "grad_avg"},
    rules.Rprop: {"s": "prev", "u": "step_size"},
    rules.ASGD: {"average": "ax"},
}
"""torch's keys, of the rules that it has."""

_EXACT = 2.0**24
"""float32 counts no further by ones."""

Kinds = Sequence[tuple[str, str, Sequence[int]]]


def _key(rule: rules.InnerRule, name: str) -> str:
    """`m.before`, say, is `exp_avg.before`."""
    first, dot, rest = name.partition(".")
    return _KEYS.get(type(rule), {}).get(first, first) + dot + rest


def to_torch(
    rule: rules.InnerRule, kinds: Kinds, rows: Sequence[Array], steps: int, carry: Sequence[float]
) -> dict[str, torch.Tensor]:
    """A leaf's state for torch: tensors over the memory of `rows`, and its counters."""
    count = torch.tensor(float(steps), dtype=torch.float32 if steps < _EXACT else torch.float64)
    state = {"step": count}
    match rule:
        case rules.NAdam():
            state["mu_product"] = torch.tensor(carry[0], dtype=torch.float64)
        case rules.ASGD():
            eta = rule._hyper()["lr"] / (1 + rule.lambd * rule._hyper()["lr"] * steps) ** rule.alpha
            state["eta"] = torch.tensor(eta, dtype=torch.float64)
            state["mu"] = torch.tensor(1 / max(1.0, steps - rule.t0), dtype=torch.float64)
        case _ if type(rule) not in _KEYS:
            state["carry"] = torch.tensor(carry, dtype=torch.float64)
    for (name, dtype, _), row in zip(kinds, rows, strict=True):
        state[_key(rule, name)] = as_tensor(row, dtype)
    return state


def from_torch(
    label: str,
    rule: rules.InnerRule,
    kinds: Kinds,
    needed: Sequence[str],
    p: Array,
    state: Mapping[str, Any],
) -> dict[str, Any]:
    """A leaf as `lookstep.Optimizer.state_dict` has it.

    Args:
        label: what errors call the leaf.
        rule: the rule that steps it.
        kinds: what is kept for it.
        needed: of what is kept, what a state must have; copies of the parameter begin as it is, all else as zeros.
        p: the parameter.
        state: under torch's keys; empty for a leaf that was never stepped.

    Raises:
        ValueError: if something is missing or unknown.
    """
    leaf: dict[str, Any] = {"steps": 0, "carry": [0.0, 0.0, 0.0]}
    if not isinstance(state, Mapping):
        raise ValueError(f"the state of {label} must be a dict, got {type(state).__name__}")
    is_fresh = not state or any(value is None for value in state.values())
    if not is_fresh:
        if "step" not in state and not isinstance(rule, rules.SGD):
            raise ValueError(f'the state of {label} has no "step"')
        leaf["steps"] = _count(label, state.get("step", 1))
        leaf["carry"] = _carry(label, rule, state)
    known = {"step", "carry", "mu_product", "eta", "mu"}
    for name, dtype, shape in kinds:
        key = _key(rule, name)
        known.add(key)
        if key in state and not is_fresh:
            if not isinstance(state[key], torch.Tensor):
                raise ValueError(f'"{key}" of {label} must be a tensor, got {type(state[key]).__name__}')
            array = state_array(state[key], dtype)
            is_sign = isinstance(rule, rules.Rprop) and name == "s" and array.dtype.kind == "f"
            leaf[name] = np.asarray(np.sign(array)) if is_sign else array  # torch keeps the whole gradient.
        elif name in needed and not is_fresh:
            raise ValueError(f'the state of {label} has no "{key}"')
        elif name.partition(".")[0] in ("slow", "master"):
            leaf[name] = p.astype(dtype)
        else:
            leaf[name] = np.zeros(shape, "uint16" if dtype == "bfloat16" else dtype)
    if unknown := [key for key in state if key not in known]:
        raise ValueError(f'the state of {label} has the unknown key "{unknown[0]}": it is of another rule')
    return leaf


def _count(label: str, value: Any) -> int:
    number = float(value)
    if not (number >= 0 and number.is_integer()):
        raise ValueError(f"step of {label} must be an integer >= 0, got {value}")
    return int(number)


def _carry(label: str, rule: rules.InnerRule, state: Mapping[str, Any]) -> list[float]:
    key = "mu_product" if isinstance(rule, rules.NAdam) else "carry"
    if key == "carry" and type(rule) in _KEYS:
        return [0.0, 0.0, 0.0]
    if key not in state:
        raise ValueError(f'the state of {label} has no "{key}"')
    return [*map(float, torch.as_tensor(state[key]).reshape(-1)), 0.0, 0.0][:3]
