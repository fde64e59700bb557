"""Writes one safetensors file front to back: the header is complete before the first tensor is known."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

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
