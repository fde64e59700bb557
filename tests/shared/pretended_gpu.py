"""A GPU that is none: tensors that say they are on CUDA, are computed on the CPU, and are refused where CUDA's would be.

An operation whose tensors lie on two devices raises, and so do `.numpy()` of a tensor on the GPU and a CPU tensor with
indices there. What waits for the GPU (`.item()`, `.cpu()`, a boolean index) is counted. It knows nothing of memory and
of which kernels there are. Sees what Python calls in torch, in the thread that entered it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)
FREE_BYTES, TOTAL_BYTES, PEAK_BYTES = 60_000_000, 80_000_000, 20_000_000
FACTS = {  # what torch.cuda says of it
    "is_available": True, "is_initialized": True, "mem_get_info": (FREE_BYTES, TOTAL_BYTES),
    "max_memory_allocated": PEAK_BYTES, "reset_peak_memory_stats": None, "synchronize": None,
}  # fmt: skip
BRIDGES = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.copy_, Tensor.__setitem__}  # from one device to the other
HOST_ONLY = {Tensor.numpy, Tensor.__array__, Tensor.data_ptr}
WAITS = {
    Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__,
    Tensor.nonzero, Tensor.unique, Tensor.equal, torch.nonzero, torch.unique, torch.equal, torch.masked_select,
}  # fmt: skip


class GpuTensor(Tensor):
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {}, Counter())


class PretendedGpu(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()  # by function

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {}, self.waits)


def _run(function: Callable[..., Any], args: Any, kwargs: Any, waits: Counter[str]) -> Any:
    tensors = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
    on_gpu = [tensor for tensor in tensors if isinstance(tensor, GpuTensor)]
    if function is torch._has_compatible_shallow_copy_type and 0 < len(on_gpu) < len(tensors):
        return False  # asked by Module.to, which then makes a new parameter
    if on_gpu:
        _check(function, args, tensors)
        is_mask = function in (Tensor.__getitem__, Tensor.__setitem__) and any(
            index.dtype == torch.bool for index in _tensors(args[1])
        )
        if function in WAITS or is_mask or (function is torch.where and len(args) == 1):
            waits[function.__name__] += 1
    asked = _asked_device(function, args, kwargs)
    if asked == "cuda":
        args, kwargs = tuple(map(_on_cpu, args)), {name: _on_cpu(value) for name, value in kwargs.items()}
    with torch._C.DisableTorchFunctionSubclass():
        result = function(*args, **kwargs)
    is_gpu = asked == "cuda" if asked else isinstance(args[0], GpuTensor) if function in BRIDGES else bool(on_gpu)
    return _placed(result, GpuTensor if is_gpu else Tensor)


def _check(function: Any, args: Any, tensors: list[Tensor]) -> None:
    """A number in a CPU tensor goes along with tensors on the GPU; indices on the CPU do, the other way round they do not."""
    name = getattr(function, "__name__", str(function))
    if function in HOST_ONLY:
        raise TypeError(f"can't convert cuda:0 device type tensor to numpy: {name}")
    if function is Tensor.__getitem__ and not isinstance(args[0], GpuTensor):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    if function in BRIDGES or function is Tensor.__getitem__:
        return
    for tensor in tensors:
        if not isinstance(tensor, GpuTensor) and tensor.dim() and not tensor.is_meta:
            raise RuntimeError(f"{name}: expected all tensors on the same device, found cuda:0 and {tensor.device}")


def _asked_device(function: Any, args: Any, kwargs: Any) -> str | None:
    """The kind of device that the call names."""
    if function in (Tensor.cpu, Tensor.cuda):
        return function.__name__
    named = kwargs.get("device", args[1] if function is Tensor.to and len(args) > 1 else None)
    if isinstance(named, Tensor):
        return named.device.type
    return torch.device(named).type if isinstance(named, str | torch.device) else None


def _on_cpu(argument: Any) -> Any:
    is_cuda = isinstance(argument, str | torch.device) and str(argument).startswith("cuda")
    return "cpu" if is_cuda else argument


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _placed(result: Any, kind: type[Tensor]) -> Any:
    """`result`, its tensors of that kind."""
    if isinstance(result, Tensor):
        return result if result.is_meta else result.as_subclass(kind)
    if isinstance(result, list | tuple):
        return type(result)([_placed(item, kind) for item in result])
    return result
