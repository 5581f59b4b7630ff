"""Runs as data: what a state is made of, what may come back, and how it lies in a safetensors file.

A file has a tensor for each array of each leaf, `m/encoder/w` for `m` of the leaf "encoder/w" and `params/encoder/w`
for the leaf itself; `steps` and `carry` of all leaves, in the order of their sorted paths; and all else as JSON in the
metadata. bfloat16 state is BF16; 8-bit state is U8, in the order in which the leaf's axes are walked, beside `m.scale`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Self, TypeAlias

import numpy as np

from . import lookahead, rules, schedules
from .atomic import StrPath
from .header import HEADER_LIMIT
from .hyper import Checked, Rule
from .plain import decode, encode, parse
from .safetensors import Reader, write

Array: TypeAlias = np.ndarray[Any, Any]
Kinds: TypeAlias = Sequence[Sequence[tuple[str, str, Sequence[int]]]]
"""What is kept for each leaf: names, dtypes and shapes."""

FORMAT = "lookstep"
VERSION = "1.0"
"""Files of a newer major version are refused; of a newer minor one, what is unknown is."""

_MOST_STEPS = 2**60
_OPTIONS = (
    "max_grad_norm",
    "max_grad_value",
    "nonfinite",
    "centralize",
    "master_weights",
    "state_dtype",
    "rounding",
    "seed",
)
_TENSORS_A_LEAF = 32
_BYTES_A_TENSOR = 512


def _classes(*modules: ModuleType) -> dict[str, type]:
    found = [value for module in modules for value in vars(module).values()]
    return {c.__name__: c for c in found if isinstance(c, type) and issubclass(c, Checked)}


_CLASSES = _classes(rules, lookahead, schedules)
"""What a stored rule may be made of."""


def state_of(
    rule: Rule,
    groups: Any,
    options: Mapping[str, Any],
    counters: Mapping[str, Any],
    arrays: Mapping[str, Sequence[Array]],
    kinds: Kinds,
    orders: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """A state dict, from what an engine gives."""
    leaves = {
        path: {"steps": steps, "carry": list(carry), "order": list(order), "params": own}
        | {name: array for (name, _, _), array in zip(kept, rest, strict=True)}
        for (path, (own, *rest)), kept, order, (steps, carry) in zip(
            arrays.items(), kinds, orders, counters["leaves"], strict=True
        )
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "rule": rule,
        "groups": [(pattern, dict(different)) for pattern, different in groups],
        "options": dict(options),
        "steps": counters["steps"],
        "skipped": counters["skipped"],
        "cycles": [list(cycle) for cycle in counters["cycles"]],
        "carry": list(counters["carry"]),
        "leaves": leaves,
    }


def made_of(state: Any) -> tuple[Rule, list[tuple[str, dict[str, Any]]], dict[str, Any]]:
    """The rule, groups and options of a state.

    Raises:
        TypeError: if it is no dict.
        ValueError: if it is none of ours, or of a newer version.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"a state must be a dict, as state_dict() gives it, got {type(state).__name__}")
    if state.get("format") != FORMAT or not isinstance(state.get("version"), str):
        raise ValueError(f"this is no state of {FORMAT}: it has format {state.get('format')!r}")
    major = state["version"].partition(".")[0]
    if not major.isdecimal() or int(major) > int(VERSION.partition(".")[0]):
        raise ValueError(f"the state is of version {state['version']}, but this lookstep reads up to {VERSION}")
    for key in ("rule", "groups", "options", "steps", "skipped", "cycles", "carry", "leaves"):
        if key not in state:
            raise ValueError(f"the state has no {key!r}")
    rule, groups, options = state["rule"], state["groups"], state["options"]
    if not isinstance(rule, Rule):
        raise ValueError(f"the state's rule must be a rule, got {type(rule).__name__}")
    if not isinstance(options, Mapping) or set(options) != set(_OPTIONS):
        raise ValueError(f"the state's options must be {', '.join(_OPTIONS)}")
    return rule, groups, dict(options)


def checked(
    state: Mapping[str, Any],
    paths: Sequence[str],
    leaves: Sequence[Array],
    kinds: Kinds,
    orders: Sequence[Sequence[int]],
    cycles: Sequence[tuple[int, bool]],
    allow_nonfinite: bool,
) -> tuple[list[list[Array]], dict[str, Any]]:
    """Copies of each leaf's arrays, in the order of `kinds`, and counters, all checked.

    Args:
        state: the state.
        paths: the leaves that it must have.
        leaves: the parameters, by whose shapes and dtypes it must be.
        kinds: what must be kept for each leaf.
        orders: the order in which each leaf's axes are walked.
        cycles: of each level, how many steps a cycle has, and whether one more than its last may be waited for.
        allow_nonfinite: whether the rule's arrays may hold an infinity or a NaN.

    Raises:
        ValueError: if anything does not fit, naming it.
    """
    found = state["leaves"]
    if not isinstance(found, Mapping):
        raise ValueError("the state's leaves must be a dict")
    _same(found, paths, "the state's leaves", "leaf")
    arrays = []
    counts = []
    for path, leaf, kept, order in zip(paths, leaves, kinds, orders, strict=True):
        entry, name = found[path], f'the state of "{path}"' if path else "the state of params"
        if not isinstance(entry, Mapping):
            raise ValueError(f"{name} must be a dict")
        wanted = [("params", leaf.dtype.name, leaf.shape), *kept]
        _same(entry, ["steps", "carry", "order", *(kind[0] for kind in wanted)], name, "array")
        if any(dtype == "uint8" for _, dtype, _ in kept) and list(entry["order"]) != list(order):
            raise ValueError(f"{name} is 8-bit state of another memory order: pass a parameter whose axes lie as then")
        arrays.append(
            [_array(f"{key} of {name}", entry[key], dtype, shape, allow_nonfinite) for key, dtype, shape in wanted]
        )
        counts.append((_integer(f"steps of {name}", entry["steps"], _MOST_STEPS), _carry(name, entry["carry"])))
    if len(state["cycles"]) != len(cycles):
        raise ValueError(f"the state has {len(state['cycles'])} levels of Lookahead, but the rule has {len(cycles)}")
    pairs = []
    for (done, syncs), (period, waits) in zip(state["cycles"], cycles, strict=True):
        done = _integer("steps of the cycle", done, period + waits)
        pairs.append((done, _integer("syncs", syncs, _MOST_STEPS)))
    counters = {
        "steps": _integer("steps", state["steps"], _MOST_STEPS),
        "skipped": _integer("skipped", state["skipped"], _MOST_STEPS),
        "cycles": pairs,
        "carry": _carry("the state", state["carry"]),
        "leaves": counts,
    }
    return arrays, counters


def save(path: StrPath, state: Mapping[str, Any]) -> None:
    """Writes a state to a file.

    Raises:
        ValueError: if a hyper-parameter follows a plain function, which cannot be stored.
        OSError: if the file cannot be written; what was there before is intact.
    """
    leaves = dict(sorted(state["leaves"].items()))
    tensors: dict[str, Any] = {
        "steps": np.array([leaf["steps"] for leaf in leaves.values()], np.int64),
        "carry": np.array([leaf["carry"] for leaf in leaves.values()], np.float64),
    }
    for leaf_path, leaf in leaves.items():
        for name, array in leaf.items():
            if isinstance(array, np.ndarray):
                is_bits = name != "params" and array.dtype == np.uint16
                tensors[f"{name}/{_escaped(leaf_path)}"] = ("BF16", array) if is_bits else array
    plain = {key: value for key, value in state.items() if key not in ("leaves", "rule", "groups")}
    plain["rule"] = encode(state["rule"], _CLASSES)
    plain["groups"] = [
        [pattern, {key: encode(value, _CLASSES) for key, value in different.items()}]
        for pattern, different in state["groups"]
    ]
    if state["options"]["state_dtype"] == "int8":
        plain["orders"] = [leaf["order"] for leaf in leaves.values()]
    write(path, tensors, {FORMAT: json.dumps(plain, allow_nan=False)})


class opened:
    """A saved run that is open for reading: first what it is made of, then, once that is known, its arrays.

    Args:
        path: the file.
        leaves: how many leaves it may have.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is damaged, of a newer version, or none of ours.
    """

    def __init__(self, path: StrPath, leaves: int) -> None:
        """Reads and checks the header."""
        tensors = _TENSORS_A_LEAF * leaves
        self._file = Reader(path, tensors=tensors, limit=max(HEADER_LIMIT, _BYTES_A_TENSOR * tensors))
        try:
            if FORMAT not in self._file.metadata:
                raise ValueError(f"this is no checkpoint of {FORMAT}: its metadata has no {FORMAT!r}")
            self._state = _decoded(parse(self._file.metadata[FORMAT]))
        except BaseException:
            self._file.close()
            raise

    def made_of(self) -> tuple[Rule, list[tuple[str, dict[str, Any]]], dict[str, Any]]:
        """The rule, groups and options."""
        return made_of(self._state)

    def state(self, paths: Sequence[str], leaves: Sequence[Array], kinds: Kinds) -> dict[str, Any]:
        """The whole state of leaves like these; nothing is read before every name, dtype and shape fits."""
        names = {"steps": ("I64", (len(paths),)), "carry": ("F64", (len(paths), 3))}
        for path, leaf, kept in zip(paths, leaves, kinds, strict=True):
            for name, dtype, shape in [("params", leaf.dtype.name, leaf.shape), *kept]:
                names[f"{name}/{_escaped(path)}"] = (_DTYPES[dtype], tuple(shape))
        tensors = self._file.tensors
        _same(tensors, names, "the checkpoint", "tensor")
        for name, (dtype, shape) in names.items():
            if (tensors[name].dtype, tensors[name].shape) != (dtype, shape):
                raise ValueError(
                    f'the tensor "{name}" of the checkpoint is {tensors[name].dtype} of shape {tensors[name].shape}, '
                    f"but {dtype} of shape {shape} is needed"
                )
        read = {name: self._file.read(name) for name in names}
        order = {path: index for index, path in enumerate(sorted(paths))}
        orders = self._state.get("orders")
        found: dict[str, Any] = {}
        for path, leaf, kept in zip(paths, leaves, kinds, strict=True):
            index = order[path]
            own = read[f"params/{_escaped(path)}"]
            found[path] = {
                "steps": int(read["steps"][index]),
                "carry": read["carry"][index].tolist(),
                "order": orders[index] if isinstance(orders, list) and index < len(orders) else [],
                "params": own.view(leaf.dtype) if leaf.dtype.name == "bfloat16" else own,
            } | {name: read[f"{name}/{_escaped(path)}"] for name, _, _ in kept}
        return {**self._state, "leaves": found}

    def __enter__(self) -> Self:
        """Returns the reader."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file."""
        self._file.close()


_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint8": "U8",
}


def _decoded(plain: Any) -> dict[str, Any]:
    """The metadata of a file, with the rule and groups as they were."""
    if not isinstance(plain, dict):
        raise ValueError("the checkpoint's metadata must be a JSON object")
    # A newer version may have a rule that we do not know: that it is newer comes first.
    made_of(
        {**dict.fromkeys(("rule", "groups", "options", "steps", "skipped", "cycles", "carry", "leaves")), **plain}
        | {"rule": Rule(), "options": dict.fromkeys(_OPTIONS)}
    )
    state: dict[str, Any] = {"leaves": {}, **plain}
    if "rule" in plain:
        state["rule"] = decode(plain["rule"], _CLASSES)
    groups = plain.get("groups")
    if not isinstance(groups, list):
        raise ValueError("the checkpoint's groups must be a list")
    state["groups"] = []
    for group in groups:
        match group:
            case [str() as pattern, dict() as different]:
                state["groups"].append((pattern, {key: decode(value, _CLASSES) for key, value in different.items()}))
            case _:
                raise ValueError("the checkpoint's groups must be pairs of a pattern and a dict")
    cycles = plain.get("cycles")
    if not isinstance(cycles, list) or any(not isinstance(cycle, list) or len(cycle) != 2 for cycle in cycles):
        raise ValueError("the checkpoint's cycles must be pairs of integers")
    return state


def _escaped(path: str) -> str:
    """A path as a tensor may be called: without control characters, and not out of any folder."""
    path = re.sub(r"[%\\\x00-\x1f\x7f-\x9f]", lambda found: f"%{ord(found[0]):02X}", path)
    return re.sub(r"(?<![^/])\.\.(?![^/])", "%2E%2E", path)


def _same(found: Mapping[str, Any], wanted: Any, name: str, kind: str) -> None:
    if missing := [key for key in wanted if key not in found]:
        raise ValueError(f'{name} has no {kind} "{missing[0]}"')
    known = set(wanted)
    if unknown := [key for key in found if key not in known]:
        raise ValueError(f'{name} has the unknown {kind} "{str(unknown[0])[:100]}"')


def _integer(name: str, value: Any, end: int) -> int:
    if type(value) is not int or not 0 <= value < end:
        raise ValueError(f"{name} must be an integer in [0, {end}), got {str(value)[:50]}")
    return value


def _carry(name: str, value: Any) -> list[float]:
    if not isinstance(value, list) or len(value) != 3 or not all(type(x) is float and np.isfinite(x) for x in value):
        raise ValueError(f"carry of {name} must be 3 finite numbers, got {str(value)[:50]}")
    return value


def _array(name: str, value: Any, dtype: str, shape: Sequence[int], allow_nonfinite: bool) -> Array:
    """A copy of an array, of the dtype and shape that are needed."""
    if type(value) is not np.ndarray:
        raise ValueError(f"{name} must be a NumPy array, got {type(value).__name__}")
    is_bits = dtype == "bfloat16" and value.dtype == np.uint16
    if not (is_bits or value.dtype.name == dtype) or value.shape != tuple(shape) or not value.dtype.isnative:
        raise ValueError(
            f"{name} is {value.dtype.name} of shape {value.shape}, but {dtype} of shape {tuple(shape)} is needed"
        )
    key = name.partition(" ")[0]
    if key.endswith(".scale"):
        if not (np.isfinite(value).all() and (value >= 0).all()):
            raise ValueError(f"{name} must be finite and >= 0")
    elif dtype != "uint8" and key.partition(".")[0] not in ("params", "slow", "master", "gradient"):
        numbers = (value.astype(np.uint32) << 16).view(np.float32) if is_bits else value
        if not allow_nonfinite and not np.isfinite(numbers).all():
            raise ValueError(f"{name} holds an infinity or a NaN: pass allow_nonfinite=True to load it all the same")
        # Squares and infinity norms, which rules call v and u everywhere.
        if key[0] in "vu" and (numbers < 0).any():
            raise ValueError(f"{name} holds a negative number, which cannot be: it is a mean of squares or a norm")
    return value.copy()
