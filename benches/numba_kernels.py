"""What a user of numba would write: one fused loop over each piece of the arrays.

A step is p = keep * p - size * m / (root * sqrt(v) + eps). Pieces are small enough to be in the cache when Lookahead
comes to them: `phase` 1 begins a cycle, 2 ends one.
"""

import warnings
from functools import cache
from math import sqrt
from typing import Any

from numba import njit, prange
from numba.core.errors import NumbaTypeSafetyWarning

warnings.simplefilter("ignore", NumbaTypeSafetyWarning)  # prange counts without a sign, lists with one


def adam(
    P: Any, G: Any, M: Any, V: Any, S: Any, phase: Any, slow_step: Any,
    keep: Any, root: Any, size: Any, eps: Any, b1: Any, a1: Any, b2: Any, a2: Any,
) -> None:  # fmt: skip
    for c in prange(len(P)):
        p, g, m, v = P[c], G[c], M[c], V[c]
        if phase == 1:
            S[c][:] = p
        for i in range(p.size):
            m[i] = b1 * m[i] + a1 * g[i]
            v[i] = b2 * v[i] + a2 * g[i] * g[i]
            p[i] = keep * p[i] - size * m[i] / (root * sqrt(v[i]) + eps)
        if phase == 2:
            slow = S[c]
            for i in range(p.size):
                p[i] = slow[i] + slow_step * (p[i] - slow[i])


def sgd(P: Any, G: Any, M: Any, S: Any, phase: Any, slow_step: Any, size: Any, b1: Any) -> None:
    for c in prange(len(P)):
        p, g, m = P[c], G[c], M[c]
        if phase == 1:
            S[c][:] = p
        for i in range(p.size):
            m[i] = b1 * m[i] + g[i]
            p[i] -= size * m[i]
        if phase == 2:
            slow = S[c]
            for i in range(p.size):
                p[i] = slow[i] + slow_step * (p[i] - slow[i])


@cache
def compiled(kernel: Any, parallel: bool) -> Any:
    # Not kept on disk: there, one compiled for a single thread would be taken for the other.
    return njit(kernel, parallel=parallel, error_model="numpy")
