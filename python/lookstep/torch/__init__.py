"""Optimizers of torch: the compiled rules over the memory of CPU tensors, and Lookahead around any optimizer.

Nothing else of the library imports torch, and this module is only imported where it is used.
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError('lookstep.torch needs torch: pip install "lookstep[torch]"') from error

from .lookahead import Lookahead
from .optimizer import Optimizer

__all__ = ["Lookahead", "Optimizer"]
