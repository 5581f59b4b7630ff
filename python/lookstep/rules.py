"""Inner optimizers as pure data: one frozen dataclass a rule.

A rule holds hyper-parameters and nothing else, so it can be printed, compared and shared between optimizers. Names and
defaults are torch's where torch has the rule, and the paper's otherwise. What a step does is in `src/rules/`, one file
a rule.
"""

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import ClassVar

from .hyper import Check, Rule, Scheduled, at_step, below_one, each, is_scheduled, within_one


@dataclass(frozen=True)
class InnerRule(Rule):
    """A rule that moves fast weights."""

    lr: Scheduled = 1e-3

    _kernels: ClassVar[tuple[str, ...]]
    """The kernels that the rule may run, as `src/rules/` calls them."""

    @property
    def _kernel(self) -> str:
        """The kernel that these hyper-parameters run: one without arrays or arithmetic that they leave unused."""
        return self._kernels[0]

    @property
    def _maximizes(self) -> bool:
        return bool(vars(self)["maximize"])

    def _hyper(self, step: int = 0) -> dict[str, float]:
        """Numbers at a step, by the names of kernels: `betas` are `b1` and `b2`, `etas` are `eta1` and `eta2`."""
        numbers: dict[str, float] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                name = "b" if field.name == "betas" else field.name.removesuffix("s")
                numbers |= {f"{name}{i}": number for i, number in enumerate(value, 1)}
            elif is_scheduled(value):
                numbers[field.name] = at_step(field.name, value, step)
            else:
                numbers[field.name] = float(value)
        del numbers["maximize"]
        return numbers


@dataclass(frozen=True)
class SGD(InnerRule):
    r"""Stochastic gradient descent, with momentum in torch's form.

    $$d = g + \lambda p, \qquad m \leftarrow \mu m + (1 - \tau) d, \qquad p \leftarrow p - \eta m$$

    with learning rate $\eta$, momentum $\mu$, dampening $\tau$ and weight decay $\lambda$; the first step takes
    $m = d$. Nesterov: $p \leftarrow p - \eta (d + \mu m)$. Without momentum: $p \leftarrow p - \eta d$.

    State: `m` where momentum > 0.

    Args:
        lr: see `Rule`.
        momentum: see `Rule`.
        dampening: how much less than whole a gradient enters the momentum after the first step, >= 0.
        weight_decay: see `Rule`.
        nesterov: look ahead along the momentum; needs momentum > 0 and dampening == 0.
        maximize: see `Rule`.

    Raises:
        TypeError, ValueError: see `Rule`.

    Example:
        >>> import lookstep as ls
        >>> ls.SGD(lr=0.1, momentum=0.9)
        SGD(lr=0.1, momentum=0.9, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False)

    References:
        Sutskever, Martens, Dahl & Hinton, "On the importance of initialization and momentum in deep learning", 2013,
        https://proceedings.mlr.press/v28/sutskever13.html
    """

    _: KW_ONLY
    momentum: Scheduled = 0.0
    dampening: float = 0.0
    weight_decay: Scheduled = 0.0
    nesterov: bool = False
    maximize: bool = False

    _kernels = ("Sgd", "SgdMomentum", "SgdNesterov")

    def __post_init__(self) -> None:
        """Checks what momentum's companions need."""
        super().__post_init__()
        if self.nesterov and not (self.momentum and self.dampening == 0):
            raise ValueError("nesterov needs momentum > 0 and dampening == 0")

    @property
    def _kernel(self) -> str:
        return "SgdNesterov" if self.nesterov else "SgdMomentum" if self.momentum else "Sgd"


@dataclass(frozen=True)
class Adam(InnerRule):
    r"""Adam: steps scaled by running averages of the gradient and of its square.

    $$d = g + \lambda p$$

    $$m \leftarrow \beta_1 m + (1 - \beta_1) d, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) d^2$$

    $$p \leftarrow p - \eta \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}$$

    AMSGrad puts the largest $v$ so far in place of $v$ in the last line.

    State: `m`, `v`, and `v_max` with AMSGrad.

    Args:
        lr: see `Rule`.
        betas: see `Rule`.
        eps: see `Rule`.
        weight_decay: see `Rule`.
        amsgrad: divide by the largest second moment so far.
        decoupled_weight_decay: see `Rule`; the rule is then `AdamW`.
        maximize: see `Rule`.

    Raises:
        TypeError, ValueError: see `Rule`.

    Example:
        >>> import lookstep as ls
        >>> ls.Adam(lr=0.01).betas
        (0.9, 0.999)

    References:
        Kingma & Ba, "Adam: A Method for Stochastic Optimization", 2015, https://arxiv.org/abs/1412.6980
        Reddi, Kale & Kumar, "On the Convergence of Adam and Beyond", 2018, https://arxiv.org/abs/1904.09237
    """

    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: Scheduled = 0.0
    amsgrad: bool = False
    decoupled_weight_decay: bool = False
    maximize: bool = False

    _kernels = ("Adam", "AdamAmsgrad", "AdamW", "AdamWAmsgrad")

    @property
    def _kernel(self) -> str:
        return self._kernels[2 * self.decoupled_weight_decay + self.amsgrad]


@dataclass(frozen=True)
class AdamW(InnerRule):
    r"""Adam with weight decay that is decoupled from the gradient.

    $$m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2$$

    $$p \leftarrow (1 - \eta \lambda) p - \eta \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}$$

    The decay is torch's, $\eta \lambda$, where the paper's is $\lambda$ times a schedule. The default decay is torch's
    too: 1e-2, where Keras has 4e-3 and optax 1e-4.

    State: `m`, `v`, and `v_max` with AMSGrad.

    Args:
        lr: see `Rule`.
        betas: see `Rule`.
        eps: see `Rule`.
        weight_decay: see `Rule`.
        amsgrad: divide by the largest second moment so far.
        maximize: see `Rule`.

    Raises:
        TypeError, ValueError: see `Rule`.

    Example:
        >>> import lookstep as ls
        >>> ls.AdamW().weight_decay
        0.01

    References:
        Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019, https://arxiv.org/abs/1711.05101
    """

    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: Scheduled = 1e-2
    amsgrad: bool = False
    maximize: bool = False

    _kernels = ("AdamW", "AdamWAmsgrad")

    @property
    def _kernel(self) -> str:
        return self._kernels[self.amsgrad]


@dataclass(frozen=True)
class RAdam(InnerRule):
    r"""Rectified Adam: no adaptive step before the second moment can be trusted, so that no warm-up is needed.

    With $d$, $m$ and $v$ as in `Adam`, $\rho_\infty = 2 / (1 - \beta_2) - 1$ and
    $\rho_t = \rho_\infty - 2 t \beta_2^t / (1 - \beta_2^t)$: while $\rho_t \le 5$,

    $$p \leftarrow p - \eta \frac{m}{1 - \beta_1^t}$$

    and from then on

    $$r = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)\rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2)\rho_t}}, \qquad
    p \leftarrow p - \eta r \frac{m}{1 - \beta_1^t} \frac{\sqrt{1 - \beta_2^t}}{\sqrt{v} + \epsilon}$$

    The threshold of 5 and the place of $\epsilon$ are torch's; the paper's threshold is 4.

    State: `m`, `v`.

    Args:
        lr: see `Rule`.
        betas: see `Rule`.
        eps: see `Rule`.
        weight_decay: see `Rule`.
        decoupled_weight_decay: see `Rule`.
        maximize: see `Rule`.

    Raises:
        TypeError, ValueError: see `Rule`.

    Example:
        >>> import lookstep as ls
        >>> ls.RAdam(lr=3e-3).betas
        (0.9, 0.999)

    References:
        Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", 2020, https://arxiv.org/abs/1908.03265
    """

    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: Scheduled = 0.0
    decoupled_weight_decay: bool = False
    maximize: bool = False

    _kernels = ("RAdam",)


@dataclass(frozen=True)
class NAdam(InnerRule):
    r"""NAdam: Adam with Nesterov's momentum, which warms up.

    With $d$, $m$ and $v$ as in `Adam`, $\mu_t = \beta_1 (1 - \tfrac12 0.96^{t \psi})$ and
    $\bar\mu_t = \mu_1 \cdots \mu_t$:

    $$p \leftarrow p - \eta \left(\frac{(1 - \mu_t) d}{1 - \bar\mu_t} + \frac{\mu_{t+1} m}{1 - \bar\mu_{t+1}}\right)
    \bigg/ \left(\sqrt{v / (1 - \beta_2^t)} + \epsilon\right)$$

    $\bar\mu$ is kept in float64, where torch keeps it in its default dtype, as a rule float32.

    State: `m`, `v`.

    Args:
        lr: see `Rule`.
        betas: see `Rule`; the first is what $\mu_t$ warms up to.
        eps: see `Rule`.
        weight_decay: see `Rule`.
        momentum_decay: $\psi$, how fast the momentum warms up, >= 0.
        decoupled_weight_decay: see `Rule`.
        maximize: see `Rule`.

    Raises:
        TypeError, ValueError: see `Rule`.

    Example:
        >>> import lookstep as ls
        >>> ls.NAdam().momentum_decay
        0.004

    References:
        Dozat, "Incorporating Nesterov Momentum into Adam", 2016, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ
    """

    lr: Scheduled = 2e-3
    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: Scheduled = 0.0
    momentum_decay: float = 4e-3
    decoupled_weight_decay: bool = False
    maximize: bool = False

    _kernels = ("NAdam",)


@dataclass(frozen=True)
class Adamax(InnerRule):
    r"""Adamax: Adam with the infinity norm in place of the second moment's root.

    $$d = g + \lambda p, \qquad m \leftarrow \beta_1 m + (1 - \beta_1) d, \qquad
    u \leftarrow \max(\beta_2 u, |d| + \epsilon)$$

    $$p \leftarrow p - \frac{\eta}{1 - \beta_1^t} \frac{m}{u}$$

    The $\epsilon$ is torch's; the paper has none.

    State: `m`, `u`.

    Args:
        lr: see `Rule`.
        betas: see `Rule`; the second is the decay rate of the norm.
        eps: added to the gradient's size, >= 0. Where the norm is zero all the same, the update is zero.
        weight_decay: see `Rule`.
        maximize: see `Rule`.

    Raises:
        TypeError, ValueError: see `Rule`.

    Example:
        >>> import lookstep as ls
        >>> ls.Adamax()
        Adamax(lr=0.002, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0, maximize=False)

    References:
        Kingma & Ba, "Adam: A Method for Stochastic Optimization", 2015, Section 7.1, https://arxiv.org/abs/1412.6980
    """

    lr: Scheduled = 2e-3
    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: Scheduled = 0.0
    maximize: bool = False

    _kernels = ("Adamax",)


@dataclass(frozen=True)
class Adagrad(InnerRule):
    r"""Adagrad: steps scaled by the root of the sum of all squared gradients.

    $$d = g + \lambda p, \qquad v \leftarrow v + d^2, \qquad
    p \leftarrow p - \frac{\eta}{1 + (t - 1) \gamma} \frac{d}{\sqrt{v} + \epsilon}$$

    State: `v`, which a parameter's first step starts from `initial_accumulator_value`; torch does so when it is built.

    Args:
        lr: see `Rule`.
        lr_decay: $\gamma$, how fast the learning rate falls, >= 0.
        weight_decay: see `Rule`.
        initial_accumulator_value: what the sum starts from, >= 0.
        eps: see `Rule`.
        maximize: see `Rule`.

    Raises:
        TypeError, ValueError: see `Rule`.

    Example:
        >>> import lookstep as ls
        >>> ls.Adagrad(lr_decay=1e-3).eps
        1e-10

    References:
        Duchi, Hazan & Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", 2011,
        https://jmlr.org/papers/v12/duchi11a.html
    """

    lr: Scheduled = 1e-2
    _: KW_ONLY
    lr_decay: float = 0.0
    weight_decay: Scheduled = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10
    maximize: bool = False

    _kernels = ("Adagrad",)


@dataclass(frozen=True)
class Adadelta(InnerRule):
    r"""Adadelta: steps in the parameter's own units, scaled by the steps before.

    $$d = g + \lambda p, \qquad v \leftarrow \rho v + (1 - \rho) d^2, \qquad
    x = \frac{\sqrt{u + \epsilon}}{\sqrt{v + \epsilon}} d$$

    $$u \leftarrow \rho u + (1 - \rho) x^2, \qquad p \leftarrow p - \eta x$$

    The $\eta$ is torch's; the paper has none, which is 1.

    State: `v`, `u`.

    Args:
        lr: see `Rule`.
        rho: decay rate of the averages of squares, in [0, 1].
        eps: added to both averages, >= 0. Where the denominator is zero all the same, the update is zero. With 0,
            nothing ever moves.
        weight_decay: see `Rule`.
        maximize: see `Rule`.

    Raises:
        TypeError, ValueError: see `Rule`.

    Example:
        >>> import lookstep as ls
        >>> ls.Adadelta()
        Adadelta(lr=1.0, rho=0.9, eps=1e-06, weight_decay=0.0, maximize=False)

    References:
        Zeiler, "ADADELTA: An Adaptive Learning Rate Method", 2012, https://arxiv.org/abs/1212.5701
    """

    lr: Scheduled = 1.0
    _: KW_ONLY
    rho: float = 0.9
    eps: float = 1e-6
    weight_decay: Scheduled = 0.0
    maximize: bool = False

    _kernels = ("Adadelta",)


@dataclass(frozen=True)
class RMSprop(InnerRule):
    r"""RMSprop: gradients divided by the root of their running mean square, then momentum.

    $$d = g + \lambda p, \qquad v \leftarrow \alpha v + (1 - \alpha) d^2, \qquad
    b \leftarrow \mu b + \frac{d}{\sqrt{v} + \epsilon}, \qquad p \leftarrow p - \eta b$$

    Centered, $m \leftarrow \alpha m + (1 - \alpha) d$, and $v - m^2$ stands in place of $v$ under the root. Where
    rounding makes that negative it counts as zero; in torch the parameter becomes NaN.

    State: `v`; `m`, `v` where centered; and `b` where momentum > 0.

    Args:
        lr: see `Rule`.
        alpha: decay rate of the averages of the gradient and of its square, in [0, 1].
        eps: see `Rule`.
        weight_decay: see `Rule`.
        momentum: see `Rule`.
        centered: divide by the standard deviation rather than by the root of the mean square.
        maximize: see `Rule`.

    Raises:
        TypeError, ValueError: see `Rule`.

    Example:
        >>> import lookstep as ls
        >>> ls.RMSprop(momentum=0.9).alpha
        0.99

    References:
        Tieleman & Hinton, "Lecture 6e - rmsprop", 2012,
        https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf
        Graves, "Generating Sequences With Recurrent Neural Networks", 2013, https://arxiv.org/abs/1308.0850
    """

    lr: Scheduled = 1e-2
    _: KW_ONLY
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: Scheduled = 0.0
    momentum: Scheduled = 0.0
    centered: bool = False
    maximize: bool = False

    _kernels = ("RMSprop", "RMSpropMomentum", "RMSpropCentered", "RMSpropCenteredMomentum")

    @property
    def _kernel(self) -> str:
        return self._kernels[2 * self.centered + bool(self.momentum)]


@dataclass(frozen=True)
class Rprop(InnerRule):
    r"""Rprop: steps whose size follows from the gradient's changes of sign alone. For whole batches, not for noise.

    Each parameter has a step size $u$, at first $\eta$, and a sign $s$. With $c = s \, \mathrm{sign}(g)$,

    $$u \leftarrow \mathrm{clip}(u f, u_{min}, u_{max}), \qquad
    f = \begin{cases} \eta_+ & c > 0 \\ \eta_- & c < 0 \\ 1 & c = 0 \end{cases}$$

    $$s \leftarrow \begin{cases} 0 & c < 0 \\ \mathrm{sign}(g) & c \ge 0 \end{cases}, \qquad p \leftarrow p - u s$$

    Where the sign has changed, a step is skipped, and the last one not taken back: torch's form, and iRprop-. torch
    keeps the last gradient and multiplies it by the next; where that underflows it sees no sign, and here there is one.

    State: `s`, `u`.

    Args:
        lr: the size of a parameter's first step, >= 0; without effect from then on.
        etas: the factors $\eta_-$, in (0, 1), and $\eta_+$, over 1.
        step_sizes: the smallest and the largest step, >= 0.
        maximize: see `Rule`.

    Raises:
        TypeError, ValueError: see `Rule`.

    Example:
        >>> import lookstep as ls
        >>> ls.Rprop()
        Rprop(lr=0.01, etas=(0.5, 1.2), step_sizes=(1e-06, 50.0), maximize=False)

    References:
        Riedmiller & Braun, "A direct adaptive method for faster backpropagation learning: the RPROP algorithm", 1993,
        https://doi.org/10.1109/ICNN.1993.298623
        Igel & Hüsken, "Empirical evaluation of the improved Rprop learning algorithms", 2003,
        https://doi.org/10.1016/S0925-2312(01)00700-7
    """

    lr: Scheduled = 1e-2
    _: KW_ONLY
    etas: tuple[float, float] = (0.5, 1.2)
    step_sizes: tuple[float, float] = (1e-6, 50.0)
    maximize: bool = False

    _kernels = ("Rprop",)


@dataclass(frozen=True)
class ASGD(InnerRule):
    r"""Averaged stochastic gradient descent: the weights to evaluate are an average of those that were trained.

    $$\eta_t = \frac{\eta}{(1 + \lambda_0 \eta (t - 1))^\alpha}, \qquad
    p \leftarrow (1 - \lambda_0 \eta_t) p - \eta_t (g + \lambda p)$$

    $$\bar p \leftarrow \bar p + \mu_t (p - \bar p), \qquad \mu_t = \frac{1}{\max(1, t - 1 - t_0)}$$

    $\eta_t$ is a function of the $\eta$ of its own step, where torch makes it at the end of the step before: a learning
    rate that is set in between acts here at once, and there a step later.

    State: `average`, which is $\bar p$.

    Args:
        lr: see `Rule`.
        lambd: $\lambda_0$, a decay of weights that sets the fall of the learning rate, too, >= 0.
        alpha: the power by which the learning rate falls, in [0, 1]; torch takes larger ones, whose steps have a finite
            sum.
        t0: the steps before averaging starts, >= 0.
        weight_decay: see `Rule`.
        maximize: see `Rule`.

    Raises:
        TypeError, ValueError: see `Rule`.

    Example:
        >>> import lookstep as ls
        >>> ls.ASGD(t0=1000).alpha
        0.75

    References:
        Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992,
        https://doi.org/10.1137/0330046
        Xu, "Towards Optimal One Pass Large Scale Learning with Averaged Stochastic Gradient Descent", 2011,
        https://arxiv.org/abs/1107.2490
    """

    lr: Scheduled = 1e-2
    _: KW_ONLY
    lambd: float = 1e-4
    alpha: float = 0.75
    t0: float = 1e6
    weight_decay: Scheduled = 0.0
    maximize: bool = False

    _kernels = ("Asgd",)


@dataclass(frozen=True)
class Lion(InnerRule):
    r"""Lion: the sign of an interpolation between momentum and gradient, found by a search over programs.

    $$c = \beta_1 m + (1 - \beta_1) g, \qquad m \leftarrow \beta_2 m + (1 - \beta_2) g$$

    $$p \leftarrow (1 - \eta \lambda) p - \eta \, \mathrm{sign}(c)$$

    Every step has the size of the learning rate, so take one that is 3 to 10 times smaller than AdamW's, and a decay
    that is as many times larger. The decay is decoupled. Where $c$ is infinite, the weight becomes NaN: a sign would
    hide it.

    State: `m`.

    Args:
        lr: see `Rule`.
        betas: decay rates of the momentum as it enters the step, and as it is kept, each in [0, 1).
        weight_decay: see `Rule`.
        maximize: see `Rule`.

    Raises:
        TypeError, ValueError: see `Rule`.

    Example:
        >>> import numpy as np
        >>> import lookstep as ls
        >>> w = np.zeros(2)
        >>> ls.Optimizer(w, ls.Lion(lr=0.5)).step(np.array([3.0, -0.001]))
        >>> print(w)
        [-0.5  0.5]

    References:
        Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, https://arxiv.org/abs/2302.06675
    """

    lr: Scheduled = 1e-4
    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: Scheduled = 0.0
    maximize: bool = False

    _kernels = ("Lion",)


@dataclass(frozen=True)
class Signum(InnerRule):
    r"""Signum: the sign of the momentum; without momentum, signSGD.

    $$m \leftarrow \mu m + (1 - \mu) g, \qquad p \leftarrow (1 - \eta \lambda) p - \eta \, \mathrm{sign}(m)$$

    The decay, which is decoupled, is that of the authors' next paper. Where $m$ is infinite, the weight becomes NaN: a
    sign would hide it.

    State: `m` where momentum > 0.

    Args:
        lr: see `Rule`.
        momentum: see `Rule`.
        weight_decay: see `Rule`.
        maximize: see `Rule`.

    Raises:
        TypeError, ValueError: see `Rule`.

    Example:
        >>> import lookstep as ls
        >>> ls.Signum(lr=1e-3).momentum
        0.9

    References:
        Bernstein, Wang, Azizzadenesheli & Anandkumar, "signSGD: Compressed Optimisation for Non-Convex Problems", 2018,
        https://arxiv.org/abs/1802.04434
    """

    lr: Scheduled = 1e-4
    _: KW_ONLY
    momentum: Scheduled = 0.9
    weight_decay: Scheduled = 0.0
    maximize: bool = False

    _kernels = ("SignSgd", "Signum")

    @property
    def _kernel(self) -> str:
        return self._kernels[bool(self.momentum)]


@dataclass(frozen=True)
class AdaBelief(InnerRule):
    r"""AdaBelief: steps scaled by how far gradients are from what their average makes one believe.

    $$m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) (g - m)^2 + \epsilon$$

    $$p \leftarrow (1 - \eta \lambda) p - \eta \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}$$

    This is the paper's algorithm, where $\epsilon$ enters the running average at every step, with two defaults of its
    authors' code: `eps` of 1e-16 (the paper: 1e-8), and decay that is decoupled. The rectification that their code
    turns on by default is RAdam's, and left out.

    State: `m`, `v` (the paper's $s$).

    Args:
        lr: see `Rule`.
        betas: see `Rule`.
        eps: added to the second moment at every step, and to the denominator, >= 0. Where the denominator is zero all
            the same, the update is zero.
        weight_decay: see `Rule`.
        maximize: see `Rule`.

    Raises:
        TypeError, ValueError: see `Rule`.

    Example:
        >>> import lookstep as ls
        >>> ls.AdaBelief().eps
        1e-16

    References:
        Zhuang et al., "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients", 2020,
        https://arxiv.org/abs/2010.07468
    """

    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-16
    weight_decay: Scheduled = 0.0
    maximize: bool = False

    _kernels = ("AdaBelief",)


@dataclass(frozen=True)
class Yogi(InnerRule):
    r"""Yogi: Adam with a second moment that changes by a gradient's square at most, so that rates do not jump.

    With $d = g + \lambda p$ and $m$ as in `Adam`, from $v = v_0$ on,

    $$v \leftarrow v - (1 - \beta_2) \, \mathrm{sign}(v - d^2) \, d^2$$

    $$p \leftarrow p - \eta \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}$$

    The bias corrections and the start of $v$ are those of the authors' code and optax; the paper has no corrections.
    The start of $m$ is the paper's, zero: the others start $m$ at $v_0$ too, so that they move without any gradient.
    The weight decay is an addition, in Adam's form. One huge gradient is not forgotten: $v$ falls only by what comes.

    State: `m`, `v`.

    Args:
        lr: see `Rule`.
        betas: see `Rule`.
        eps: see `Rule`.
        weight_decay: see `Rule`.
        initial_accumulator_value: what the second moment starts at, >= 0.
        maximize: see `Rule`.

    Raises:
        TypeError, ValueError: see `Rule`.

    Example:
        >>> import lookstep as ls
        >>> ls.Yogi().lr, ls.Yogi().eps
        (0.01, 0.001)

    References:
        Zaheer, Reddi, Sachan, Kale & Kumar, "Adaptive Methods for Nonconvex Optimization", 2018,
        https://papers.nips.cc/paper/8186-adaptive-methods-for-nonconvex-optimization
    """

    lr: Scheduled = 1e-2
    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-3
    weight_decay: Scheduled = 0.0
    initial_accumulator_value: float = 1e-6
    maximize: bool = False

    _kernels = ("Yogi",)


@dataclass(frozen=True)
class Adan(InnerRule):
    r"""Adan: Adam with Nesterov's look ahead, estimated from how gradients change.

    With $\Delta = g - g_{t-1}$, zero at the first step,

    $$m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad d \leftarrow \beta_2 d + (1 - \beta_2) \Delta, \qquad
    v \leftarrow \beta_3 v + (1 - \beta_3) (g + \beta_2 \Delta)^2$$

    $$u = \frac{m / (1 - \beta_1^t) + \beta_2 d / (1 - \beta_2^t)}{\sqrt{v / (1 - \beta_3^t)} + \epsilon}, \qquad
    p \leftarrow \frac{p - \eta u}{1 + \eta \lambda}$$

    With `no_prox`, the last is $p \leftarrow (1 - \eta \lambda) p - \eta u$, as in `AdamW`. The authors' code is
    followed where it differs from the paper: betas are 1 minus the paper's, averages start at zero and are corrected,
    and $\epsilon$ stands outside the root. A clipping of gradients, which that code has as well, is left out. optax
    has $1 - \beta_2$ in two places where both have $\beta_2$.

    State: `m`, `d` (the paper's $v$), `v` (the paper's $n$), `g_prev`.

    Args:
        lr: see `Rule`.
        betas: decay rates of the averages of the gradient, of its change, and of the square, each in [0, 1).
        eps: see `Rule`.
        weight_decay: see `Rule`. Decoupled.
        no_prox: decay before the step, as `AdamW`, instead of dividing after it.
        maximize: see `Rule`.

    Raises:
        TypeError, ValueError: see `Rule`.

    Example:
        >>> import lookstep as ls
        >>> ls.Adan(lr=0.01).betas
        (0.98, 0.92, 0.99)

    References:
        Xie, Zhou, Li, Lin & Yan, "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models", 2022,
        https://arxiv.org/abs/2208.06677
    """

    _: KW_ONLY
    betas: tuple[float, float, float] = (0.98, 0.92, 0.99)
    eps: float = 1e-8
    weight_decay: Scheduled = 0.0
    no_prox: bool = False
    maximize: bool = False

    _kernels = ("Adan",)
    _checks: ClassVar[Mapping[str, Check]] = {**InnerRule._checks, "betas": each(below_one, below_one, below_one)}


@dataclass(frozen=True)
class ScheduleFreeSGD(InnerRule):
    r"""Schedule-Free SGD: an average of the weights takes the place of a decaying learning rate.

    Gradients are taken at $y$, which is what the parameters hold; what should be evaluated is the average $x$, which
    `Optimizer.slow_weights` shows:

    $$y = (1 - \mu) z + \mu x, \qquad z \leftarrow z - \eta_t (g + \lambda y), \qquad x \leftarrow (1 - c) x + c z$$

    with $\eta_t = \eta \min(1, t / \text{warmup\_steps})$ and $c = w_t / \sum_{i \le t} w_i$, where
    $w_t = t^r (\max_{i \le t} \eta_i)^{\text{weight\_lr\_power}}$. As in the authors' code, $x$ is not kept, but
    follows from $y$ and $z$, so that weights that were moved from outside count; and $\lambda$ acts at $y$.

    State: `z`.

    Args:
        lr: see `Rule`. Larger than for plain SGD, by 10 to 50 times.
        momentum: how near the average gradients are taken, in (0, 1).
        weight_decay: see `Rule`.
        warmup_steps: steps until the whole learning rate is reached, an integer >= 0.
        r: the power of the step count that a step weighs in the average, >= 0.
        weight_lr_power: the power of the largest learning rate so far that a step weighs in the average, >= 0.
        maximize: see `Rule`.

    Raises:
        TypeError, ValueError: see `Rule`.

    Example:
        >>> import numpy as np
        >>> import lookstep as ls
        >>> w = np.array([1.0])
        >>> opt = ls.Optimizer(w, ls.ScheduleFreeSGD(lr=0.5))
        >>> for _ in range(20):
        ...     opt.step(w.copy())  # the gradient of w^2 / 2
        >>> with opt.slow_weights() as average:
        ...     print(average.round(3))
        [-0.034]

    References:
        Defazio et al., "The Road Less Scheduled", 2024, https://arxiv.org/abs/2405.15682
    """

    lr: Scheduled = 1.0
    _: KW_ONLY
    momentum: float = 0.9
    weight_decay: Scheduled = 0.0
    warmup_steps: int = 0
    r: float = 0.0
    weight_lr_power: float = 2.0
    maximize: bool = False

    _kernels = ("ScheduleFreeSgd",)
    _checks: ClassVar[Mapping[str, Check]] = {**InnerRule._checks, "momentum": within_one}


@dataclass(frozen=True)
class ScheduleFreeAdamW(InnerRule):
    r"""Schedule-Free AdamW: an average of the weights takes the place of momentum and of a decaying learning rate.

    Gradients are taken at $y$, which is what the parameters hold; what should be evaluated is the average $x$, which
    `Optimizer.slow_weights` shows:

    $$y = (1 - \beta_1) z + \beta_1 x, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2$$

    $$z \leftarrow z - \eta_t \left(\frac{g}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} + \lambda y\right), \qquad
    x \leftarrow (1 - c) x + c z$$

    with $\eta_t$ and $c$ as in `ScheduleFreeSGD`. As in the authors' code, $x$ is not kept, but follows from $y$ and
    $z$, so that weights that were moved from outside count; bias is corrected in $v$ (the paper: in $\eta_t$); and the
    decay, which is decoupled, acts at $y$.

    State: `v`, `z`.

    Args:
        lr: see `Rule`. Larger than for AdamW, by up to 10 times.
        betas: how near the average gradients are taken, in (0, 1), and the decay rate of the average of their square.
        eps: see `Rule`.
        weight_decay: see `Rule`.
        warmup_steps: steps until the whole learning rate is reached, an integer >= 0.
        r: the power of the step count that a step weighs in the average, >= 0.
        weight_lr_power: the power of the largest learning rate so far that a step weighs in the average, >= 0.
        maximize: see `Rule`.

    Raises:
        TypeError, ValueError: see `Rule`.

    Example:
        >>> import lookstep as ls
        >>> ls.ScheduleFreeAdamW(warmup_steps=100).lr
        0.0025

    References:
        Defazio et al., "The Road Less Scheduled", 2024, https://arxiv.org/abs/2405.15682
    """

    lr: Scheduled = 2.5e-3
    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: Scheduled = 0.0
    warmup_steps: int = 0
    r: float = 0.0
    weight_lr_power: float = 2.0
    maximize: bool = False

    _kernels = ("ScheduleFreeAdamW",)
    _checks: ClassVar[Mapping[str, Check]] = {**InnerRule._checks, "betas": each(within_one, below_one)}


@dataclass(frozen=True)
class LARS(InnerRule):
    r"""LARS: SGD with momentum, where each leaf's rate is in proportion to its weights' norm over its gradient's.

    $$q = \tau \frac{\|p\|}{\|g\| + \lambda \|p\|}, \qquad m \leftarrow \mu m + \eta q (g + \lambda p), \qquad
    p \leftarrow p - m$$

    with trust coefficient $\tau$, and norms over a whole leaf. Where one of them is zero, $q = 1$. optax divides by
    $\|g + \lambda p\|$ instead. A leaf with a gradient that is not finite is lost as a whole.

    State: `m` (the paper's $v$).

    Args:
        lr: see `Rule`.
        momentum: see `Rule`.
        weight_decay: see `Rule`.
        trust_coefficient: how far a leaf may move, in parts of its norm, at a learning rate of 1, >= 0.
        maximize: see `Rule`.

    Raises:
        TypeError, ValueError: see `Rule`.

    Example:
        >>> import lookstep as ls
        >>> ls.LARS(lr=2.0).trust_coefficient
        0.001

    References:
        You, Gitman & Ginsburg, "Large Batch Training of Convolutional Networks", 2017, https://arxiv.org/abs/1708.03888
    """

    lr: Scheduled = 1.0
    _: KW_ONLY
    momentum: Scheduled = 0.9
    weight_decay: Scheduled = 0.0
    trust_coefficient: float = 1e-3
    maximize: bool = False

    _kernels = ("Lars",)


@dataclass(frozen=True)
class LAMB(InnerRule):
    r"""LAMB: AdamW's step, scaled for each leaf to a part of its weights' norm.

    With $m$ and $v$ as in `AdamW`,

    $$d = \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} + \lambda p, \qquad
    p \leftarrow p - \eta \frac{\|p\|}{\|d\|} d$$

    with norms over a whole leaf; where one of them is zero, their quotient is 1. The norm of the weights is not bounded
    (the paper's $\phi$ is the identity). The decay is the paper's for BERT, where optax has 0. A leaf with a gradient
    that is not finite is lost as a whole.

    State: `m`, `v`.

    Args:
        lr: see `Rule`.
        betas: see `Rule`.
        eps: see `Rule`.
        weight_decay: see `Rule`. Decoupled.
        maximize: see `Rule`.

    Raises:
        TypeError, ValueError: see `Rule`.

    Example:
        >>> import lookstep as ls
        >>> ls.LAMB(lr=2e-3).weight_decay
        0.01

    References:
        You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 Minutes", 2019,
        https://arxiv.org/abs/1904.00962
    """

    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: Scheduled = 1e-2
    maximize: bool = False

    _kernels = ("Lamb",)


@dataclass(frozen=True)
class Prodigy(InnerRule):
    r"""Prodigy: Adam that finds its own learning rate, from how far the weights have come and could have.

    With start $p_0$, an estimate $d$ of the distance to the solution that starts at $d_0$,
    $\gamma = \eta d$ (with `use_bias_correction`, times $\sqrt{1 - \beta_2^t} / (1 - \beta_1^t)$), and sums over all
    leaves,

    $$m \leftarrow \beta_1 m + (1 - \beta_1) d g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) d^2 g^2, \qquad
    s \leftarrow \beta_3 s + \frac{d}{d_0} \gamma g$$

    $$r \leftarrow \beta_3 r + \frac{d}{d_0} \gamma \langle g, p_0 - p \rangle, \qquad \hat d = c \frac{r}{\|s\|_1}$$

    and, with $d'$ the largest $\hat d$ so far, but at most `growth_rate` times $d$,

    $$p \leftarrow (1 - \gamma \lambda) p - \gamma \frac{m}{\sqrt{v} + d' \epsilon}, \qquad d \leftarrow d'$$

    This is the authors' code; the paper has $d \epsilon$ in the denominator, and neither $c$, decay nor bias
    correction. optax always corrects bias, and has no `growth_rate`.

    State: `m`, `v`, `s`, `p0`.

    Args:
        lr: see `Rule`. A factor of what is found: leave it at 1, or put a schedule here.
        betas: see `Rule`.
        beta3: decay rate of the sums, in [0, 1); `None` is the root of `betas[1]`.
        eps: see `Rule`.
        weight_decay: see `Rule`. Decoupled.
        d0: the first estimate, too small rather than too large, > 0.
        d_coef: a factor of the estimate, >= 0; the one to tune.
        growth_rate: the largest factor by which the estimate grows at a step, >= 1.
        use_bias_correction: correct bias as Adam does.
        safeguard_warmup: leave $\gamma$'s $\eta$ out of $s$, for a learning rate that is warmed up.
        maximize: see `Rule`.

    Raises:
        TypeError, ValueError: see `Rule`.

    Example:
        >>> import lookstep as ls
        >>> ls.Prodigy(d_coef=0.5).lr
        1.0

    References:
        Mishchenko & Defazio, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", 2023,
        https://arxiv.org/abs/2306.06101
    """

    lr: Scheduled = 1.0
    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.999)
    beta3: float | None = None
    eps: float = 1e-8
    weight_decay: Scheduled = 0.0
    d0: float = 1e-6
    d_coef: float = 1.0
    growth_rate: float = math.inf
    use_bias_correction: bool = False
    safeguard_warmup: bool = False
    maximize: bool = False

    _kernels = ("Prodigy",)

    def _hyper(self, step: int = 0) -> dict[str, float]:
        beta3 = math.sqrt(self.betas[1]) if self.beta3 is None else self.beta3
        return InnerRule._hyper(replace(self, beta3=beta3), step)
