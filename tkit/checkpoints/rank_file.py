"""Writes safetensors files front to back: each header is complete before the first tensor is known."""

from __future__ import annotations

import hashlib
import json
import math
import os
import queue
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tkit.checkpoints.tensors import ITEM_BYTES, raw_bytes


def layout(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, int]:
    """Header bytes (length prefix included, padded to 8) and data bytes for {name: (dtype, shape)}, stored in that order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        stop = offset + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offset


class RankFile:
    """A safetensors file being filled in the order of its header; hashed on the way.

    `write` takes the next tensor as chunks, so that a split or stacked tensor is never assembled in memory.
    `finish` proves that every tensor of the header was written once, and makes the file durable.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]):
        self.path = path
        self._expected = list(tensors.items())
        self._next = 0
        header, self.data_bytes = layout(tensors)
        self.num_bytes = len(header) + self.data_bytes
        self._hash = hashlib.sha256(header)
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed by `finish` or `close`
        os.posix_fallocate(self._file.fileno(), 0, self.num_bytes)  # a full disk shows now, not after an hour
        self._write_all(memoryview(header))

    def write(self, name: str, chunks: Iterable[np.ndarray]) -> None:
        expected_name, (dtype, shape) = self._expected[self._next]
        assert name == expected_name, f"{self.path}: {name} came, {expected_name} was next"
        written = 0
        for chunk in chunks:
            view = raw_bytes(np.ascontiguousarray(chunk))
            self._hash.update(view)
            self._write_all(view)
            written += len(view)
        assert written == math.prod(shape) * ITEM_BYTES[dtype], (
            f"{self.path}: {name} is {written} bytes, not {shape} {dtype}"
        )
        self._next += 1

    def finish(self) -> str:
        """The file's sha256."""
        missing = [name for name, _ in self._expected[self._next :]]
        assert not missing, f"{self.path}: never written: {missing}"
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()

    def close(self) -> None:
        self._file.close()

    def _write_all(self, view: memoryview) -> None:
        while view:
            view = view[self._file.write(view) :]


class RankFiles:
    """All rank files of a checkpoint, filled by `num_threads` threads while the caller reads and computes.

    Rank r belongs to thread r % num_threads, so every file gets its tensors in order and its bytes do not depend on the
    number of threads. Memory: at most QUEUE_TENSORS tensors wait per thread; `write` blocks until there is room.
    """

    QUEUE_TENSORS = 3

    def __init__(
        self,
        directory: Path,
        layouts: Mapping[int, Mapping[str, tuple[str, tuple[int, ...]]]],
        num_threads: int,
    ):
        self._files = {rank: RankFile(directory / f"rank{rank}.safetensors", layouts[rank]) for rank in sorted(layouts)}
        self._digests: dict[int, str] = {}
        self._error: BaseException | None = None
        self._queues: list[queue.Queue[Any]] = [queue.Queue(self.QUEUE_TENSORS) for _ in range(num_threads)]
        self._threads = [
            threading.Thread(target=self._fill, args=(index,), name=f"rank-writer-{index}", daemon=True)
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def write(self, rank: int, name: str, chunks: Iterable[np.ndarray]) -> None:
        """Queues the next tensor of `rank`. The chunks must not change afterwards."""
        self._raise_error()
        self._queues[rank % len(self._queues)].put((rank, name, list(chunks)))

    def finish(self) -> dict[str, dict[str, Any]]:
        """{file name: {"bytes", "sha256"}}, once everything is written and durable."""
        self._end_threads()
        self._raise_error()
        return {
            file.path.name: {"bytes": file.num_bytes, "sha256": self._digests[rank]}
            for rank, file in self._files.items()
        }

    def __enter__(self) -> RankFiles:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._error = self._error or error
        self._end_threads()
        for file in self._files.values():
            file.close()

    def _fill(self, index: int) -> None:
        """Thread body. After an error, here or elsewhere, it only empties its queue, so that nobody blocks on it."""
        ours = [rank for rank in self._files if rank % len(self._queues) == index]
        while (item := self._queues[index].get()) is not None:
            if self._error is None:
                rank, name, chunks = item
                self._guard(lambda rank=rank, name=name, chunks=chunks: self._files[rank].write(name, chunks))
            del item
        for rank in ours:
            if self._error is None:
                self._guard(lambda rank=rank: self._digests.update({rank: self._files[rank].finish()}))

    def _guard(self, action: Any) -> None:
        try:
            action()
        except BaseException as error:  # carried to the caller's thread
            self._error = self._error or error

    def _end_threads(self) -> None:
        for waiting, thread in zip(self._queues, self._threads, strict=True):
            if thread.is_alive():
                waiting.put(None)
        for thread in self._threads:
            thread.join()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error
