"""A file written front to back, past the page cache where the file system allows it (O_DIRECT, open(2)).

An engine in the page cache would push out the model it is made of, which is read twice; and the kernel's copy into fresh
pages was up to a third of a build's CPU time. Such writes must start and end at whole blocks, in the file and in memory, so
they go through a buffer.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from pathlib import Path

import numpy as np

from tkit.files import naming

BLOCK = 4096  # bytes; no disk's blocks are larger
BUFFER_BYTES = 1 << 20
MIN_DIRECT_BYTES = 64 << 20  # smaller files do no harm in the page cache, and waiting for the disk would cost them time


class DirectFile:
    """A file of `num_bytes`, reserved at once. What is there already stays until it is written over."""

    def __init__(self, path: Path, num_bytes: int):
        self._path = path
        self._memory = memoryview(mmap.mmap(-1, BUFFER_BYTES))  # starts at a page
        self._buffer = np.frombuffer(self._memory, np.uint8)  # the same; numpy copies without holding the interpreter
        self._start = 0  # of the buffer in the file: a whole number of blocks
        self._filled = 0
        self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        with naming(path):
            os.posix_fallocate(self._descriptor, 0, num_bytes)  # a full disk shows now, not after an hour
        self._is_direct = False
        if num_bytes >= MIN_DIRECT_BYTES:
            with contextlib.suppress(OSError):  # a file system that cannot
                self._set_direct(True)

    def seek(self, position: int) -> None:
        """The next byte written is that at `position`, nothing written before being lost."""
        self._start = position // BLOCK * BLOCK
        self._filled = position - self._start
        with open(self._path, "rb") as file:
            file.seek(self._start)
            file.readinto(self._memory[: self._filled])

    def write(self, data: memoryview) -> None:
        values = np.frombuffer(data, np.uint8)
        while len(values):
            count = min(len(values), BUFFER_BYTES - self._filled)
            self._buffer[self._filled : self._filled + count] = values[:count]
            self._filled += count
            values = values[count:]
            if self._filled == BUFFER_BYTES:
                self.flush()

    def flush(self) -> None:
        """Puts everything written until now into the file; a direct one gets zeros up to the next block."""
        stop = -(-self._filled // BLOCK) * BLOCK if self._is_direct else self._filled
        self._buffer[self._filled : stop] = 0
        self._put(self._memory[:stop])
        whole = self._filled // BLOCK * BLOCK
        self._buffer[: self._filled - whole] = self._buffer[whole : self._filled]
        self._start += whole
        self._filled -= whole

    def finish(self) -> None:
        """Makes the file end behind the last byte written, durable."""
        self.flush()
        assert self._descriptor is not None
        with naming(self._path):
            os.ftruncate(self._descriptor, self._start + self._filled)
            os.fsync(self._descriptor)
        self.close()

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _put(self, data: memoryview) -> None:
        assert self._descriptor is not None
        done = 0
        while done < len(data):
            try:
                with naming(self._path):
                    done += os.pwrite(self._descriptor, data[done:], self._start + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._is_direct:
                    raise
                self._set_direct(False)  # blocks of another size, or the rest of a write that was cut short

    def _set_direct(self, is_direct: bool) -> None:
        assert self._descriptor is not None
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if is_direct else flags & ~os.O_DIRECT)
        self._is_direct = is_direct
