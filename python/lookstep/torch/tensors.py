"""Tensors as NumPy arrays over the same memory, and arrays as tensors."""

from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]


def array_of(name: str, tensor: torch.Tensor) -> Array:
    """The tensor's numbers as an array of its shape, strides and dtype: nothing is copied.

    Raises:
        TypeError: if its numbers are not in this process's memory, one by one.
    """
    try:
        plain = tensor.detach() if tensor.requires_grad else tensor
        array: Array = (plain.view(torch.uint16) if plain.dtype is torch.bfloat16 else plain).numpy()
        return array.view(_bfloat16()) if plain.dtype is torch.bfloat16 else array
    except (TypeError, RuntimeError, ValueError) as error:
        raise _refusal(name, tensor, error) from None


def _refusal(name: str, tensor: torch.Tensor, error: Exception) -> Exception:
    """Why a tensor has no such array, and what to use."""
    if isinstance(tensor, torch.nn.parameter.UninitializedTensorMixin):
        return ValueError(f"{name} has no shape yet: run the model once before the optimizer is made")
    if tensor.layout is not torch.strided:
        return TypeError(
            f"{name} is {str(tensor.layout).removeprefix('torch.')}, but lookstep.torch.Optimizer steps dense tensors: "
            "use lookstep.torch.Lookahead around an optimizer that takes it, such as torch.optim.SparseAdam"
        )
    if tensor.device.type != "cpu":
        return TypeError(
            f"{name} is on {tensor.device}, but lookstep.torch.Optimizer steps tensors on the CPU: "
            "use lookstep.torch.Lookahead around an optimizer of torch's"
        )
    return TypeError(
        f"{name} is a {type(tensor).__name__} that cannot be seen as a NumPy array ({error}): "
        "use lookstep.torch.Lookahead around an optimizer of torch's"
    )


def _bfloat16() -> Any:
    try:
        from ml_dtypes import bfloat16
    except ImportError as error:
        raise ImportError('tensors of bfloat16 need ml_dtypes: pip install "lookstep[torch]"') from error
    return bfloat16


def as_tensor(array: Array, dtype: str | None = None) -> torch.Tensor:
    """A tensor over the memory of an array; of `dtype`, where that is bfloat16 and the array has its bits."""
    if (dtype or array.dtype.name) == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def state_array(tensor: torch.Tensor, dtype: str) -> Array:
    """A tensor of a state dict as an array of what is kept, in the dtype that it is kept in; it may share memory."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point() and dtype in ("float32", "float64"):
        tensor = tensor.to(getattr(torch, dtype))
    elif tensor.dtype is torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    array: Array = tensor.numpy()
    return array
