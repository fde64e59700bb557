"""Parquet, written by a process of its own: pyarrow and what it imports take 80 MB, which the process that measures should
not carry through the points that follow."""

from __future__ import annotations

import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tkit.errors import TkitError

DONE = b"\n"


class ParquetWriter:
    """Starts its process with the first table. It ends with `close`, with this object, or when this process dies."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None

    def write(self, path: Path, columns: Mapping[str, Any], types: Mapping[str, str]) -> None:
        """Columns are lists or arrays; `types`, by column, are pyarrow's names. Returns when the file is there."""
        if self._process is None:
            command = [sys.executable, "-m", "tkit.loadgen.parquet"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
            self._end = weakref.finalize(self, _end, self._process)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump((str(path), dict(columns), dict(types)), self._process.stdin)
            self._process.stdin.flush()
            answer = self._process.stdout.read(1)
        except OSError as error:
            raise TkitError(f"{path}: the process that writes it is gone: {error}") from error
        if answer != DONE:
            raise TkitError(f"{path}: the process that writes it failed with exit code {self._process.wait()}")

    def close(self) -> None:
        self._end()


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.stdout.close()
    process.wait()


def main() -> None:
    """Writes what comes on standard input until that ends."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    while True:
        try:
            path, columns, types = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        schema = pa.schema([(name, pa.type_for_alias(alias)) for name, alias in types.items()])
        pq.write_table(pa.table(columns, schema=schema), path, compression="zstd")
        sys.stdout.buffer.write(DONE)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
