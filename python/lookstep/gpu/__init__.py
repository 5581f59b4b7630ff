"""Arrays on the GPU: buffers of wgpu-py as parameters and gradients, stepped by compute shaders on the user's device.

Nothing else of the library imports wgpu, and this module is only imported where it is used.
"""

try:
    import wgpu as _wgpu  # noqa: F401
except ImportError as error:
    raise ImportError('GPU arrays need wgpu: pip install "lookstep[gpu]"') from error

from .arrays import Arena, View
from .decisions import LossScale
from .device import default_device
from .engine import Stats

__all__ = ["Arena", "LossScale", "Stats", "View", "default_device"]
