"""Leaves of a parameter tree, and the paths that name them."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat
from operator import itemgetter
from typing import Any, TypeAlias

import numpy as np

Tree: TypeAlias = "np.ndarray[Any, Any] | Any | Mapping[Any, Tree] | Sequence[Tree]"
"""An array of NumPy or on the GPU, or a list, tuple or dict of trees."""

_Path = tuple[str | int, ...]
_Leaves = list[Any] | tuple[Any, ...]


def is_gpu(leaf: Any) -> bool:
    """Whether this is an array on the GPU; there are none before somebody has imported what they are made with."""
    wgpu, ours = sys.modules.get("wgpu"), sys.modules.get("lookstep.gpu.arrays")
    kinds = getattr(wgpu, "GPUBuffer", None), getattr(ours, "View", None)
    return isinstance(leaf, tuple(kind for kind in kinds if kind is not None))


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
        if not isinstance(params, np.ndarray | list | tuple | dict) and not is_gpu(params):
            raise TypeError(f"params must be an array or a list, tuple or dict of them, got {type(params).__name__}")
        try:
            self._node = _explore(params)
            self._read = _reader(self._node)
            paths = self.paths
        except RecursionError:
            raise ValueError("params is nested too deeply, or contains itself") from None
        if not paths:
            raise ValueError("params has no parameters: it must hold at least one array")
        if len(set(paths)) < len(paths):
            twice = next(path for path, count in Counter(paths).items() if count > 1)
            raise ValueError(f'params has two leaves of the path "{twice}": rename one of them')

    @property
    def paths(self) -> list[str]:
        """The leaves' paths, as in "encoder/w"; made when they are asked for, because there may be very many."""
        return ["/".join(map(str, path)) for path in _paths(self._node, ())]

    @property
    def names(self) -> list[str]:
        """The same as errors write them."""
        return [label("params", path) for path in _paths(self._node, ())]

    @property
    def count(self) -> int:
        """How many leaves there are."""
        return sum(1 for _ in _paths(self._node, ()))

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
    """A container: its keys or indices, its children, and how to make one like it."""

    def __init__(self, tree: Any) -> None:
        self.is_dict = isinstance(tree, dict)
        self.keys = _keys(tree)
        children = [_explore(tree[key]) for key in self.keys]
        self.children: list[_Node | None] = children if any(children) else []
        """None for a leaf; no list where there are leaves alone."""
        self.make: Callable[[list[Any]], Any]
        if self.is_dict:
            self.make = lambda values: dict(zip(self.keys, values, strict=True))
        else:
            self.make = getattr(tree, "_make", list if isinstance(tree, list) else tuple)
        self.kind = "dict" if self.is_dict else "list or tuple"

    def pairs(self) -> Iterator[tuple[Any, "_Node | None"]]:
        """Keys and children."""
        return zip(self.keys, self.children or repeat(None), strict=False)


def _explore(tree: Any) -> _Node | None:
    return _Node(tree) if isinstance(tree, dict | list | tuple) else None


def _paths(node: _Node | None, path: _Path) -> Iterator[_Path]:
    if node is None:
        yield path
        return
    for key, child in node.pairs():
        of_child = (*path, str(key) if node.is_dict else key)
        if child is None:
            yield of_child
        else:
            yield from _paths(child, of_child)


_Reader = Callable[[Any], _Leaves | None]


def _reader(node: _Node | None) -> _Reader:
    """A function from a tree to its leaves, or to `None` where the tree is another; made once, and run at each step."""
    if node is None:
        return lambda tree: (tree,)
    size, keys = len(node.keys), set(node.keys)
    kind: Any = dict if node.is_dict else (list, tuple)
    # `itemgetter` is as fast as a call can be, but gives a tuple from two keys up only.
    of_dict: Any = itemgetter(*node.keys) if size > 1 else lambda tree: [tree[key] for key in node.keys]
    inner = [_reader(child) if child else None for child in node.children]

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
    within = (_difference(child, tree[key], root, paths[key]) for key, child in node.pairs())
    return next(filter(None, within), "")


def _keys(tree: Any) -> Sequence[Any]:
    return list(tree) if isinstance(tree, dict) else range(len(tree))


def _build(node: _Node | None, leaves: Iterator[Any]) -> Any:
    if node is None:
        return next(leaves)
    return node.make([_build(child, leaves) for _, child in node.pairs()])
