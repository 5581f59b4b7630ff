"""Runs as data: what a state is made of, what may come back, and how it lies in a safetensors file.

A file has a tensor for each array of each leaf, `m/encoder/w` for `m` of the leaf "encoder/w" and `params/encoder/w`
for the leaf itself; `steps`, `group` (0 where none matches, so that no regular expression of a file is ever run) and
`carry` of all leaves, in the order of their sorted paths, `carry` with one more row for the run; and all else as JSON
in the metadata. bfloat16 state is BF16; 8-bit state is U8, beside `m.scale`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from reprlib import repr as shortened
from types import ModuleType
from typing import Any, Self, TypeAlias

import numpy as np

from . import lookahead, rules, schedules
from .atomic import StrPath
from .header import HEADER_LIMIT
from .hyper import Checked, Rule
from .plain import decode, encode, parse
from .plan import Matched
from .safetensors import Reader, write

Array: TypeAlias = np.ndarray[Any, Any]
Kinds: TypeAlias = Sequence[Sequence[tuple[str, str, Sequence[int]]]]
"""What is kept for each leaf: names, dtypes and shapes."""

FORMAT = "lookstep"
VERSION = "1.0"
"""Files of a newer major version are refused; of a newer minor one, what is unknown is."""

_MOST_STEPS = 2**60
_LOST = 255
"""What 8-bit state has for a number that is not finite."""
_KEYS = ("format", "version", "rule", "groups", "options", "steps", "skipped", "cycles", "carry", "leaves")
_LOSS_SCALE = "loss_scale"
"""Where there is one: the scale, and steps since it last changed."""
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
_MOST_GROUPS = 4096
_NOT_FINITE = "holds an infinity or a NaN: pass allow_nonfinite=True to load it all the same"
_TENSORS_A_LEAF = 32
_BYTES_A_TENSOR = 512


def _classes(*modules: ModuleType) -> dict[str, type]:
    """What can be made, and not what it has in common."""
    bases = (Checked, Rule, rules.InnerRule, lookahead.Outer, schedules.Schedule)
    found = [value for module in modules for value in vars(module).values()]
    return {c.__name__: c for c in found if isinstance(c, type) and issubclass(c, Checked) and c not in bases}


_CLASSES = _classes(rules, lookahead, schedules)
"""What a stored rule may be made of."""


def state_of(
    rule: Rule,
    groups: Matched,
    options: Mapping[str, Any],
    counters: Mapping[str, Any],
    arrays: Mapping[str, Sequence[Array]],
    kinds: Kinds,
) -> dict[str, Any]:
    """A state dict, from what an engine gives."""
    leaves = {
        path: {"group": group, "steps": steps, "carry": list(carry), "params": own}
        | {name: array for (name, _, _), array in zip(kept, rest, strict=True)}
        for (path, (own, *rest)), kept, group, (steps, carry) in zip(
            arrays.items(), kinds, groups.of_leaf, counters["leaves"], strict=True
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
    } | ({_LOSS_SCALE: counters[_LOSS_SCALE]} if _LOSS_SCALE in counters else {})


def made_of(state: Any) -> tuple[Rule, list[tuple[str, dict[str, Any]]], dict[str, Any]]:
    """The rule, groups and options of a state.

    Raises:
        TypeError: if it is no dict.
        ValueError: if it is none of ours, or of a newer version.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"a state must be a dict, as state_dict() gives it, got {type(state).__name__}")
    _check_version(state)
    for key in _KEYS:
        if key not in state:
            raise ValueError(f"the state has no {key!r}")
    if unknown := [key for key in state if key not in (*_KEYS, _LOSS_SCALE)]:
        raise ValueError(f"the state has the unknown key {shortened(unknown[0])}")
    rule, groups, options = state["rule"], state["groups"], state["options"]
    if not isinstance(rule, Rule):
        raise ValueError(f"the state's rule must be a rule, got {type(rule).__name__}")
    if not isinstance(options, Mapping) or set(options) != set(_OPTIONS):
        raise ValueError(f"the state's options must be {', '.join(_OPTIONS)}")
    return rule, groups, dict(options)


def _check_version(state: Mapping[str, Any]) -> None:
    if state.get("format") != FORMAT or not isinstance(state.get("version"), str):
        raise ValueError(f"this is no state of {FORMAT}: it has format {state.get('format')!r}")
    major = state["version"].partition(".")[0]
    if not major.isdecimal() or int(major) > int(VERSION.partition(".")[0]):
        raise ValueError(f"the state is of version {state['version']}, but this lookstep reads up to {VERSION}")


def matched(groups: Any, found: Sequence[Any]) -> Matched:
    """Groups, with those that leaves were found in.

    Raises:
        TypeError: if the groups are no list.
        ValueError: if there is no such group.
    """
    if not isinstance(groups, Sequence) or isinstance(groups, str):
        raise TypeError(f"groups must be a list of pairs (pattern, dict), got {type(groups).__name__}")
    return Matched(groups, [_integer("group of a leaf", group, len(groups) + 1) for group in found])


def groups_of(state: Mapping[str, Any], paths: Sequence[str]) -> Matched:
    """The groups of a state of these leaves.

    Raises:
        TypeError, ValueError: as `matched`; also if a leaf is missing.
    """
    leaves = state["leaves"]
    if not isinstance(leaves, Mapping):
        raise ValueError("the state's leaves must be a dict")
    _same(leaves, paths, "the state's leaves", "leaf")
    for path in paths:
        if not isinstance(leaves[path], Mapping):
            raise ValueError(f"{_name(path)} must be a dict")
        if "group" not in leaves[path]:
            raise ValueError(f'{_name(path)} has no array "group"')
    return matched(state["groups"], [leaves[path]["group"] for path in paths])


def checked(
    state: Mapping[str, Any],
    paths: Sequence[str],
    leaves: Sequence[Array],
    kinds: Kinds,
    cycles: Sequence[tuple[int, bool]],
    allow_nonfinite: bool,
) -> tuple[list[list[Array]], dict[str, Any]]:
    """Copies of each leaf's arrays, in the order of `kinds`, and counters, all checked.

    Args:
        state: the state, of which `groups_of` has seen the leaves.
        paths: the leaves that it has.
        leaves: the parameters, by whose shapes and dtypes it must be.
        kinds: what must be kept for each leaf.
        cycles: of each level, how many steps a cycle has, and whether one more than its last may be waited for.
        allow_nonfinite: whether the rule's arrays and what it carries may hold an infinity or a NaN.

    Raises:
        ValueError: if anything does not fit, naming it.
    """
    found = state["leaves"]
    arrays = []
    counts = []
    for path, leaf, kept in zip(paths, leaves, kinds, strict=True):
        entry, name = found[path], _name(path)
        wanted = [("params", leaf.dtype.name, leaf.shape), *kept]
        _same(entry, ["group", "steps", "carry", *(kind[0] for kind in wanted)], name, "array")
        arrays.append(
            [_array(f"{key} of {name}", entry[key], dtype, shape, allow_nonfinite) for key, dtype, shape in wanted]
        )
        steps = _integer(f"steps of {name}", entry["steps"], _MOST_STEPS)
        counts.append((steps, _carry(name, entry["carry"], allow_nonfinite)))
    check_cycles(state["cycles"])
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
        "carry": _carry("the state", state["carry"], allow_nonfinite),
        "leaves": counts,
    }
    if _LOSS_SCALE in state:
        counters[_LOSS_SCALE] = _loss_scale(state[_LOSS_SCALE])
    return arrays, counters


def save(path: StrPath, state: Mapping[str, Any]) -> None:
    """Writes a state to a file.

    Raises:
        ValueError: if a hyper-parameter follows a plain function, which cannot be stored, or there is too much of it.
        OSError: if the file cannot be written; what was there before is intact.
    """
    _check_groups(len(state["groups"]))
    leaves = dict(sorted(state["leaves"].items()))
    tensors: dict[str, Any] = {
        "steps": np.array([leaf["steps"] for leaf in leaves.values()], np.int64),
        "carry": np.array([*(leaf["carry"] for leaf in leaves.values()), state["carry"]], np.float64),
        "group": np.array([leaf["group"] for leaf in leaves.values()], np.int64),
    }
    for leaf_path, leaf in leaves.items():
        for name, array in leaf.items():
            if isinstance(array, np.ndarray):
                is_bits = name != "params" and array.dtype == np.uint16
                tensors[f"{name}/{_escaped(leaf_path)}"] = ("BF16", array) if is_bits else array
    plain = {key: value for key, value in state.items() if key not in ("leaves", "carry")}
    plain["rule"] = encode(state["rule"], _CLASSES)
    plain["groups"] = [
        [pattern, {key: _encoded(f"groups[{index}]: {key}", value) for key, value in different.items()}]
        for index, (pattern, different) in enumerate(state["groups"])
    ]
    write(path, tensors, {FORMAT: json.dumps(plain, allow_nan=False)})


def _encoded(name: str, value: Any) -> Any:
    try:
        return encode(value, _CLASSES)
    except ValueError as error:
        raise ValueError(str(error).replace("the value", name, 1)) from None


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

    def made_of(self, paths: Sequence[str]) -> tuple[Rule, Matched, dict[str, Any]]:
        """The rule, groups and options, for leaves of these paths."""
        rule, groups, options = made_of(self._state)
        found = dict.fromkeys(name for name in self._file.tensors if name.startswith("params/"))
        _same(found, [f"params/{_escaped(path)}" for path in paths], "the checkpoint", "tensor")
        self._check("group", "I64", (len(paths),))
        of_leaf = dict(zip(sorted(paths), self._file.read("group").tolist(), strict=True))
        return rule, matched(groups, [of_leaf[path] for path in paths]), options

    def state(self, paths: Sequence[str], leaves: Sequence[Array], kinds: Kinds) -> dict[str, Any]:
        """The whole state of leaves like these; nothing is read before every name, dtype and shape fits."""
        count = len(paths)
        names: dict[str, tuple[str, tuple[int, ...]]] = {
            "steps": ("I64", (count,)),
            "carry": ("F64", (count + 1, 3)),
            "group": ("I64", (count,)),
        }
        for path, leaf, kept in zip(paths, leaves, kinds, strict=True):
            for name, dtype, shape in [("params", leaf.dtype.name, leaf.shape), *kept]:
                names[f"{name}/{_escaped(path)}"] = (_DTYPES[dtype], tuple(shape))
        _same(self._file.tensors, names, "the checkpoint", "tensor")
        for name, (dtype, shape) in names.items():
            self._check(name, dtype, shape)
        read = {name: self._file.read(name) for name in names}
        order = {path: index for index, path in enumerate(sorted(paths))}
        found: dict[str, Any] = {}
        for path, leaf, kept in zip(paths, leaves, kinds, strict=True):
            index = order[path]
            own = read[f"params/{_escaped(path)}"]
            found[path] = {
                "group": int(read["group"][index]),
                "steps": int(read["steps"][index]),
                "carry": read["carry"][index].tolist(),
                "params": own.view(leaf.dtype) if leaf.dtype.name == "bfloat16" else own,
            } | {name: read[f"{name}/{_escaped(path)}"] for name, _, _ in kept}
        return {**self._state, "carry": read["carry"][-1].tolist(), "leaves": found}

    def _check(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        found = self._file.tensors.get(name)
        if found is None:
            raise ValueError(f'the checkpoint has no tensor "{name}"')
        if (found.dtype, found.shape) != (dtype, shape):
            raise ValueError(
                f'the tensor "{name}" of the checkpoint is {found.dtype} of shape {found.shape}, '
                f"but {dtype} of shape {shape} is needed"
            )

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
    # A newer version may have what we do not know: that it is newer comes first.
    _check_version(plain)
    state = plain | {"carry": [], "leaves": {}}
    if "rule" in plain:
        state["rule"] = decode(plain["rule"], _CLASSES)
    groups = plain.get("groups")
    if not isinstance(groups, list):
        raise ValueError("the checkpoint's groups must be a list")
    _check_groups(len(groups))
    state["groups"] = []
    for group in groups:
        match group:
            case [str() as pattern, dict() as different]:
                state["groups"].append((pattern, {key: decode(value, _CLASSES) for key, value in different.items()}))
            case _:
                raise ValueError("the checkpoint's groups must be pairs of a pattern and a dict")
    check_cycles(plain.get("cycles"))
    return state


def _escaped(path: str) -> str:
    """A path as a tensor may be called: without control characters, and not out of any folder."""
    path = re.sub(r"[%\\\x00-\x1f\x7f-\x9f]", lambda found: f"%{ord(found[0]):02X}", path)
    return re.sub(r"(?<![^/])\.\.(?![^/])", "%2E%2E", path)


def _name(path: str) -> str:
    return f'the state of "{path}"' if path else "the state of params"


def check_cycles(cycles: Any) -> None:
    """Refuses what are no steps and syncs of levels of Lookahead."""
    if not isinstance(cycles, list) or any(not isinstance(cycle, list) or len(cycle) != 2 for cycle in cycles):
        raise ValueError("the state's cycles must be pairs of integers")


def _check_groups(count: int) -> None:
    if count > _MOST_GROUPS:
        raise ValueError(f"the checkpoint has {count} groups, and there may be at most {_MOST_GROUPS}")


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


def _loss_scale(value: Any) -> list[Any]:
    is_pair = isinstance(value, list) and len(value) == 2 and type(value[0]) is float
    if not is_pair or not 2.0**-30 <= value[0] <= 2.0**60:
        raise ValueError(f"loss_scale must be a number in [2**-30, 2**60] and an integer, got {shortened(value)}")
    return [value[0], _integer("steps of the loss scale", value[1], 2**32)]


def _carry(name: str, value: Any, allow_nonfinite: bool) -> list[float]:
    if not isinstance(value, list) or len(value) != 3 or any(type(x) is not float for x in value):
        raise ValueError(f"carry of {name} must be 3 numbers, got {shortened(value)}")
    if not allow_nonfinite and not np.isfinite(value).all():
        raise ValueError(f"carry of {name} {_NOT_FINITE}")
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
    elif dtype == "uint8":
        if not allow_nonfinite and (value == _LOST).any():
            raise ValueError(f"{name} {_NOT_FINITE}")
    elif key.partition(".")[0] not in ("params", "slow", "master", "gradient"):
        numbers = (value.astype(np.uint32) << 16).view(np.float32) if is_bits else value
        if not allow_nonfinite and not np.isfinite(numbers).all():
            raise ValueError(f"{name} {_NOT_FINITE}")
        # Squares and infinity norms, which rules call v and u everywhere.
        if key[0] in "vu" and (numbers < 0).any():
            raise ValueError(f"{name} holds a negative number, which cannot be: it is a mean of squares or a norm")
    return value.copy()
