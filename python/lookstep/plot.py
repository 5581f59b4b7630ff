"""Pictures of training: loss curves, accuracy against learning rate, and the plane of one cycle of Lookahead.

Every drawing function draws on axes that its caller has made, so pictures stand side by side as one likes. Plain rules
are dashed and open, Lookahead is solid and filled. Needs `pip install "lookstep[plot]"`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import Normal, withStroke
from numpy.typing import ArrayLike, NDArray

from .tree import Structure, Tree

Vector: TypeAlias = NDArray[np.float64]

_PLAIN: dict[str, Any] = {"linestyle": "--", "markerfacecolor": "white", "markersize": 7}
_LOOKAHEAD: dict[str, Any] = {"linestyle": "-", "markersize": 5}


def flatten(params: Tree, like: "Tree | None" = None) -> Vector:
    """All numbers of a parameter tree in one vector, leaf after leaf.

    Args:
        params: an array, or a list, tuple or dict of such, to any depth.
        like: a tree whose structure `params` must have, and whose order of leaves the vector takes.

    Returns:
        A new vector of dtype float64.

    Raises:
        TypeError: if `params` is no such tree.
        ValueError: if it is not of the structure, or a leaf not of the shape, that `like` has.

    Example:
        >>> import numpy as np
        >>> from lookstep.plot import flatten
        >>> flatten({"w": np.eye(2), "b": np.array([5.0])})
        array([1., 0., 0., 1., 5.])
    """
    like = params if like is None else like
    structure = Structure(like)
    leaves = [np.asarray(leaf, np.float64) for leaf in structure.leaves(params, "params")]
    for name, leaf, other in zip(structure.names, leaves, structure.leaves(like), strict=True):
        if leaf.shape != np.shape(other):
            raise ValueError(f"{name}: expected shape {np.shape(other)}, got {leaf.shape}")
    return np.concatenate([leaf.ravel() for leaf in leaves])


def _unflatten(vector: Vector, like: Tree) -> Any:
    structure = Structure(like)
    leaves = [np.asarray(leaf) for leaf in structure.leaves(like)]
    parts = np.split(vector, np.cumsum([leaf.size for leaf in leaves])[:-1])
    # The common type with float16 is the leaf's own where that is a float, and a float where it is not.
    dtypes = [np.result_type(leaf, np.float16) for leaf in leaves]
    return structure.build(
        [part.reshape(leaf.shape).astype(t) for part, leaf, t in zip(parts, leaves, dtypes, strict=True)]
    )


@dataclass(frozen=True)
class Plane:
    """A plane in the space of all parameters; `plane` makes one.

    Args:
        origin: the point of coordinates (0, 0).
        u: the direction of the first coordinate, of length 1.
        v: the direction of the second, of length 1 and at a right angle to `u`.
        like: a tree of the structure, shapes and dtypes of the parameters.
    """

    origin: Vector
    u: Vector
    v: Vector
    like: Tree

    def coords(self, params: Tree) -> tuple[float, float]:
        """The coordinates of the point of the plane that is closest to `params`.

        Raises:
            TypeError, ValueError: see `flatten`.
        """
        offset = flatten(params, self.like) - self.origin
        return float(offset @ self.u), float(offset @ self.v)

    def residual(self, params: Tree) -> float:
        """How far `params` are from the plane.

        Raises:
            TypeError, ValueError: see `flatten`.
        """
        x, y = self.coords(params)
        return float(np.linalg.norm(flatten(params, self.like) - (self.origin + x * self.u + y * self.v)))

    def at(self, x: float, y: float) -> Any:
        """The parameters at a point of the plane: a new tree of the structure, shapes and dtypes of `like`."""
        return _unflatten(self.origin + x * self.u + y * self.v, self.like)


def plane(w1: Tree, w2: Tree, w3: Tree) -> Plane:
    r"""The plane through three points of parameter space.

    By Gram and Schmidt, in float64:

    $$u = \frac{w_2 - w_1}{\|w_2 - w_1\|}, \qquad v' = (w_3 - w_1) - \langle w_3 - w_1, u \rangle u, \qquad
    v = \frac{v'}{\|v'\|}$$

    Args:
        w1: parameters, the origin of the plane.
        w2: parameters at the end of the first axis.
        w3: parameters on the side where the second coordinate is positive.

    Returns:
        The plane, with `coords` of, `residual` of, and parameters `at` its points.

    Raises:
        TypeError: if one is no tree of parameters.
        ValueError: if the three are not of one structure, not finite, or on one line.

    Example:
        >>> import numpy as np
        >>> from lookstep.plot import plane
        >>> p = plane(np.array([1.0, 0.0, 2.0]), np.array([3.0, 0.0, 2.0]), np.array([2.0, 3.0, 6.0]))
        >>> p.coords(np.array([2.0, 3.0, 6.0]))
        (1.0, 5.0)
        >>> p.residual(np.array([2.0, 4.0, -1.0]))
        5.0
        >>> p.at(1.0, 5.0)
        array([2., 3., 6.])

    References:
        Zhang, Lucas, Hinton & Ba, "Lookahead Optimizer: k steps forward, 1 step back", 2019, Figure 1,
        https://arxiv.org/abs/1907.08610
    """
    origin, second, third = points = np.stack([flatten(w, w1) for w in (w1, w2, w3)])
    if not np.isfinite(points).all():
        raise ValueError("w1, w2 and w3 must be finite")
    along, across = second - origin, third - origin
    length, reach = np.linalg.norm(along), np.linalg.norm(across)
    u = along / length if length > 0 else along
    for _ in range(2):  # the second time takes away what rounding has left of the first
        across = across - (across @ u) * u
    height = np.linalg.norm(across)
    if length == 0 or height <= 1e-10 * reach:
        raise ValueError("w1, w2 and w3 must not be on one line")
    return Plane(origin, u, across / height, w1)


def draw_losses(ax: Axes, epochs: ArrayLike, plain: ArrayLike, lookahead: ArrayLike, *, color: str = "C0") -> None:
    """Draws loss curves of a rule, alone and with Lookahead: the median of the seeds, in a band from least to most.

    Args:
        ax: the axes to draw on; their loss axis becomes logarithmic.
        epochs: when the losses were taken, of shape (n,).
        plain: losses of the rule alone, of shape (seeds, n); infinite ones are off the chart.
        lookahead: losses of Lookahead around it, of shape (seeds, n).
        color: matplotlib's name of the rule's colour.

    Example:
        >>> import numpy as np
        >>> from matplotlib.figure import Figure
        >>> from lookstep.plot import draw_losses
        >>> ax = Figure().subplots()
        >>> draw_losses(ax, [0, 1, 2], plain=np.array([[3, 2, 1]]), lookahead=np.array([[3, 1, 0.5]]))
        >>> ax.get_xlabel(), ax.get_yscale()
        ('epoch', 'log')
    """
    for label, runs, style, alpha in _pair(plain, lookahead):
        low, middle, high = np.min(runs, 0), np.median(runs, 0), np.max(runs, 0)
        ax.plot(epochs, middle, color=color, label=label, **style)
        ax.fill_between(np.asarray(epochs), low, high, color=color, alpha=alpha, linewidth=0)
    ax.set(xlabel="epoch", ylabel="loss (nats)", yscale="log")


def draw_accuracy(ax: Axes, rates: ArrayLike, plain: ArrayLike, lookahead: ArrayLike, *, color: str = "C0") -> None:
    """Draws accuracy against learning rate, alone and with Lookahead: the mean of the seeds ± their standard deviation.

    Args:
        ax: the axes to draw on; their rate axis becomes logarithmic.
        rates: learning rates, of shape (n,).
        plain: accuracies of the rule alone, in [0, 1], of shape (seeds, n), with two seeds or more.
        lookahead: accuracies of Lookahead around it, of shape (seeds, n).
        color: matplotlib's name of the rule's colour.

    Example:
        >>> import numpy as np
        >>> from matplotlib.figure import Figure
        >>> from lookstep.plot import draw_accuracy
        >>> ax = Figure().subplots()
        >>> draw_accuracy(ax, [0.1, 1], plain=np.array([[0.9, 0.2], [0.8, 0.6]]), lookahead=np.full((2, 2), 0.9))
        >>> [line.get_label() for line in ax.get_lines()]
        ['plain', 'Lookahead']
    """
    for label, runs, style, alpha in _pair(plain, lookahead):
        mean, sd = 100 * np.mean(runs, 0), 100 * np.std(runs, 0, ddof=1)
        ax.plot(rates, mean, color=color, marker="o", label=label, **style)
        ax.fill_between(np.asarray(rates), mean - sd, mean + sd, color=color, alpha=alpha, linewidth=0)
    ax.set(xlabel="learning rate", ylabel="accuracy (%)", xscale="log")


def draw_cycle(
    ax: Axes,
    plane: Plane,
    fast: Sequence[Tree],
    slow: Sequence[Tree],
    loss: Callable[[Any], float],
    *,
    color: str = "C0",
    points: int = 41,
) -> None:
    """Draws the way of fast and slow weights over contours of the loss, as the paper's Figure 1 does.

    The plane to take is the one through the first, middle and last fast weights of a cycle: slow weights move within
    it, and the other fast weights are drawn where they are closest to it.

    Args:
        ax: the axes to draw on; a unit becomes as long on one axis as on the other.
        plane: the plane to look at.
        fast: fast weights after each step, the first ones included.
        slow: slow weights after each sync, the first ones included.
        loss: the height of the contours, positive; called with parameters of the plane, `points` squared times.
        color: matplotlib's name of the colour of both paths.
        points: how many points a side of the grid has.

    Raises:
        TypeError, ValueError: see `flatten`.

    Example:
        >>> import numpy as np
        >>> from matplotlib.figure import Figure
        >>> from lookstep.plot import draw_cycle, plane
        >>> fast = [np.array([2.0, 2.0]), np.array([0.5, 1.5]), np.array([0.0, 0.5])]
        >>> slow = [fast[0], (fast[0] + fast[-1]) / 2]
        >>> ax = Figure().subplots()
        >>> draw_cycle(ax, plane(*fast), fast, slow, lambda w: 1 + w @ w, points=9)
        >>> [line.get_label() for line in ax.get_lines()]
        ['fast weights', 'slow weights']

    References:
        Zhang, Lucas, Hinton & Ba, "Lookahead Optimizer: k steps forward, 1 step back", 2019, Figure 1,
        https://arxiv.org/abs/1907.08610
    """
    fast_path, slow_path = (np.array([plane.coords(w) for w in path]) for path in (fast, slow))
    both = np.concatenate([fast_path, slow_path])
    margin = 0.2 * np.ptp(both, axis=0).max()
    (left, bottom), (right, top) = both.min(0) - margin, both.max(0) + margin
    xs, ys = np.linspace(left, right, points), np.linspace(bottom, top, points)
    heights = np.array([[loss(plane.at(x, y)) for x in xs] for y in ys])
    # Equal steps of the logarithm show the floor of a valley as well as its walls.
    levels = np.geomspace(heights.min(), heights.max(), 14)
    ax.contourf(xs, ys, heights, levels, cmap="Greys", norm="log", alpha=0.5)
    lines = ax.contour(xs, ys, heights, levels, colors="0.45", linewidths=0.6)
    ax.clabel(lines, levels[1::2], fmt="%.2g", fontsize="small")

    halo = [withStroke(linewidth=4, foreground="white"), Normal()]
    common: dict[str, Any] = {"color": color, "path_effects": halo}
    ax.plot(*fast_path.T, marker="s", label="fast weights", **common, **_PLAIN)
    slow_style = _LOOKAHEAD | {"markersize": 11, "linewidth": 2.5}
    ax.plot(*slow_path.T, marker="^", label="slow weights", **common, **slow_style)
    ax.set(xlabel="along u (distance in weight space)", ylabel="along v", aspect="equal")


def _pair(plain: ArrayLike, lookahead: ArrayLike) -> list[tuple[str, Vector, dict[str, Any], float]]:
    """Both sets of runs, each with its label, the style of its line, and the opacity of its band."""
    return [
        ("plain", np.asarray(plain, np.float64), _PLAIN, 0.12),
        ("Lookahead", np.asarray(lookahead, np.float64), _LOOKAHEAD, 0.3),
    ]
