"""The oracle: every rule, and Lookahead, as the papers write them.

One function a rule moves one array by one gradient. `state` is a dict that the function fills on its first call, under
the names that the rule has for it; `t` counts steps from 1. All is computed in the type of what comes in: float64, or
80 bits, where hyper-parameters have to be of that type, too. Nothing here is taken from the package, nothing is fast,
and what depends on the step alone is exact.
"""

from decimal import Decimal, localcontext
from functools import lru_cache

import numpy as np


def sgd(p, g, state, t, *, lr, momentum, dampening, weight_decay, nesterov):
    g = g + weight_decay * p
    if momentum == 0:
        return p - lr * g
    state["m"] = g if t == 1 else momentum * state["m"] + (1 - dampening) * g
    return p - lr * (g + momentum * state["m"] if nesterov else state["m"])


DIGITS = 60
"""Of what depends on the step alone: a difference of float64 powers would lose the digits that they have in common."""


def decimal(x):
    """A float of any type, to all its digits."""
    whole, part = x.as_integer_ratio()
    return Decimal(whole) / part


@lru_cache(maxsize=None, typed=True)
def complement(b, t):
    """1 - b^t, rounded once."""
    with localcontext(prec=DIGITS):
        return type(b)(str(1 - decimal(b) ** t))


def moments(g, state, b1, b2):
    state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * g
    state["v"] = b2 * state.get("v", 0.0) + (1 - b2) * g**2
    return state["m"], state["v"]


def ratio(a, b):
    """A / b, and zero where b is."""
    return np.divide(a, b, out=np.zeros_like(a), where=b != 0)


def adam_direction(g, state, t, betas, eps, amsgrad):
    b1, b2 = betas
    m, v = moments(g, state, b1, b2)
    if amsgrad:
        v = state["v_max"] = np.maximum(state.get("v_max", 0.0), v)
    return ratio(m / complement(b1, t), np.sqrt(v / complement(b2, t)) + eps)


def adam(p, g, state, t, *, lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay):
    if decoupled_weight_decay:
        return adamw(p, g, state, t, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)
    return p - lr * adam_direction(g + weight_decay * p, state, t, betas, eps, amsgrad)


def adamw(p, g, state, t, *, lr, betas, eps, weight_decay, amsgrad):
    return p - lr * weight_decay * p - lr * adam_direction(g, state, t, betas, eps, amsgrad)


def decayed(p, g, lr, weight_decay, decoupled):
    """The weights and the gradient after weight decay."""
    return (p - lr * weight_decay * p, g) if decoupled else (p, g + weight_decay * p)


def radam(p, g, state, t, *, lr, betas, eps, weight_decay, decoupled_weight_decay):
    b1, b2 = betas
    p, g = decayed(p, g, lr, weight_decay, decoupled_weight_decay)
    m, v = moments(g, state, b1, b2)
    m_hat = m / complement(b1, t)
    with localcontext(prec=DIGITS):
        power = decimal(b2) ** t
        rho_inf = 2 / (1 - decimal(b2)) - 1
        rho = rho_inf - 2 * t * power / (1 - power)
        if rho <= 5:
            return p - lr * m_hat
        squared = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
        r = type(b2)(str(squared.sqrt()))
    return p - lr * r * ratio(m_hat * np.sqrt(complement(b2, t)), np.sqrt(v) + eps)


def nadam(p, g, state, t, *, lr, betas, eps, weight_decay, momentum_decay, decoupled_weight_decay):
    b1, b2 = betas
    p, g = decayed(p, g, lr, weight_decay, decoupled_weight_decay)
    m, v = moments(g, state, b1, b2)
    mu, mu_next = (b1 * (1 - type(b1)(0.96) ** (i * momentum_decay) / 2) for i in (t, t + 1))
    product = state["mu_product"] = state.get("mu_product", 1.0) * mu
    m_bar = (1 - mu) * g / (1 - product) + mu_next * m / (1 - product * mu_next)
    return p - lr * ratio(m_bar, np.sqrt(v / complement(b2, t)) + eps)


def adamax(p, g, state, t, *, lr, betas, eps, weight_decay):
    b1, b2 = betas
    g = g + weight_decay * p
    state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * g
    state["u"] = np.maximum(b2 * state.get("u", 0.0), np.abs(g) + eps)
    return p - lr * ratio(state["m"] / complement(b1, t), state["u"])


def adagrad(p, g, state, t, *, lr, lr_decay, weight_decay, initial_accumulator_value, eps):
    g = g + weight_decay * p
    state["v"] = state.get("v", initial_accumulator_value) + g**2
    return p - lr / (1 + (t - 1) * lr_decay) * ratio(g, np.sqrt(state["v"]) + eps)


def adadelta(p, g, state, t, *, lr, rho, eps, weight_decay):
    g = g + weight_decay * p
    state["v"] = rho * state.get("v", 0.0) + (1 - rho) * g**2
    u = state.get("u", np.zeros_like(g))
    x = ratio(np.sqrt(u + eps), np.sqrt(state["v"] + eps)) * g
    state["u"] = rho * u + (1 - rho) * x**2
    return p - lr * x


def rmsprop(p, g, state, t, *, lr, alpha, eps, weight_decay, momentum, centered):
    """The variance is summed as such, from deviations: no difference of large numbers is taken.

    With weights w that sum to s, the sum of w g^2 less the square of the sum of w g = m is that of w (g - m / s)^2, and
    (1 / s - 1) m^2. Where it goes on from a state, gradients are not known, and it is the difference.
    """
    g = g + weight_decay * p
    state["v"] = alpha * state.get("v", 0.0) + (1 - alpha) * g**2
    square = state["v"]
    if centered and t > 1 and "gradients" not in state:
        state["m"] = alpha * state["m"] + (1 - alpha) * g
        square = np.maximum(0, square - state["m"] ** 2)
    elif centered:
        past = state.setdefault("gradients", [])
        past.append(g)
        w = np.reshape([(1 - alpha) * alpha**i for i in reversed(range(t))], (-1, *(1,) * np.ndim(g)))
        state["m"] = (w * past).sum(axis=0)
        s = complement(alpha, t)
        square = (w * (past - state["m"] / s) ** 2).sum(axis=0) + (1 - s) / s * state["m"] ** 2
    state["b"] = momentum * state.get("b", 0.0) + ratio(g, np.sqrt(square) + eps)
    return p - lr * state["b"]


def rprop(p, g, state, t, *, lr, etas, step_sizes):
    minus, plus = etas
    sign, size = state.get("s", np.zeros_like(g)), state.get("u", np.full_like(g, lr))
    change = np.sign(g) * sign
    state["u"] = np.clip(size * np.select([change > 0, change < 0], [plus, minus], 1.0), *step_sizes)
    state["s"] = np.where(change < 0, 0.0, np.sign(g))
    return p - state["u"] * state["s"]


def asgd(p, g, state, t, *, lr, lambd, alpha, t0, weight_decay):
    """The average is that of the weights after step t0 + 1, which ends the steps before averaging."""
    eta = lr / (1 + lambd * lr * (t - 1)) ** alpha
    p = p - eta * (lambd * p + g + weight_decay * p)
    n = t - 1 - t0
    state["average"] = p if n <= 1 else state["average"] + (p - state["average"]) / n
    return p


def lookahead(rule, p, gradient, steps, *, sync_period=None, slow_step=1.0):
    """The fast weights after each of `steps` steps; without a `sync_period`, the inner rule's alone.

    `rule(p, g, state, t)` is an inner rule; `gradient(p, i)` counts steps from 0.
    """
    state = {}
    for i in range(steps):
        if sync_period and i % sync_period == 0:
            slow = p
        p = rule(p, gradient(p, i), state, i + 1)
        if sync_period and (i + 1) % sync_period == 0:
            p = slow + slow_step * (p - slow)
        yield p


def nested(rule, p, gradient, steps, levels):
    """The fast weights after each of `steps` steps within any depth of Lookahead.

    `levels` are dicts, the innermost first: `sync_period` (steps; for the others, syncs of the level within),
    `slow_step`, and where they differ from the paper's, `inner_state` and `outer`, a pair of its momentum and
    "heavy ball" or "nesterov". Within a level are the rule's state, and the momentum buffers of the levels within it.
    What the rule calls `z`, `p0` or `average` begins as the weights, all else as zero. `gradient` may give `None`.
    """
    slow, before, done = [None] * len(levels), [None] * len(levels), [0] * len(levels)
    momenta, state, t = [0.0] * len(levels), {}, 0

    def within(depth):
        begun = dict.fromkeys(("z", "p0", "average"), p) if t == 0 else {}
        return begun | state | {("u", level): momenta[level] for level in range(depth)}

    for i in range(steps):
        for depth in range(len(levels)):
            if done[depth] > 0:
                break
            slow[depth], before[depth] = p, within(depth)
        g = gradient(p, i)
        if g is not None:
            t += 1
            p = rule(p, g, state, t)
        for depth, level in enumerate(levels):
            done[depth] += 1
            if done[depth] < level["sync_period"]:
                break
            done[depth] = 0
            alpha, delta = level["slow_step"], slow[depth] - p
            if outer := level.get("outer"):
                mu, kind = outer
                momenta[depth] = mu * momenta[depth] + delta
                p = slow[depth] - alpha * (delta + mu * momenta[depth] if kind == "nesterov" else momenta[depth])
            else:
                p = slow[depth] - alpha * delta
            part = min(alpha, 1.0)
            match level.get("inner_state", "keep"):
                case "reset":
                    state.clear()
                    momenta[:depth] = [0.0] * depth
                    t = 0
                case "pullback":
                    for name, now in within(depth).items():
                        if isinstance(now, np.ndarray) and (
                            t or isinstance(name, tuple)
                        ):  # What depends on the step count alone stays, as that does.
                            moved = (1 - part) * before[depth].get(name, 0.0) + part * now
                            if isinstance(name, tuple):
                                momenta[name[1]] = moved
                            else:
                                state[name] = moved
        yield p


def lion(p, g, state, t, *, lr, betas, weight_decay):
    b1, b2 = betas
    m = state.get("m", 0.0)
    c = b1 * m + (1 - b1) * g
    state["m"] = b2 * m + (1 - b2) * g
    return p - lr * (np.sign(c) + weight_decay * p)


def signum(p, g, state, t, *, lr, momentum, weight_decay):
    m = state["m"] = momentum * state.get("m", 0.0) + (1 - momentum) * g
    return p - lr * (np.sign(m) + weight_decay * p)


def adabelief(p, g, state, t, *, lr, betas, eps, weight_decay):
    b1, b2 = betas
    m = state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * g
    v = state["v"] = b2 * state.get("v", 0.0) + (1 - b2) * (g - m) ** 2 + eps
    direction = ratio(m / complement(b1, t), np.sqrt(v / complement(b2, t)) + eps)
    return p - lr * weight_decay * p - lr * direction


def yogi(p, g, state, t, *, lr, betas, eps, weight_decay, initial_accumulator_value):
    b1, b2 = betas
    g = g + weight_decay * p
    m = state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * g
    v = state.get("v", initial_accumulator_value)
    v = state["v"] = v - (1 - b2) * np.sign(v - g**2) * g**2
    return p - lr * ratio(m / complement(b1, t), np.sqrt(v / complement(b2, t)) + eps)


def adan(p, g, state, t, *, lr, betas, eps, weight_decay, no_prox):
    b1, b2, b3 = betas
    change = g - state.get("g_prev", g)
    state["g_prev"] = g
    m = state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * g
    d = state["d"] = b2 * state.get("d", 0.0) + (1 - b2) * change
    v = state["v"] = b3 * state.get("v", 0.0) + (1 - b3) * (g + b2 * change) ** 2
    ahead = m / complement(b1, t) + b2 * d / complement(b2, t)
    u = lr * ratio(ahead, np.sqrt(v / complement(b3, t)) + eps)
    return p - lr * weight_decay * p - u if no_prox else (p - u) / (1 + lr * weight_decay)


def schedule_free(y, step, state, t, *, lr, beta, warmup_steps, r, weight_lr_power):
    """Moves `y` by `step`, the direction of the base optimizer; `state` has x, as the paper, and only for y moved."""
    rate = lr * t / warmup_steps if t < warmup_steps else lr
    state["lr_max"] = max(rate, state.get("lr_max", 0.0))
    weight = t**r * state["lr_max"] ** weight_lr_power
    state["weight_sum"] = state.get("weight_sum", 0.0) + weight
    c = weight / state["weight_sum"] if state["weight_sum"] else 0.0
    z = state.get("z", y)
    x = (y - (1 - beta) * z) / beta
    z = state["z"] = z - rate * step
    x = state["x"] = (1 - c) * x + c * z
    return (1 - beta) * z + beta * x


def schedule_free_sgd(p, g, state, t, *, momentum, weight_decay, **schedule):
    return schedule_free(p, g + weight_decay * p, state, t, beta=momentum, **schedule)


def schedule_free_adamw(p, g, state, t, *, betas, eps, weight_decay, **schedule):
    b1, b2 = betas
    v = state["v"] = b2 * state.get("v", 0.0) + (1 - b2) * g**2
    step = ratio(g, np.sqrt(v / complement(b2, t)) + eps) + weight_decay * p
    return schedule_free(p, step, state, t, beta=b1, **schedule)


def lars(p, g, state, t, *, lr, momentum, weight_decay, trust_coefficient):
    weights, gradients = np.linalg.norm(p), np.linalg.norm(g)
    trust = trust_coefficient * weights / (gradients + weight_decay * weights) if weights and gradients else 1
    m = state["m"] = momentum * state.get("m", 0.0) + lr * trust * (g + weight_decay * p)
    return p - m


def lamb(p, g, state, t, *, lr, betas, eps, weight_decay):
    r = adam_direction(g, state, t, betas, eps, amsgrad=False) + weight_decay * p
    weights, updates = np.linalg.norm(p), np.linalg.norm(r)
    return p - lr * (weights / updates if weights and updates else 1) * r


def prodigy(
    p,
    g,
    state,
    t,
    *,
    lr,
    betas,
    beta3,
    eps,
    weight_decay,
    d0,
    d_coef,
    growth_rate,
    use_bias_correction,
    safeguard_warmup,
):
    b1, b2 = betas
    b3 = np.sqrt(b2) if beta3 is None else beta3
    p0 = state.setdefault("p0", p)
    d = state.get("d", d0)
    gamma = d * lr * (np.sqrt(complement(b2, t)) / complement(b1, t) if use_bias_correction else 1)
    m = state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * d * g
    v = state["v"] = b2 * state.get("v", 0.0) + (1 - b2) * d**2 * g**2
    s = state["s"] = b3 * state.get("s", 0.0) + d / d0 * (d if safeguard_warmup else gamma) * g
    if not s.any() or lr == 0:
        return p
    r = state["d_numerator"] = b3 * state.get("d_numerator", 0.0) + d / d0 * gamma * np.sum(g * (p0 - p))
    estimate = d_coef * r / np.abs(s).sum()
    d_max = state["d_max"] = max(state.get("d_max", d0), estimate)
    state["d"] = min(d_max, (max(d, estimate) if d == d0 else d) * growth_rate)
    return p - gamma * weight_decay * p - gamma * ratio(m, np.sqrt(v) + state["d"] * eps)
