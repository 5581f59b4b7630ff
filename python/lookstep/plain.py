"""Frozen dataclasses as plain data that JSON can hold, and back.

A dataclass is an object of its class's name and its fields; a tuple is a list. Whoever decodes says which classes may
come out: nothing else is ever made or called.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from reprlib import repr as shortened
from typing import Any, NoReturn, TypeAlias

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
"""What JSON can hold."""

_DEEPEST = 32


def encode(value: Any, classes: Mapping[str, type]) -> Plain:
    """Plain data from which `decode` makes an equal value.

    Args:
        value: a frozen dataclass of one of the classes, or a tuple, number, string or `None`; so too within.
        classes: the classes that may be stored, by their names.

    Raises:
        ValueError: if there is anything else in it, naming the field.

    Example:
        >>> import lookstep as ls
        >>> encode(ls.Lookahead(ls.SGD(lr=0.1)), {"Lookahead": ls.Lookahead, "SGD": ls.SGD})["inner"]["lr"]
        0.1
    """
    return _encode("the value", value, classes, 0)


def decode(plain: Any, classes: Mapping[str, type]) -> Any:
    """The value that `encode` made `plain` from. A field that is missing gets its default.

    Args:
        plain: plain data, of whatever origin.
        classes: the classes that may be made, by their names.

    Raises:
        ValueError: if `plain` has an unknown class or field, a value that its class refuses, or is nested too deeply.

    Example:
        >>> import lookstep as ls
        >>> decode({"name": "RAdam", "lr": 0.1, "betas": [0.9, 0.99]}, {"RAdam": ls.RAdam}).betas
        (0.9, 0.99)
    """
    return _decode("the value", plain, classes, 0)


def parse(text: str) -> Any:
    """Plain data from JSON, in which no key is there twice and every number is finite.

    Raises:
        ValueError: if the text is anything else.

    Example:
        >>> parse('{"lr": 0.1, "betas": [0.9, 0.999]}')
        {'lr': 0.1, 'betas': [0.9, 0.999]}
    """
    try:
        return _JSON.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the text {reason(error)}") from None


def _encode(name: str, value: Any, classes: Mapping[str, type], depth: int) -> Plain:
    if depth > _DEEPEST:
        raise ValueError(f"{name} is nested too deeply to be stored")
    if value is None or type(value) in (bool, int, str):
        plain: Plain = value
        return plain
    if isinstance(value, float):
        number = float(value)  # NumPy's double is a float too, but JSON need not know.
        if math.isnan(number):
            raise ValueError(f"{name} is nan, which cannot be stored")
        return number if math.isfinite(number) else {"float": str(number)}
    if type(value) is tuple:
        return [_encode(f"{name}[{i}]", item, classes, depth + 1) for i, item in enumerate(value)]
    if is_dataclass(value) and classes.get(type(value).__name__) is type(value):
        entries = {f.name: _encode(f.name, getattr(value, f.name), classes, depth + 1) for f in fields(value) if f.init}
        return {"name": type(value).__name__, **entries}
    if callable(value) and not isinstance(value, type):
        what = type(value).__name__ if is_dataclass(value) else "function"
        raise ValueError(f"{name} follows a {what}, which cannot be stored: use a schedule of lookstep.schedules")
    raise ValueError(f"{name} is of type {type(value).__name__}, which cannot be stored")


def _decode(name: str, plain: Any, classes: Mapping[str, type], depth: int) -> Any:
    if depth > _DEEPEST:
        raise ValueError(f"{name} is nested too deeply")
    match plain:
        case None | bool() | int() | str():
            return plain
        case float() if math.isfinite(plain):
            return plain
        case list():
            return tuple(_decode(f"{name}[{i}]", item, classes, depth + 1) for i, item in enumerate(plain))
        case {"float": "inf" | "-inf" as number} if len(plain) == 1:
            return float(number)
        case {"name": str(kind), **entries}:
            return _make(name, kind, entries, classes, depth)
        case {}:
            raise ValueError(f"{name} must have the name of its class, got {shortened(plain)}")
    raise ValueError(f"{name} must be plain data, got {type(plain).__name__} {shortened(plain)}")


def _make(name: str, kind: str, entries: dict[Any, Any], classes: Mapping[str, type], depth: int) -> Any:
    cls = classes.get(kind)
    if cls is None:
        raise ValueError(f"{name} is of the unknown class {shortened(kind)}; known: {', '.join(classes)}")
    known = [field.name for field in fields(cls) if field.init]
    for key in entries:
        if key not in known:
            raise ValueError(f"{kind} has no field {shortened(key)}; it has {', '.join(known)}")
    values = {key: _decode(key, entry, classes, depth + 1) for key, entry in entries.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{name} is no {kind} that can be: {error}") from error


def reason(error: Exception) -> str:
    """What is wrong with the JSON that a decoder refused, to go on from what it is of."""
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    return f"is not valid JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error)


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"has the key {shortened(twice)} twice")
    return found


def no_number(text: str) -> NoReturn:
    """Refuses a number that has no place here."""
    raise ValueError(f"has {shortened(text)}, which is no number that can be")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else no_number(text)


_JSON = json.JSONDecoder(object_pairs_hook=distinct, parse_float=_finite, parse_constant=no_number)
