"""The float64 oracle: every rule, and Lookahead, as the papers write them.

One function a rule moves one array by one gradient. `state` is a dict that the function fills on its first call; `t`
counts steps from 1. Nothing here is taken from the package, nothing is fast,
and what depends on the step alone is exact.
"""

from fractions import Fraction

import numpy as np


def sgd(p, g, state, t, *, lr, momentum, dampening, weight_decay, nesterov):
    g = g + weight_decay * p
    if momentum == 0:
        return p - lr * g
    state["m"] = g if t == 1 else momentum * state["m"] + (1 - dampening) * g
    return p - lr * (g + momentum * state["m"] if nesterov else state["m"])


def complement(b, t):
    """1 - b^t, exactly: a difference of float64 powers loses the digits that they have in common."""
    return float(1 - Fraction(b) ** t)


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


def adam(p, g, state, t, *, lr, betas, eps, weight_decay, amsgrad):
    return p - lr * adam_direction(g + weight_decay * p, state, t, betas, eps, amsgrad)


def adamw(p, g, state, t, *, lr, betas, eps, weight_decay, amsgrad):
    return p - lr * weight_decay * p - lr * adam_direction(g, state, t, betas, eps, amsgrad)


def radam(p, g, state, t, *, lr, betas, eps, weight_decay):
    b1, b2 = betas
    m, v = moments(g + weight_decay * p, state, b1, b2)
    m_hat = m / complement(b1, t)
    power = Fraction(b2) ** t
    rho_inf = 2 / (1 - Fraction(b2)) - 1
    rho = rho_inf - 2 * t * power / (1 - power)
    if rho <= 5:
        return p - lr * m_hat
    r = np.sqrt(float((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)))
    return p - lr * r * ratio(m_hat * np.sqrt(complement(b2, t)), np.sqrt(v) + eps)


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
