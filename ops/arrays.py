"""One code path for numpy, torch and cupy: which library an array belongs to, and the way there and back.

The only file that imports cupy, and only when a cupy array or a CUDA device is asked for. torch too is imported on use only:
a worker that fits or scores numpy arrays starts in a quarter of the time without it.
"""

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

Array = Any  # numpy.ndarray, torch.Tensor or cupy.ndarray


def namespace(x: Array) -> ModuleType:
    """The module, numpy or cupy, whose functions accept `x` (an ndarray of either)."""
    cupy = sys.modules.get("cupy")
    return cupy if cupy is not None and isinstance(x, cupy.ndarray) else np


def is_tensor(x: Any) -> bool:
    """Whether `x` is a torch tensor; there is none where nobody has imported torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


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
    if is_tensor(x):
        x = x.detach()
        if str(x.dtype) == "torch.bfloat16":
            x = x.float()
        return import_cupy().from_dlpack(x) if x.is_cuda else x.numpy()
    return x if hasattr(x, "__array_namespace__") else np.asarray(x)


def to_numpy(x: Array) -> np.ndarray:
    """`x` on the host, as a numpy array (bfloat16 becomes float32)."""
    x = as_ndarray(x.cpu() if is_tensor(x) else x)
    return x if isinstance(x, np.ndarray) else np.asarray(x.get() if hasattr(x, "get") else x)


def like(result: Array, reference: Array) -> Array:
    """The ndarray `result` as the kind of array that `reference` is (tensor on its device, numpy or cupy)."""
    if is_tensor(reference):
        torch = sys.modules["torch"]
        tensor = torch.from_numpy(result) if isinstance(result, np.ndarray) else torch.from_dlpack(result)
        return tensor.to(reference.device)
    return result


def accepts_arrays(function: "Callable[..., torch.Tensor]") -> Callable[..., Array]:
    """Let a function of tensors take numpy arrays too: if its first argument is no tensor, numpy comes back.

    Python numbers, strings and None pass through; dtypes are kept.
    """

    @functools.wraps(function)
    def wrapper(first: Array, *args: Any, **kwargs: Any) -> Array:
        import torch

        if isinstance(first, torch.Tensor):
            device = first.device
            move = functools.partial(_as_tensor, device=device)
            return function(first, *map(move, args), **{k: move(v) for k, v in kwargs.items()})
        move = functools.partial(_as_tensor, device=torch.device("cpu"))
        result = function(move(np.asarray(first)), *map(move, args), **{k: move(v) for k, v in kwargs.items()})
        return result.detach().numpy()

    return wrapper


def _as_tensor(x: Any, device: "torch.device") -> Any:
    if isinstance(x, np.ndarray | list):
        import torch

        # by numpy: a list of floats is then float64, not torch's default dtype
        return torch.as_tensor(np.asarray(x), device=device)
    return x
