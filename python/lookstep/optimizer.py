"""The optimizer: a rule at work on the user's arrays."""

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Generic, TypeVar

import numpy as np

from ._core import Engine
from .hyper import Rule
from .lookahead import Lookahead
from .rules import InnerRule
from .tree import Structure, Tree

Params = TypeVar("Params", bound=Tree)

_LOOK_AGAIN = 32
"""Steps between looks at whether `params` still holds the same arrays."""


class Optimizer(Generic[Params]):
    """Moves parameters in place by a rule.

    The arrays are the user's, and stay so: a step writes new numbers into them, and to load other weights is to write
    them there too (`w[...] = loaded`). Arrays of any layout are stepped in place; contiguous ones are fastest. State is
    made once, here. A step that is refused has changed nothing.

    Args:
        params: a NumPy array of dtype float32 or float64, or a list, tuple or dict of such, to any depth.
        rule: what a step does: `SGD`, `Adam`, `AdamW`, `RAdam`, or `Lookahead` around one of them.

    Raises:
        TypeError: if `rule` is no rule, `params` no such tree, or a leaf no such array; the leaf is named by its path.
        ValueError: if there is no leaf, a leaf is read-only, or two leaves share memory.

    Example:
        >>> import numpy as np
        >>> import lookstep as ls
        >>> params = {"w": np.ones((2, 3)), "b": np.zeros(3)}
        >>> opt = ls.Optimizer(params, ls.Lookahead(ls.RAdam(lr=0.1), sync_period=5, slow_step=0.5))
        >>> for _ in range(10):
        ...     opt.step({"w": params["w"] * 2, "b": params["b"] * 2})
        >>> opt.steps, opt.syncs
        (10, 2)
    """

    def __init__(self, params: Params, rule: Rule) -> None:
        """Checks the arrays, and makes the rule's state for them."""
        if not isinstance(rule, InnerRule | Lookahead):
            got = f"the class {rule.__name__}" if isinstance(rule, type) else type(rule).__name__
            raise TypeError(f"rule must be a rule such as Lookahead(Adam(lr=1e-3)), got {got}")
        self._params = params
        self._rule = rule
        self._structure = Structure(params)
        self._leaves = leaves = list(self._structure.leaves(params))
        inner = self._inner
        cycle = (rule.sync_period, rule.slow_step) if isinstance(rule, Lookahead) else None
        self._engine = Engine(self._structure.names, leaves, inner._kernel, inner._hyper(), cycle)

    def step(self, grads: Any) -> None:
        """Moves every parameter by its gradient, in place; at the end of a cycle, slow and fast weights sync.

        The interpreter lock is released while numbers move.

        Args:
            grads: a tree of the structure of `params`; each leaf an array of its parameter's shape and dtype, of any
                layout, read-only or not. Where a leaf is `None`, the rule leaves the parameter and its state alone; a
                sync includes it all the same.

        Raises:
            TypeError: if a leaf is no array, or of another dtype than its parameter.
            ValueError: if a leaf is missing, unknown, of another shape, or shares memory with a parameter or the state.
            RuntimeError: if `params` holds another array than when the optimizer was built, or one that has changed in
                more than its numbers; if params hold the slow weights; or if another thread is stepping this optimizer.
        """
        if not self._engine.steps % _LOOK_AGAIN:
            self._check_bound()
        self._engine.step(self._structure.leaves(grads))

    def sync(self) -> None:
        """Ends the cycle now: slow and fast weights meet, as at the end of a whole cycle.

        For what must sync at one moment, such as the players of a game: give each optimizer a `sync_period` that is
        never reached, and sync all after the same steps. Without a step since the last sync, nothing happens.

        Raises:
            RuntimeError: as `step`.
        """
        self._check_bound()
        self._engine.sync()

    def slow_weights(self) -> AbstractContextManager[Params]:
        """A context in which `params` hold the slow weights; the fast ones come back at its end, whatever happens.

        Numbers that are written into params inside are written into the slow weights. Where there is no second copy
        (between cycles, and for rules without Lookahead) slow and fast weights are one, and nothing moves.

        Raises:
            RuntimeError: as `step`; also for a step, a sync or another such context inside.

        Example:
            >>> import numpy as np
            >>> import lookstep as ls
            >>> w = np.array([10.0])
            >>> opt = ls.Optimizer(w, ls.Lookahead(ls.SGD(lr=1.0)))
            >>> opt.step(np.array([1.0]))
            >>> with opt.slow_weights() as params:
            ...     print(params)
            [10.]
            >>> print(w)
            [9.]
        """
        self._check_bound()
        return self._engine.slow_weights(self._params)

    @property
    def slow(self) -> Params:
        """The slow weights: read-only views in a tree of the structure of `params`, right until the next call."""
        slow: Params = self._structure.build(self._engine.slow())
        return slow

    @property
    def state(self) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
        """The rule's state: read-only views by their leaf's path and their name, as in `state["encoder/w"]["m"]`."""
        return dict(zip(self._structure.paths, self._engine.state(), strict=True))

    @property
    def rule(self) -> Rule:
        """The rule, with the hyper-parameters of the next step."""
        return self._rule

    @property
    def lr(self) -> float:
        """The inner rule's learning rate; set it to change it from the next step on.

        Raises:
            TypeError, ValueError: if it is set to anything but a finite number >= 0.
        """
        return self._inner.lr

    @lr.setter
    def lr(self, lr: float) -> None:
        inner = replace(self._inner, lr=lr)
        self._engine.set_hyper(inner._hyper())
        self._rule = replace(self._rule, inner=inner) if isinstance(self._rule, Lookahead) else inner

    @property
    def steps(self) -> int:
        """Steps applied so far."""
        return self._engine.steps

    @property
    def syncs(self) -> int:
        """Syncs so far."""
        return self._engine.syncs

    def _check_bound(self) -> None:
        """Refuses to go on with arrays that the user has put others in place of: training would not be seen."""
        now = self._structure.leaves(self._params, "params")
        for name, leaf, held in zip(self._structure.names, now, self._leaves, strict=True):
            if leaf is not held:
                raise RuntimeError(
                    f"{name} is another array than the optimizer was built over: write new numbers into that one "
                    "(w[...] = new), or build a new optimizer"
                )

    @property
    def _inner(self) -> InnerRule:
        return self._rule.inner if isinstance(self._rule, Lookahead) else self._rule

    def __reduce__(self) -> Any:
        """Refuses to be copied: a copy would step the same arrays, by the same state."""
        raise TypeError("an optimizer is bound to its arrays: build another one over a copy of them")

    def __repr__(self) -> str:
        """The rule, and how far it has come."""
        count = len(self._structure.names)
        leaves = "1 leaf" if count == 1 else f"{count} leaves"
        return f"Optimizer({leaves}, {self._rule}, steps={self.steps}, syncs={self.syncs})"
