"""The device that computes: the CPU, or the first GPU that CUDA_VISIBLE_DEVICES leaves. Knows no models."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from tkit.errors import InputError, TkitError
from tkit.specs.device import DEVICES
from tkit.units import format_bytes


def pick_device(device: str = "auto") -> str:
    """`auto` is CUDA where torch sees a GPU. Raises InputError when that GPU is not there or does not compute."""
    if device not in DEVICES:
        raise InputError(
            f"--device {device}: expected one of {', '.join(DEVICES)}", hint="CUDA_VISIBLE_DEVICES chooses the GPU"
        )
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if torch.version.cuda is None and not torch.cuda.is_available():
        raise InputError(
            f"--device {device}: torch {torch.__version__} is built without CUDA",
            hint="use --device cpu, or install torch's CUDA build",
        )
    if not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        left = "" if visible is None else f'; CUDA_VISIBLE_DEVICES is "{visible}"'
        raise InputError(f"--device {device}: torch sees no GPU{left}", hint="use --device cpu; tkit doctor says more")
    try:
        torch.zeros(1, device="cuda").item()
    except RuntimeError as error:  # no kernels for this GPU, another process has it, its memory is full
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--device {device}: torch {torch.__version__} cannot compute on the GPU: {reason}",
            hint="use --device cpu, another GPU by CUDA_VISIBLE_DEVICES, or a torch built for this one",
        ) from error
    return "cuda"


@contextlib.contextmanager
def gpu_memory_for(what: str, hint: str) -> Iterator[None]:
    """Says what did not fit when the GPU's memory does not suffice. Works as a decorator, too."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info()
        own = torch.cuda.max_memory_allocated()
        raise TkitError(
            f"{what} does not fit on the GPU: {format_bytes(free)} of {format_bytes(total)} are free, "
            f"this process took up to {format_bytes(own)}",
            hint=hint,
        ) from error
