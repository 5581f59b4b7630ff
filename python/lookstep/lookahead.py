"""Lookahead around a rule."""

from dataclasses import KW_ONLY, dataclass
from typing import Literal

from .hyper import Rule
from .rules import InnerRule


@dataclass(frozen=True)
class Lookahead(Rule):
    r"""Lookahead: k steps forward, one step back.

    Fast weights $\theta$ are moved by the inner rule for `sync_period` steps ($k$); then slow weights $\phi$ move a
    fraction `slow_step` ($\alpha$) of the way to them, and the fast weights start again from there:

    $$\theta_{t,0} = \phi_{t-1}, \qquad \theta_{t,i} = \text{inner}(\theta_{t,i-1}), \qquad
    \phi_t = \phi_{t-1} + \alpha (\theta_{t,k} - \phi_{t-1})$$

    A cycle starts from the weights that its first step finds, so weights that were loaded before it are honoured. With
    `slow_step=1` this is the inner rule, bit for bit. For a small learning rate $\eta$, Lookahead moves as far as the
    inner rule does at $\alpha \eta$: to compare the two fairly, raise the inner rate by $1 / \alpha$. It narrows the
    spread of results where the rate is too high, and costs progress where it is too low.

    State: the inner rule's, and slow weights in a second array of each parameter's size.

    Args:
        inner: the rule that moves fast weights.
        sync_period: steps a cycle, an integer >= 1.
        slow_step: the fraction of the way that slow weights move, in [0, 1].
        inner_state: what a sync does to the inner rule's state: `"keep"` leaves it as it is.

    Raises:
        TypeError: if `inner` is no inner rule, or a hyper-parameter is of another type, or unknown.
        ValueError: if a hyper-parameter is out of range.

    Example:
        >>> import numpy as np
        >>> import lookstep as ls
        >>> w = np.array([10.0])
        >>> opt = ls.Optimizer(w, ls.Lookahead(ls.SGD(lr=1.0), sync_period=3, slow_step=0.5))
        >>> for _ in range(6):
        ...     opt.step(np.array([1.0]))
        ...     print(w[0], end=" ")
        9.0 8.0 8.5 7.5 6.5 7.0

    References:
        Zhang, Lucas, Hinton & Ba, "Lookahead Optimizer: k steps forward, 1 step back", 2019,
        https://arxiv.org/abs/1907.08610
    """

    inner: InnerRule
    sync_period: int = 5
    slow_step: float = 0.5
    _: KW_ONLY
    inner_state: Literal["keep"] = "keep"

    def __post_init__(self) -> None:
        """Checks the inner rule, then the rest."""
        if not isinstance(self.inner, InnerRule):
            got = f"the class {self.inner.__name__}" if isinstance(self.inner, type) else type(self.inner).__name__
            raise TypeError(f"inner must be a rule such as Adam(lr=1e-3), got {got}")
        if self.inner_state != "keep":
            raise ValueError(f'inner_state must be "keep", got {self.inner_state!r}')
        super().__post_init__()
