"""One code path for numpy, torch and cupy: which library an array belongs to, and the way there and back.

The only file that imports cupy, and only when a cupy array or a CUDA device is asked for. torch too is imported on use only:
a worker that fits or scores numpy arrays starts in a quarter of the time without it.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

Array = Any  # numpy.ndarray, torch.Tensor or cupy.ndarray


def namespace(x: Array) -> ModuleType:
    """The module, numpy or cupy, whose functions accept `x`, an ndarray of either and of any shape."""
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


def on_device(x: np.ndarray, device: str) -> Array:
    """A numpy array where it is computed on: itself for "cpu", a cupy array of the same shape for "cuda"."""
    return import_cupy().asarray(x) if device == "cuda" else x


def as_ndarray(x: Array) -> Array:
    """`x`, of any shape, as an ndarray without a copy where that is possible: CPU tensors as numpy, CUDA tensors as cupy.

    bfloat16, which neither library has, becomes float32.
    """
    if is_tensor(x):
        x = x.detach()
        if str(x.dtype) == "torch.bfloat16":
            x = x.float()
        return import_cupy().from_dlpack(x) if x.is_cuda else x.numpy()
    return x if hasattr(x, "__array_namespace__") else np.asarray(x)


def to_numpy(x: Array) -> np.ndarray:
    """`x`, of any shape, on the host as a numpy array (bfloat16 becomes float32)."""
    x = as_ndarray(x.cpu() if is_tensor(x) else x)
    return x if isinstance(x, np.ndarray) else np.asarray(x.get() if hasattr(x, "get") else x)


def like(result: Array, reference: Array) -> Array:
    """The ndarray `result`, of any shape, as the kind of array that `reference` is (tensor on its device, numpy or cupy)."""
    if is_tensor(reference):
        torch = sys.modules["torch"]
        tensor = torch.from_numpy(result) if isinstance(result, np.ndarray) else torch.from_dlpack(result)
        return tensor.to(reference.device)
    return result


def as_tensor(name: str, x: Any, device: "torch.device | None" = None) -> "torch.Tensor":
    """`x`, an array or list of numbers of any shape, as a tensor of the same values; a copy where torch needs one.

    torch takes no array of negative strides or foreign byte order, and warns of one that is read-only, as Arrow's are. A list
    goes by numpy: its floats become float64, not torch's default type. ValueError with `name` where `x` isn't numbers.
    """
    import torch

    if isinstance(x, torch.Tensor):
        return x
    array = np.asarray(x)
    if array.dtype.kind not in "biufc":
        raise ValueError(f"{name}: expected numbers, got dtype {array.dtype}")
    array = np.require(array, array.dtype.newbyteorder("="), ("C", "W"))
    return torch.as_tensor(array, device=device)


def accepts_arrays(function: "Callable[..., torch.Tensor]") -> Callable[..., Array]:
    """Let a function of tensors (n, …) take numpy arrays and lists too: if its first argument is no tensor, numpy comes back.

    Arguments come by position or by name. Python numbers, strings and None pass through; dtypes are kept.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Array:
        arguments = signature.bind(*args, **kwargs).arguments
        name, first = next(iter(arguments.items()))
        arguments[name] = as_tensor(name, first)
        for other, x in arguments.items():
            if isinstance(x, np.ndarray | list):
                arguments[other] = as_tensor(other, x, arguments[name].device)
        result = function(**arguments)
        return result if is_tensor(first) else result.detach().numpy()

    return wrapper
