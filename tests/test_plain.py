"""Rules become plain data and come back equal; nothing else can come out of it."""

import json
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lookstep as ls
from lookstep.plain import decode, encode, parse

RULES = {cls.__name__: cls for cls in (ls.SGD, ls.Adam, ls.AdamW, ls.RAdam, ls.Lookahead)}


@dataclass(frozen=True)
class Point:
    x: object = 0
    y: object = ()
    late: int = field(default=7, init=False)

    def __post_init__(self):
        if self.x == "overflow":
            math.exp(1000)


CLASSES = RULES | {"Point": Point}


def through_json(value):
    return decode(parse(json.dumps(encode(value, CLASSES), allow_nan=False)), CLASSES)


rates = st.floats(0, 1, exclude_max=True)
betas = st.tuples(rates, rates)
rules = st.one_of(
    st.builds(ls.SGD, rates, momentum=rates, dampening=rates, weight_decay=rates),
    st.builds(ls.SGD, rates, momentum=st.floats(0.1, 0.9), nesterov=st.just(True)),
    *(st.builds(cls, rates, betas=betas, eps=rates, amsgrad=st.booleans()) for cls in (ls.Adam, ls.AdamW)),
    st.builds(ls.RAdam, rates, betas=betas, eps=rates),
)
wrapped = st.builds(ls.Lookahead, rules, sync_period=st.integers(1, 2**63 - 1), slow_step=st.floats(0, 1))


@given(rules | wrapped)
def test_rules_come_back_equal(rule):
    assert through_json(rule) == rule
    assert repr(through_json(rule)) == repr(rule)


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(plain, lambda inner: st.lists(inner).map(tuple) | st.builds(Point, inner, inner), max_leaves=20)


@given(values)
def test_values_come_back_in_every_bit(value):
    assert repr(through_json(value)) == repr(value)


def test_how_it_looks():
    assert encode(ls.Lookahead(ls.Adam(lr=0.1)), RULES) == {
        "name": "Lookahead",
        "inner": {
            "name": "Adam",
            "lr": 0.1,
            "betas": [0.9, 0.999],
            "eps": 1e-8,
            "weight_decay": 0.0,
            "amsgrad": False,
            "decoupled_weight_decay": False,
            "maximize": False,
        },
        "sync_period": 5,
        "slow_step": 0.5,
        "inner_state": "keep",
        "outer": None,
    }
    assert encode(Point(-math.inf), CLASSES) == {"name": "Point", "x": {"float": "-inf"}, "y": []}


def test_numpy_s_double_is_a_float():
    assert type(encode(np.float64(0.1), {})) is float


def test_a_missing_field_gets_its_default():
    assert decode({"name": "Adam"}, RULES) == ls.Adam()


@dataclass(frozen=True)
class Warm:
    def __call__(self, step):
        return 0.1


class Impostor(ls.Adam):
    pass


Impostor.__name__ = "Adam"
NESTED = ()
for _ in range(40):
    NESTED = (NESTED,)

CANNOT_BE_STORED = {
    "function": (
        Point(Point(lambda step: 0.1)),
        "x follows a function, which cannot be stored: use a schedule of lookstep.schedules",
    ),
    "built-in": (Point(math.sin), "x follows a function"),
    "own schedule": (Point(y=(1, Warm())), "y[1] follows a Warm, which cannot be stored: use a schedule of"),
    "class": (Point(Point), "x is of type type, which cannot be stored"),
    "another class of the name": (Point(Impostor()), "x is of type Adam, which cannot be stored"),
    "list": (Point([1]), "x is of type list, which cannot be stored"),
    "array": (np.ones(2), "the value is of type ndarray"),
    "NumPy's single": (Point(np.float32(1)), "x is of type float32"),
    "nan": (Point(math.nan), "x is nan, which cannot be stored"),
    "deep": (Point(y=NESTED), "is nested too deeply to be stored"),
}


@pytest.mark.parametrize(("value", "text"), CANNOT_BE_STORED.values(), ids=CANNOT_BE_STORED.keys())
def test_what_cannot_be_stored(value, text):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        encode(value, CLASSES)
    assert text in str(caught.value)


LISTS = []
for _ in range(100_000):
    LISTS = [LISTS]

HOSTILE = {
    "unknown class": ({"name": "Popen", "args": "ls"}, "the value is of the unknown class 'Popen'; known: SGD, Adam"),
    "dunder": ({"name": "__import__"}, "unknown class '__import__'"),
    "unknown class within": ({"name": "Lookahead", "inner": {"name": "X"}}, "inner is of the unknown class 'X'"),
    "unknown field": ({"name": "Adam", "lrr": 1}, "Adam has no field 'lrr'; it has lr, betas"),
    "field that is not set": ({"name": "Point", "late": 1}, "Point has no field 'late'"),
    "field that is no name": ({"name": "Adam", 3: 1}, "Adam has no field 3"),
    "field missing": ({"name": "Lookahead"}, "the value is no Lookahead that can be: "),
    "no class": ({"lr": 0.1}, "the value must have the name of its class, got {'lr': 0.1}"),
    "empty": ({}, "the value must have the name of its class"),
    "class a number": ({"name": 3}, "must have the name of its class"),
    "number unknown": ({"name": "Point", "x": {"float": "nan"}}, "x must have the name of its class"),
    "number and more": ({"name": "Point", "x": {"float": "inf", "y": 1}}, "x must have the name of its class"),
    "lr a text": ({"name": "Adam", "lr": "0.1"}, "is no Adam that can be: lr must be a real number, got str"),
    "lr negative": ({"name": "Adam", "lr": -1}, "lr must be finite and >= 0, got -1"),
    "lr null": ({"name": "Adam", "lr": None}, "lr must be a real number"),
    "lr infinite": ({"name": "Adam", "lr": {"float": "inf"}}, "lr must be finite"),
    "betas of lists": ({"name": "Adam", "betas": [[1, 2], [3]]}, "is no Adam that can be"),
    "betas of rules": ({"name": "Adam", "betas": [{"name": "SGD"}, 0]}, "betas[0] must be a real number, got SGD"),
    "inner a number": ({"name": "Lookahead", "inner": 3}, "inner must be a rule such as"),
    "overflow": ({"name": "Point", "x": "overflow"}, "the value is no Point that can be: math range error"),
    "raw nan": ({"name": "Point", "x": math.nan}, "x must be plain data, got float nan"),
    "a tuple": ((1, 2), "the value must be plain data, got tuple (1, 2)"),
    "bytes": ({"name": "Point", "y": [b"x"]}, "y[0] must be plain data, got bytes"),
    "long": ({"name": "x" * 10**6}, "unknown class 'xxxx"),
    "deep": (LISTS, "is nested too deeply"),
}


@pytest.mark.parametrize(("data", "text"), HOSTILE.values(), ids=HOSTILE.keys())
def test_what_cannot_be_made(data, text):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        decode(data, CLASSES)
    assert caught.type is ValueError
    assert text in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "the text is not valid JSON"),
        ("{", "the text is not valid JSON"),
        ("{} {}", "the text is not valid JSON: Extra data"),
        ('{"lr": 1, "lr": 2}', "the text has the key 'lr' twice"),
        ("NaN", "the text has 'NaN', which is no number"),
        ("[-Infinity]", "the text has '-Infinity', which is no number"),
        ("1e999", "the text has '1e999', which is no number"),
        ("1" * 5000, "the text "),
        ("[" * 100_000, "the text is nested too deeply"),
        ('{"a":' * 100_000, "the text is nested too deeply"),
    ],
)
def test_text_that_is_refused(text, error):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse(text)
    assert caught.type is ValueError
    assert str(caught.value).startswith(error)
