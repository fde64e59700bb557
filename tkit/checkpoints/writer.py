"""Writes safetensors files front to back: each header is complete before the first tensor is known.

A journal beside them lists, step by step, how far each file was and the sha256 of everything before. A build that was
killed goes on from the last step at which every file still has that digest, so a torn or lost write is never kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import queue
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tkit.checkpoints.direct_file import DirectFile
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


@dataclass(frozen=True, kw_only=True)
class Mark:
    """How far one file was after a step of the conversion."""

    position: int  # bytes
    num_tensors: int
    sha256: str  # of everything before `position`


class FileWriter:
    """A safetensors file being filled in the order of its header; hashed on the way.

    `write` takes the next tensor as chunks, so that a split or stacked tensor is never assembled in memory.
    `finish` proves that every tensor of the header was written once, and makes the file durable.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]):
        self.path = path
        header, self.data_bytes = layout(tensors)
        self.num_bytes = len(header) + self.data_bytes
        self._expected = list(tensors.items())
        self._next = 0
        self._position = 0
        self._hash = hashlib.sha256()
        self._file = DirectFile(path, self.num_bytes)
        self._header = header

    def start(self) -> None:
        """Writes the header; the first tensor is next."""
        self._append(memoryview(self._header))

    def resume(self, mark: Mark, digest: Any) -> None:
        """Goes on at `mark`, where `digest` is the state of a sha256 over everything before it."""
        self._next, self._position = mark.num_tensors, mark.position
        self._hash = digest
        self._file.seek(mark.position)

    def matching_marks(self, marks: Iterable[Mark]) -> list[Any]:
        """The sha256 states at the first marks whose digest the file still has. Reads the file once up to there."""
        digest, position, states = hashlib.sha256(), 0, []
        with open(self.path, "rb") as file:
            for mark in marks:
                while position < mark.position and (data := file.read(min(1 << 20, mark.position - position))):
                    digest.update(data)
                    position += len(data)
                if digest.hexdigest() != mark.sha256:
                    break
                states.append(digest.copy())
        return states

    def mark(self) -> Mark:
        """Of what is in the file now."""
        self._file.flush()
        return Mark(position=self._position, num_tensors=self._next, sha256=self._hash.hexdigest())

    def write(self, name: str, chunks: Iterable[np.ndarray]) -> None:
        expected_name, (dtype, shape) = self._expected[self._next]
        assert name == expected_name, f"{self.path}: {name} came, {expected_name} was next"
        before = self._position
        for chunk in chunks:
            self._append(raw_bytes(np.ascontiguousarray(chunk)))
        written = self._position - before
        assert written == math.prod(shape) * ITEM_BYTES[dtype], (
            f"{self.path}: {name}: {written} bytes, not {shape} {dtype}"
        )
        self._next += 1

    def finish(self) -> str:
        """The file's sha256."""
        missing = [name for name, _ in self._expected[self._next :]]
        assert not missing, f"{self.path}: never written: {missing}"
        self._file.finish()
        return self._hash.hexdigest()

    def close(self) -> None:
        self._file.close()

    def _append(self, view: memoryview) -> None:
        self._hash.update(view)
        self._position += len(view)
        self._file.write(view)


class CheckpointWriter:
    """All files of a checkpoint, filled by `num_threads` threads while the caller reads and computes.

    Each file belongs to one thread, so it gets its tensors in order and its bytes do not depend on the number of
    threads. Memory: at most QUEUE_TENSORS tensors wait per thread; `write` blocks until there is room.
    """

    QUEUE_TENSORS = 3

    def __init__(
        self,
        directory: Path,
        layouts: Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]],
        num_threads: int,
        journal: Path | None = None,
    ):
        self._files = {name: FileWriter(directory / name, tensors) for name, tensors in layouts.items()}
        self._thread_of = {name: index % num_threads for index, name in enumerate(layouts)}
        self._journal = journal
        self._marks: dict[int, dict[str, Mark]] = {}  # step -> file -> mark, until every file has come that far
        self._lock = threading.Lock()
        self.first_step = self._resume()
        self._digests: dict[str, str] = {}
        self._error: BaseException | None = None
        self._queues: list[queue.Queue[Any]] = [queue.Queue(self.QUEUE_TENSORS) for _ in range(num_threads)]
        self._threads = [
            threading.Thread(target=self._fill, args=(index,), name=f"writer-{index}", daemon=True)
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def write(self, file: str, name: str, chunks: Iterable[np.ndarray]) -> None:
        """Queues the next tensor of `file`. The chunks must not change afterwards."""
        self._raise_error()
        self._queues[self._thread_of[file]].put((file, name, list(chunks)))

    def end_step(self, step: int) -> None:
        """Everything queued until now belongs to steps up to `step`; the journal says so once it is written."""
        for waiting in self._queues:
            waiting.put(step)

    def finish(self) -> dict[str, dict[str, Any]]:
        """{file name: {"bytes", "sha256"}}, once everything is written and durable."""
        self._end_threads()
        self._raise_error()
        return {name: {"bytes": file.num_bytes, "sha256": self._digests[name]} for name, file in self._files.items()}

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._error = self._error or error
        self._end_threads()
        for file in self._files.values():
            file.close()

    def _fill(self, index: int) -> None:
        """Thread body. After an error, here or elsewhere, it only empties its queue, so that nobody blocks on it."""
        ours = [name for name in self._files if self._thread_of[name] == index]
        while (item := self._queues[index].get()) is not None:
            if self._error is None:
                if isinstance(item, int):
                    self._guard(lambda step=item: self._end_step(step, ours))
                else:
                    file, name, chunks = item
                    self._guard(lambda file=file, name=name, chunks=chunks: self._files[file].write(name, chunks))
            del item
        for name in ours:
            if self._error is None:
                self._guard(lambda name=name: self._digests.update({name: self._files[name].finish()}))

    def _end_step(self, step: int, files: Iterable[str]) -> None:
        ours = {name: self._files[name].mark() for name in files}
        with self._lock:
            marks = self._marks.setdefault(step, {})
            marks.update(ours)
            if self._journal is not None and len(marks) == len(self._files):
                with open(self._journal, "a") as journal:
                    journal.write(_journal_line(step, self._marks.pop(step)))

    def _resume(self) -> int:
        """Puts every file at the last step that all of them still hold; returns the step to go on with."""
        lines = _read_journal(self._journal) if self._journal is not None else []
        lines = [line for line in lines if line.keys() == self._files.keys()]
        states = {name: file.matching_marks([line[name] for line in lines]) for name, file in self._files.items()}
        num_steps = min(map(len, states.values()))
        for name, file in self._files.items():
            if num_steps:
                file.resume(lines[num_steps - 1][name], states[name][num_steps - 1])
            else:
                file.start()
        if self._journal is not None:
            self._journal.write_text("".join(_journal_line(step, line) for step, line in enumerate(lines[:num_steps])))
        return num_steps

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


def _journal_line(step: int, marks: Mapping[str, Mark]) -> str:
    return json.dumps({"step": step, "marks": {name: asdict(mark) for name, mark in marks.items()}}) + "\n"


def _read_journal(path: Path) -> list[dict[str, Mark]]:
    """{file: mark} of each step, in order, up to the first line that is torn."""
    lines: list[dict[str, Mark]] = []
    if path.exists():
        for text in path.read_text().splitlines():
            try:
                value = json.loads(text)
                if value["step"] != len(lines):
                    break
                lines.append({name: Mark(**mark) for name, mark in value["marks"].items()})
            except (ValueError, KeyError, TypeError):
                break
    return lines
