"""One code path for numpy, torch and cupy: which library an array belongs to, and the way there and back.

The only file that imports cupy, and only when a cupy array or a CUDA device is asked for.
"""

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch

Array = Any  # numpy.ndarray, torch.Tensor or cupy.ndarray


def namespace(x: Array) -> ModuleType:
    """The module, numpy or cupy, whose functions accept `x` (an ndarray of either)."""
    cupy = sys.modules.get("cupy")
    return cupy if cupy is not None and isinstance(x, cupy.ndarray) else np


def import_cupy() -> ModuleType:
    """Import cupy; RuntimeError with the way out where it is missing."""
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError("cupy is not installed: pip install 'hardset[gpu]', or run on the CPU") from error
    return cupy


def as_ndarray(x: Array) -> Array:
    """`x` as an ndarray without a copy where that is possible: CPU tensors as numpy, CUDA tensors as cupy.

    bfloat16, which neither library has, becomes float32.
    """
    if isinstance(x, torch.Tensor):
        x = x.detach()
        if x.dtype == torch.bfloat16:
            x = x.float()
        return import_cupy().from_dlpack(x) if x.is_cuda else x.numpy()
    return x if hasattr(x, "__array_namespace__") else np.asarray(x)


def to_numpy(x: Array) -> np.ndarray:
    """`x` on the host, as a numpy array (bfloat16 becomes float32)."""
    x = as_ndarray(x.cpu() if isinstance(x, torch.Tensor) else x)
    return x if isinstance(x, np.ndarray) else np.asarray(x.get() if hasattr(x, "get") else x)


def like(result: Array, reference: Array) -> Array:
    """The ndarray `result` as the kind of array that `reference` is (tensor on its device, numpy or cupy)."""
    if isinstance(reference, torch.Tensor):
        tensor = torch.from_numpy(result) if isinstance(result, np.ndarray) else torch.from_dlpack(result)
        return tensor.to(reference.device)
    return result


def accepts_arrays(function: Callable[..., torch.Tensor]) -> Callable[..., Array]:
    """Let a function of tensors take numpy arrays too: if its first argument is no tensor, numpy comes back.

    Python numbers, strings and None pass through; dtypes are kept.
    """

    @functools.wraps(function)
    def wrapper(first: Array, *args: Any, **kwargs: Any) -> Array:
        if isinstance(first, torch.Tensor):
            device = first.device
            move = functools.partial(_as_tensor, device=device)
            return function(first, *map(move, args), **{k: move(v) for k, v in kwargs.items()})
        move = functools.partial(_as_tensor, device=torch.device("cpu"))
        result = function(move(np.asarray(first)), *map(move, args), **{k: move(v) for k, v in kwargs.items()})
        return result.detach().numpy()

    return wrapper


def _as_tensor(x: Any, device: torch.device) -> Any:
    if isinstance(x, np.ndarray | list):
        return torch.as_tensor(x, device=device)
    return x
