"""The peak memory of one stage, where several run in one process."""

from __future__ import annotations

import contextlib
import re
import resource
from pathlib import Path


def reset_peak_memory() -> None:
    """The peak is counted from now on, from what is resident now. Where the kernel does not let us, from the start."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM


def peak_memory_bytes() -> int:
    """Highest resident memory since `reset_peak_memory`."""
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
