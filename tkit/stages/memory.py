"""The peak memory of one stage, where several run in one process; on a GPU too. Loads no torch."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from pathlib import Path


def reset_peak_memory() -> None:
    """The peak is counted from now on, from what is resident now. Where the kernel does not let us, from the start."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    if _uses_gpu():
        sys.modules["torch"].cuda.reset_peak_memory_stats()


def peak_memory_bytes() -> int:
    """Highest resident memory since `reset_peak_memory`."""
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_gpu_memory_bytes() -> int | None:
    """Most that torch's tensors took of the GPU since `reset_peak_memory`; None when it was not used."""
    return sys.modules["torch"].cuda.max_memory_allocated() or None if _uses_gpu() else None


def _uses_gpu() -> bool:
    return "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized()
