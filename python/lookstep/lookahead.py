"""Lookahead around a rule."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

from .hyper import CHECKS, Check, Checked, Rule, Scheduled, at_least_zero, at_step, below_one, is_scheduled, up_to_one
from .rules import InnerRule


@dataclass(frozen=True)
class Outer(Checked):
    r"""Momentum of the sync, which takes $\Delta = \phi - \theta$ for a gradient and the slow step for its rate.

    State: `momentum`, an array of each parameter's size.

    Args:
        momentum: decay rate of the momentum buffer, in [0, 1). With 0, the sync is Lookahead's own, to rounding.

    Raises:
        TypeError: if `momentum` is no real number.
        ValueError: if it is out of range.
    """

    momentum: float

    _checks: ClassVar[Mapping[str, Check]] = {"momentum": below_one}


@dataclass(frozen=True)
class HeavyBall(Outer):
    r"""Heavy-ball momentum of the sync: SlowMo at a constant learning rate.

    $$u \leftarrow \mu u + \Delta, \qquad \phi \leftarrow \phi - \alpha u$$

    State, Args, Raises: see `Outer`.

    Example:
        >>> import lookstep as ls
        >>> ls.Lookahead(ls.SGD(lr=0.1), slow_step=1.0, outer=ls.HeavyBall(0.5)).outer
        HeavyBall(momentum=0.5)

    References:
        Wang, Tantia, Ballas & Rabbat, "SlowMo: Improving Communication-Efficient Distributed SGD with Slow Momentum",
        2020, https://arxiv.org/abs/1910.00643
    """


@dataclass(frozen=True)
class Nesterov(Outer):
    r"""Nesterov momentum of the sync: SNOO with one worker, DiLoCo with several.

    $$u \leftarrow \mu u + \Delta, \qquad \phi \leftarrow \phi - \alpha (\Delta + \mu u)$$

    State, Args, Raises: see `Outer`.

    Example:
        >>> import lookstep as ls
        >>> ls.Lookahead(ls.AdamW(), slow_step=0.7, outer=ls.Nesterov(0.9)).outer
        Nesterov(momentum=0.9)

    References:
        Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", 2023,
        https://arxiv.org/abs/2311.08105
    """


@dataclass(frozen=True)
class OptimalSlowStep(Checked):
    r"""A slow step that is measured at every sync: the best one, where the loss is quadratic along the way.

    With $d = \theta_k - \theta_0$ and the gradients $g$ at both ends,

    $$\alpha^* = \frac{g(\theta_0)^\top d}{(g(\theta_0) - g(\theta_k))^\top d}$$

    clipped to [`low`, 1], because gradients of batches are noisy. Where the slope does not rise along the way, there is
    no lowest point: then it is 1 if the way goes down, and `low` if not.

    What it costs: no call of yours beyond those that you make, but one gradient a cycle. The gradient at $\theta_k$ is
    the one of the step after the cycle's last; that step only measures and syncs, `steps` does not count it, and the
    rule does not see it. So a cycle of `sync_period` steps takes `sync_period + 1` calls. It also keeps the gradients
    of the cycle's first step, one more array of each parameter's size.

    Args:
        low: the smallest slow step, in [0, 1]; `sync()` uses it, since it has no gradient to measure with.

    Raises:
        TypeError: if `low` is no real number.
        ValueError: if it is out of range.

    Example:
        >>> import numpy as np
        >>> import lookstep as ls
        >>> w = np.array([1.0])
        >>> opt = ls.Optimizer(w, ls.Lookahead(ls.SGD(lr=1.5), sync_period=1, slow_step=ls.OptimalSlowStep(low=0.1)))
        >>> for _ in range(2):
        ...     opt.step(w.copy())  # the gradient of w^2 / 2
        >>> round(opt.slow_step, 3), w
        (0.667, array([0.]))

    References:
        Zhang, Lucas, Hinton & Ba, "Lookahead Optimizer: k steps forward, 1 step back", 2019, Proposition 1,
        https://arxiv.org/abs/1907.08610
    """

    low: float = 0.5

    _checks: ClassVar[Mapping[str, Check]] = {"low": up_to_one}


_FRAMEWORKS = {
    "keras": "lookstep.keras.Lookahead",
    "optax": "lookstep.optax.lookahead",
    "torch": "lookstep.torch.Lookahead",
}
"""What goes around optimizers of others, by their packages."""


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
    spread of results where the rate is too high, and costs progress where it is too low. It does not always stabilise:
    with heavy momentum that is kept or reset, it can diverge where the inner rule alone converges; with pullback, and
    on a quadratic, it cannot.

    The inner rule may be another Lookahead, to any depth. The outer one then takes the inner one's syncs for its steps:
    `Lookahead(Lookahead(rule, 3), 2)` syncs within after 3 steps, and around after 6.

    State: the inner rule's, and slow weights in another array of each parameter's size; one more with `outer`, and
    with `"pullback"` one more for each array of the inner rule's state.

    Args:
        inner: the rule that moves fast weights: any rule, another `Lookahead` included.
        sync_period: steps a cycle (syncs of the inner rule, where that is a `Lookahead`), an integer >= 1.
        slow_step: the fraction of the way that slow weights move, in [0, 1], or a schedule of it, or `OptimalSlowStep`.
            With `outer` it is a learning rate, and may exceed 1.
        inner_state: what a sync does to the inner rule's state: `"keep"` leaves it as it is; `"reset"` makes all of it
            zero, and counts steps from the start; `"pullback"` moves it as slow weights move, from what it was after
            the last sync (zero at first), at most all of the way, and leaves the step count.
        outer: momentum of the sync: `HeavyBall` or `Nesterov`.

    Raises:
        TypeError: if `inner` is no rule, or a hyper-parameter is of another type, or unknown.
        ValueError: if a hyper-parameter is out of range, or an optimal slow step is not innermost, or has an `outer`.

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

    inner: Rule
    sync_period: int = 5
    slow_step: Scheduled | OptimalSlowStep = 0.5
    _: KW_ONLY
    inner_state: Literal["keep", "reset", "pullback"] = "keep"
    outer: Outer | None = None

    _checks: ClassVar[Mapping[str, Check]] = {"sync_period": CHECKS["sync_period"]}

    def __post_init__(self) -> None:
        """Checks the inner rule, then the rest."""
        if not isinstance(self.inner, InnerRule | Lookahead):
            got = f"the class {self.inner.__name__}" if isinstance(self.inner, type) else type(self.inner).__name__
            theirs = _FRAMEWORKS.get(type(self.inner).__module__.partition(".")[0])
            hint = f": around that, use {theirs}" if theirs else ""
            raise TypeError(f"inner must be a rule such as Adam(lr=1e-3), got {got}{hint}")
        choices = ("keep", "reset", "pullback")
        if self.inner_state not in choices:
            raise ValueError(
                f'inner_state must be "{choices[0]}", "{choices[1]}" or "{choices[2]}", got {self.inner_state!r}'
            )
        if not isinstance(self.outer, HeavyBall | Nesterov | None):
            got = f"the class {self.outer.__name__}" if isinstance(self.outer, type) else type(self.outer).__name__
            raise TypeError(f"outer must be HeavyBall(momentum) or Nesterov(momentum), got {got}")
        if isinstance(self.slow_step, OptimalSlowStep):
            if self.outer is not None or isinstance(self.inner, Lookahead):
                raise ValueError("an optimal slow step must be the innermost Lookahead's, without an outer momentum")
        else:
            first = self._check_slow_step(self.slow_step, 0)
            if not is_scheduled(self.slow_step):
                object.__setattr__(self, "slow_step", first)
        super().__post_init__()

    def _check_slow_step(self, value: Any, step: int) -> float:
        """The slow step at a step, counted from 0; one that is measured is at least this."""
        if isinstance(value, OptimalSlowStep):
            return value.low
        return at_step("slow_step", value, step, at_least_zero if self.outer else up_to_one)
