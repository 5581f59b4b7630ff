"""Inner optimizers as pure data: one frozen dataclass a rule.

A rule holds hyper-parameters and nothing else, so it can be printed, compared and shared between optimizers. Names and
defaults are torch's where torch has the rule, and the paper's otherwise. What a step does is in `src/rules/`, one file
a rule.
"""

from dataclasses import KW_ONLY, dataclass, fields
from typing import ClassVar

from .hyper import Rule, Scheduled, at_step, is_scheduled


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

    Raises:
        TypeError, ValueError: see `Rule`.

    Example:
        >>> import lookstep as ls
        >>> ls.SGD(lr=0.1, momentum=0.9)
        SGD(lr=0.1, momentum=0.9, dampening=0.0, weight_decay=0.0, nesterov=False)

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
    maximize: bool = False

    _kernels = ("Adam", "AdamAmsgrad")

    @property
    def _kernel(self) -> str:
        return self._kernels[self.amsgrad]


@dataclass(frozen=True)
class AdamW(Adam):
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
    weight_decay: Scheduled = 1e-2

    _kernels = ("AdamW", "AdamWAmsgrad")


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

    Raises:
        TypeError, ValueError: see `Rule`.

    Example:
        >>> import lookstep as ls
        >>> ls.RAdam(lr=3e-3)
        RAdam(lr=0.003, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0)

    References:
        Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", 2020, https://arxiv.org/abs/1908.03265
    """

    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: Scheduled = 0.0
    maximize: bool = False

    _kernels = ("RAdam",)
