"""Leaves of a parameter tree, and the paths that name them."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, TypeAlias

import numpy as np

Tree: TypeAlias = "np.ndarray[Any, Any] | Mapping[Any, Tree] | Sequence[Tree]"
"""An array, or a list, tuple or dict of trees."""

_Path = tuple[str | int, ...]
_Leaves = list[Any] | tuple[Any, ...]


def label(root: str, path: _Path) -> str:
    """How errors name a leaf: `params["encoder/w"]`, `params[0]`, or `params` for a bare array."""
    match path:
        case ():
            return root
        case (int(index),):
            return f"{root}[{index}]"
        case _:
            return f'{root}["{"/".join(map(str, path))}"]'


class Structure:
    """The shape of a parameter tree: which leaves it has, where, and in which order.

    Args:
        params: an array, or a list, tuple or dict of such, to any depth.

    Raises:
        TypeError: if `params` is none of these.
        ValueError: if it has no leaf, or two leaves of one path.
    """

    def __init__(self, params: Any) -> None:
        """Reads the structure of `params`."""
        if not isinstance(params, np.ndarray | list | tuple | dict):
            raise TypeError(f"params must be an array or a list, tuple or dict of them, got {type(params).__name__}")
        try:
            self._node, paths = _explore(params, ())
        except RecursionError:
            raise ValueError("params is nested too deeply, or contains itself") from None
        self.names = [label("params", path) for path in paths]
        self.paths = ["/".join(map(str, path)) for path in paths]
        if not paths:
            raise ValueError("params has no parameters: it must hold at least one array")
        if twice := [path for path, count in Counter(self.paths).items() if count > 1]:
            raise ValueError(f'params has two leaves of the path "{twice[0]}": rename one of them')
        self._read = _reader(self._node)

    def leaves(self, tree: Any, root: str = "grads") -> _Leaves:
        """The leaves of a tree of this structure, in the order of `names`.

        Raises:
            ValueError: if the tree has another structure, naming the leaf.
        """
        leaves = self._read(tree)
        if leaves is None:
            raise ValueError(_difference(self._node, tree, root, ()))
        return leaves

    def build(self, leaves: Sequence[Any]) -> Any:
        """The tree of this structure with these leaves."""
        return _build(self._node, iter(leaves))


class _Node:
    """A container: its keys or indices, its children (`None` for a leaf), and how to make one like it."""

    def __init__(self, tree: Any, path: _Path) -> None:
        self.is_dict = isinstance(tree, dict)
        self.keys = _keys(tree)
        self.paths: list[_Path] = []
        self.children: list[_Node | None] = []
        for key in self.keys:
            child, paths = _explore(tree[key], (*path, str(key) if self.is_dict else key))
            self.children.append(child)
            self.paths += paths
        self.make: Callable[[list[Any]], Any]
        if self.is_dict:
            self.make = lambda values: dict(zip(self.keys, values, strict=True))
        else:
            self.make = getattr(tree, "_make", list if isinstance(tree, list) else tuple)
        self.kind = "dict" if self.is_dict else "list or tuple"


def _explore(tree: Any, path: _Path) -> tuple[_Node | None, list[_Path]]:
    if isinstance(tree, dict | list | tuple):
        node = _Node(tree, path)
        return node, node.paths
    return None, [path]


_Reader = Callable[[Any], _Leaves | None]


def _reader(node: _Node | None) -> _Reader:
    """A function from a tree to its leaves, or to `None` where the tree is another; made once, and run at each step."""
    if node is None:
        return lambda tree: (tree,)
    size, keys = len(node.keys), set(node.keys)
    kind: Any = dict if node.is_dict else (list, tuple)
    # `itemgetter` is as fast as a call can be, but gives a tuple from two keys up only.
    of_dict: Any = itemgetter(*node.keys) if size > 1 else lambda tree: [tree[key] for key in node.keys]
    inner = [_reader(child) if child else None for child in node.children] if any(node.children) else []

    def read(tree: Any) -> _Leaves | None:
        if not isinstance(tree, kind) or len(tree) != size:
            return None
        # A dict that makes up what it does not have is asked for its keys first.
        if kind is dict and type(tree) is not dict and tree.keys() != keys:
            return None
        try:
            values: _Leaves = of_dict(tree) if kind is dict else tree
        except KeyError:
            return None
        return _flatten(inner, values) if inner else values

    return read


def _flatten(inner: list[_Reader | None], values: _Leaves) -> list[Any] | None:
    leaves: list[Any] = []
    for read, value in zip(inner, values, strict=True):
        if read is None:
            leaves.append(value)
        elif (more := read(value)) is None:
            return None
        else:
            leaves += more
    return leaves


def _difference(node: _Node | None, tree: Any, root: str, path: _Path) -> str:
    """In words, the first place where the tree is not of this structure; empty where it is."""
    if node is None:
        return ""
    if not isinstance(tree, dict if node.is_dict else (list, tuple)):
        return f"{label(root, path)} must be a {node.kind} as in params, got {type(tree).__name__}"
    keys = _keys(tree)
    paths = {key: (*path, str(key) if node.is_dict else key) for key in [*node.keys, *keys]}
    if missing := [key for key in node.keys if key not in keys]:
        return f"{label(root, paths[missing[0]])} is missing"
    if extra := [key for key in keys if key not in node.keys]:
        return f"{label(root, paths[extra[0]])} is {'not in params' if root == 'grads' else 'new'}"
    within = (_difference(n, tree[key], root, paths[key]) for key, n in zip(node.keys, node.children, strict=True))
    return next(filter(None, within), "")


def _keys(tree: Any) -> list[Any]:
    return list(tree) if isinstance(tree, dict) else list(range(len(tree)))


def _build(node: _Node | None, leaves: Iterator[Any]) -> Any:
    if node is None:
        return next(leaves)
    return node.make([_build(child, leaves) for child in node.children])
