"""The way back: a TensorRT-LLM checkpoint -> the whole tensors it was cut from, one module at a time.

The reference runtime stands on it, so what is validated and served is what was written. Stored parts come back as they
are (codes and scales); `quantize.dequantize` makes weights of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tkit.checkpoints.reader import TensorFiles
from tkit.checkpoints.tensors import raw_dtype
from tkit.errors import InputError
from tkit.specs.moves import Move


def merge(files: TensorFiles, moves: Sequence[Move]) -> Iterator[tuple[Move, dict[str, tuple[np.ndarray, str]]]]:
    """Each move of an `open_ranks` checkpoint with {part: (bits, dtype)} of its whole tensors, padding removed.

    Memory: one module. Raises InputError listing every tensor that is absent or has another shape than planned.
    """
    problems = [
        f"rank {output.rank}: {output.name} is {found}, config.json promises {output.shape}"
        for move in moves
        for output in move.outputs
        if (found := _shape(files, output.rank, output.name)) != output.shape
    ]
    if problems:
        raise InputError(
            f"{files.directory}: the rank files contradict config.json",
            problems=problems,
            hint="rebuild with tkit build",
        )
    return (
        (move, {part: _whole(files, move, part) for part in dict.fromkeys(output.part for output in move.outputs)})
        for move in moves
    )


def _shape(files: TensorFiles, rank: int | None, name: str) -> tuple[int, ...] | None:
    entry = files.entries.get(f"{rank}/{name}")
    return None if entry is None else entry.shape or (1,)  # TensorRT-LLM takes a number for a vector of one


def _whole(files: TensorFiles, move: Move, part: str) -> tuple[np.ndarray, str]:
    outputs = [output for output in move.outputs if output.part == part and not output.is_zero]
    num_rows = max(stop for output in outputs for _, stop in output.rows)
    first = outputs[0]
    shape: tuple[int, ...] = (num_rows,)
    if first.columns is not None:
        shape = (num_rows, max(output.columns[1] for output in outputs if output.columns is not None))
    dtype = files.entries[f"{first.rank}/{first.name}"].dtype
    whole = np.empty(shape, raw_dtype(dtype))
    for output in outputs:
        raw, position = files.read(f"{output.rank}/{output.name}"), 0
        raw = raw.swapaxes(-1, -2) if output.is_transposed else raw
        # experts lie behind one another
        raw = raw.reshape(-1) if output.columns is None else raw.reshape(-1, raw.shape[-1])
        for start, stop in output.rows:
            rows = raw[position : position + stop - start]
            if output.columns is None:
                whole[start:stop] = rows
            else:
                whole[start:stop, output.columns[0] : output.columns[1]] = rows
            position += stop - start
    if not move.is_computed:
        whole = whole[: sum(move.source_rows)]
    return whole, dtype
