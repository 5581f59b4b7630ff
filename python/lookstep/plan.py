"""A rule and groups, taken apart for the engine."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from functools import cached_property
from reprlib import repr as shortened
from typing import Any, NamedTuple, Self, TypeAlias

from .hyper import Rule, at_step, flag, is_scheduled
from .lookahead import Lookahead, Nesterov, OptimalSlowStep
from .rules import InnerRule

Groups: TypeAlias = Sequence[tuple[str, Mapping[str, Any]]]
"""What is different for some leaves: patterns of paths, and hyper-parameters."""


class Matched(tuple[tuple[str, Mapping[str, Any]], ...]):
    """Groups that say themselves which leaves are in them: of each leaf 0, or one more than its group's index."""

    of_leaf: list[int]

    def __new__(cls, groups: Any, of_leaf: Sequence[int]) -> Self:
        """Puts both together."""
        self = super().__new__(cls, groups)
        self.of_leaf = of_leaf if isinstance(of_leaf, list) else list(of_leaf)
        return self


class Group(NamedTuple):
    """Leaves that share hyper-parameters."""

    inner: InnerRule
    slow_step: Any
    frozen: bool


class Plan:
    """A rule and groups, taken apart for the engine: groups of leaves, and levels of Lookahead, the innermost first."""

    def __init__(self, rule: Rule, given: Groups, groups: list[Group], of_leaf: list[int]) -> None:
        """Puts together what `of` has found."""
        self.rule = rule
        self.given = Matched(((pattern, dict(different)) for pattern, different in given), of_leaf)
        self.groups = groups
        self.of_leaf = of_leaf
        self.inner, self.levels = _levels(rule)
        self.is_optimal = bool(self.levels) and isinstance(self.levels[0].slow_step, OptimalSlowStep)
        values = [getattr(group.inner, field.name) for group in groups for field in fields(group.inner)]
        values += [group.slow_step for group in groups] + [level.slow_step for level in self.levels]
        self.is_scheduled = any(map(is_scheduled, values))

    @classmethod
    def of(cls, rule: Any, given: Any, paths: Sequence[str]) -> "Plan":
        """The plan for leaves of these paths.

        Raises:
            TypeError, ValueError: if the rule or a group is not what it must be.
        """
        if not isinstance(rule, InnerRule | Lookahead):
            got = f"the class {rule.__name__}" if isinstance(rule, type) else type(rule).__name__
            raise TypeError(f"rule must be a rule such as Lookahead(Adam(lr=1e-3)), got {got}")
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise TypeError(f"groups must be a list of pairs (pattern, dict), got {type(given).__name__}")
        inner, levels = _levels(rule)
        groups = [Group(inner, levels[0].slow_step if levels else None, False)]
        of_leaf = [0] * len(paths)
        for index, pair in enumerate(given):
            pattern, different = _pair(f"groups[{index}]", pair)
            groups.append(_group(f"groups[{index}]", different, inner, levels))
            if not isinstance(given, Matched):
                for leaf in _matching(f"groups[{index}]", pattern, paths):
                    of_leaf[leaf] = of_leaf[leaf] or index + 1
        return cls(rule, given, groups, given.of_leaf if isinstance(given, Matched) else of_leaf)

    def hyper(self, step: int) -> list[tuple[dict[str, float], list[float]]]:
        """Each group's hyper-parameters, and slow steps from the innermost outward, at a step counted from 0."""
        return [self._hyper(index, group, step) for index, group in enumerate(self.groups)]

    def _hyper(self, index: int, group: Group, step: int) -> tuple[dict[str, float], list[float]]:
        numbers, scheduled = self._first[index]
        try:
            slow_steps = [level._check_slow_step(level.slow_step, step) for level in self.levels]
            if self.levels:
                slow_steps[0] = self.levels[0]._check_slow_step(group.slow_step, step)
            return numbers | {name: at_step(name, value, step) for name, value in scheduled}, slow_steps
        except (TypeError, ValueError) as error:
            raise (type(error)(f"groups[{index - 1}]: {error}") if index else error) from None

    @cached_property
    def _first(self) -> list[tuple[dict[str, float], list[tuple[str, Any]]]]:
        """Each group's hyper-parameters at the first step, and those of them that follow a schedule."""
        inners = [group.inner for group in self.groups]
        follows = [[(field.name, getattr(inner, field.name)) for field in fields(inner)] for inner in inners]
        return [
            (inner._hyper(), [pair for pair in pairs if is_scheduled(pair[1])])
            for inner, pairs in zip(inners, follows, strict=True)
        ]

    def described(self, step: int) -> list[dict[str, Any]]:
        """Each group, for the engine."""
        return [
            {
                "kernel": group.inner._kernel,
                "hyper": hyper,
                "slow_steps": slow_steps,
                "frozen": group.frozen,
                "maximize": group.inner._maximizes,
            }
            for group, (hyper, slow_steps) in zip(self.groups, self.hyper(step), strict=True)
        ]

    def cycles(self) -> list[dict[str, Any]]:
        """Each level of Lookahead, for the engine."""
        return [
            {
                "period": level.sync_period,
                "outer": level.outer and (level.outer.momentum, isinstance(level.outer, Nesterov)),
                "inner_state": level.inner_state,
            }
            for level in self.levels
        ]

    def needs(self) -> Any:
        """What cannot change while an optimizer lives: the arrays of each leaf, and cycles."""
        kernels = [(group.inner._kernel, group.frozen) for group in self.groups]
        levels = [(level.sync_period, level.inner_state, level.outer) for level in self.levels]
        return [kernels[index] for index in self.of_leaf], levels, self.is_optimal


def _levels(rule: Rule) -> tuple[InnerRule, list[Lookahead]]:
    levels: list[Lookahead] = []
    while isinstance(rule, Lookahead):
        levels.insert(0, rule)
        rule = rule.inner
    assert isinstance(rule, InnerRule)
    return rule, levels


def with_inner(rule: Rule, inner: InnerRule) -> Rule:
    """The rule with another one at its heart."""
    return replace(rule, inner=with_inner(rule.inner, inner)) if isinstance(rule, Lookahead) else inner


def _matching(name: str, pattern: str, paths: Sequence[str]) -> list[int]:
    """The leaves whose paths have the pattern."""
    try:
        expression = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{name}: {shortened(pattern)} is not a regular expression: {error}") from None
    matching = [leaf for leaf, path in enumerate(paths) if expression.search(path)]
    if not matching:
        shown = ", ".join(path or "params (whose path is empty)" for path in paths[:5])
        shown += ", ..." if len(paths) > 5 else ""
        raise ValueError(f"{name}: no leaf matches {pattern!r}; leaves are {shown}")
    return matching


def _pair(name: str, pair: Any) -> tuple[str, Mapping[str, Any]]:
    match pair:
        case (str() as pattern, Mapping() as different):
            return pattern, different
        case _:
            raise TypeError(f'{name} must be a pair such as ("bias", {{"weight_decay": 0.0}}), got {pair!r}')


def _group(name: str, different: Mapping[str, Any], inner: InnerRule, levels: list[Lookahead]) -> Group:
    known = [field.name for field in fields(inner)] + ["frozen"] + ["slow_step"] * bool(levels)
    for key in different:
        if key == "sync_period":
            raise ValueError(f"{name}: sync_period is one for all leaves, which must sync together")
        if key not in known:
            close = get_close_matches(str(key), known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
            raise ValueError(f"{name}: {type(inner).__name__} has no {key!r} ({hint})")
    hyper = {key: value for key, value in different.items() if key not in ("frozen", "slow_step")}
    try:
        slow_step = levels[0].slow_step if levels else None
        if "slow_step" in different:
            if len(levels) > 1 or OptimalSlowStep in map(type, (slow_step, different["slow_step"])):
                raise ValueError("slow_step of a group needs a single Lookahead, whose slow step is not measured")
            slow_step = replace(levels[0], slow_step=different["slow_step"]).slow_step
        return Group(replace(inner, **hyper), slow_step, flag("frozen", different.get("frozen", False)))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
