"""The one conversion loop: plan, check on headers, then one decoder layer at a time.

Memory: the tensors of one layer (quantized formats) or of one module (plain formats), whatever the model's depth; plus the
embedding, which is one tensor. Knows moves, files and a quantizer; knows no architecture and no calibration.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tkit.checkpoints.reader import TensorFiles
from tkit.checkpoints.tensors import (
    FLOAT_DTYPES,
    SAFETENSORS_DTYPE,
    cast,
    count_nonfinite,
    is_zero,
    raw_dtype,
    to_float32,
    transformed,
)
from tkit.checkpoints.writer import CheckpointWriter, layout
from tkit.errors import InputError
from tkit.specs.moves import Move, Output
from tkit.specs.progress import Progress

Raw = tuple[np.ndarray, str]  # bits and their safetensors dtype


class LayerQuantizer(Protocol):
    """Computes the tensors of one decoder layer that are not the source's own."""

    def begin(self, sources: Mapping[str, Raw]) -> None:
        """Called once, before the first layer, with the tensors that the model needs before it: the embeddings."""

    def layer(self, index: int, sources: Mapping[str, Raw], moves: Sequence[Move]) -> Mapping[str, Mapping[str, Raw]]:
        """{module: {stored tensor name: bits}} for the `moves` that are computed.

        `sources` holds every tensor of the layer under its Hugging Face name.
        """

    def skip(self, index: int, sources: Mapping[str, Raw]) -> None:
        """Passes the activations through a layer that is quantized and written already."""

    def notes(self) -> list[str]:
        """What was done that a reader of the result could not guess."""


def file_layouts(moves: Sequence[Move], dtype: str) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """{file: {tensor name: (safetensors dtype, shape)}} in file order. `dtype` is the model's, as config.json has it."""
    layouts: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for output in (output for move in moves for output in move.outputs):
        stored = SAFETENSORS_DTYPE[dtype] if output.dtype == "model" else output.dtype
        layouts.setdefault(output.file, {})[output.name] = (stored, output.shape)
    return layouts


def checkpoint_bytes(moves: Sequence[Move], dtype: str) -> int:
    """Bytes of all files, headers included."""
    return sum(len(header) + data for header, data in map(layout, file_layouts(moves, dtype).values()))


def check_sources(source: TensorFiles, moves: Sequence[Move], ignored: Sequence[str]) -> None:
    """Compares the source's headers with what the moves will read. Raises InputError with the whole list."""
    problems, used = [], set()
    floats = tuple(FLOAT_DTYPES)
    for move in moves:
        dtypes = move.source_dtypes or (floats,) * len(move.sources)
        for name, shape, known in zip(move.sources, move.source_shapes, dtypes, strict=True):
            if name in used:
                continue
            used.add(name)
            entry = source.entries.get(name)
            if entry is None:
                problems.append(f"{name} is missing, expected {shape}")
            elif entry.shape != shape and not (
                move.source_dtypes and _without_ones(entry.shape) == _without_ones(shape)
            ):
                problems.append(f"{name} is {entry.shape}, config.json promises {shape}")
            elif entry.dtype not in known:
                problems.append(f"{name} is {entry.dtype}, expected {'one of ' * (len(known) > 1)}{', '.join(known)}")
    problems += _mixed_dtypes(source, {name for move in moves if not move.source_dtypes for name in move.sources})
    for name in source.entries.keys() - used:
        # a tied lm_head may be stored beside the embedding it equals
        if not name.endswith(tuple(ignored)) and name != "lm_head.weight":
            problems.append(f"{name} {source.entries[name].shape} has no place in this architecture")
    if problems:
        raise InputError(f"{source.directory}: the weights do not match config.json", problems=sorted(problems))


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Scales are (), (1,), (out,) or (out, 1), as each tool likes."""
    return tuple(size for size in shape if size != 1)


def _mixed_dtypes(source: TensorFiles, used: Set[str]) -> list[str]:
    """BF16 among F16 or F16 among BF16: nothing writes both, and the one read as the other is noise of the same size."""
    names: dict[str, list[str]] = {"BF16": [], "F16": []}
    for name in used & source.entries.keys():
        names.get(source.entries[name].dtype, []).append(name)
    fewer, more = sorted(names, key=lambda dtype: len(names[dtype]))
    return [f"{name} is {fewer}, {len(names[more])} others are {more}" for name in names[fewer]]


def convert(
    source: TensorFiles,
    moves: Sequence[Move],
    dtype: str,
    directory: Path,
    quantizer: LayerQuantizer | None,
    progress: Progress,
    *,
    num_threads: int = 1,
    journal: Path | None = None,
    allow_zeros: bool = False,
) -> dict[str, dict[str, Any]]:
    """Writes the files that the moves name into `directory`; returns {file name: {"bytes", "sha256"}}.

    With a `journal` file, steps that an earlier, killed call finished there are not done again.
    `num_threads` threads hash and write while this one reads and computes; the files do not depend on it. Raises
    InputError naming every tensor of a layer that holds NaN or infinite values, or (unless `allow_zeros`) is a matrix of
    nothing but zeros.
    """
    nonfinite: list[str] = []
    zeros: list[str] = []
    carried = {name for move in moves if move.source_dtypes for name in move.sources}

    def read(name: str) -> Raw:
        raw, stored_dtype = source.read(name), source.entries[name].dtype
        if name not in carried:
            raw, stored_dtype = cast(raw, stored_dtype, SAFETENSORS_DTYPE[dtype]), SAFETENSORS_DTYPE[dtype]
        bad = count_nonfinite(raw, stored_dtype)
        if bad:
            nonfinite.append(
                f"{name}: {bad} of {raw.size} values are NaN or infinite in {FLOAT_DTYPES.get(stored_dtype, stored_dtype)}"
            )
        elif raw.ndim > 1 and not allow_zeros and is_zero(raw):
            zeros.append(f"{name}: all {raw.size} values are zero")
        return raw, stored_dtype

    with CheckpointWriter(directory, file_layouts(moves, dtype), num_threads, journal) as files:
        steps = [list(group) for _, group in itertools.groupby(moves, key=lambda move: move.layer)]
        for index, step in enumerate(steps):
            progress.step("convert", index, len(steps))
            first_sources = {}
            if index == 0 and quantizer is not None:
                first_sources = {name: read(name) for move in step for name in move.sources}
                quantizer.begin(first_sources)
            if index < files.first_step:
                _pass_step(step, read, quantizer)
                continue
            _write_step(step, read, files, quantizer, first_sources)
            if nonfinite or zeros:
                hint = "interrupted copies leave zeros; where they are meant: --allow-zeros" if zeros else None
                raise InputError(f"{source.directory}: unusable weights", problems=[*nonfinite, *zeros], hint=hint)
            files.end_step(index)
        progress.step("convert", len(steps), len(steps))
        return files.finish()


def _pass_step(step: Sequence[Move], read: Callable[[str], Raw], quantizer: LayerQuantizer | None) -> None:
    """Lets the quantizer see a step that is written already, so that it knows the next one's activations."""
    if quantizer is not None and step[0].layer is not None:
        quantizer.skip(step[0].layer, {name: read(name) for move in step for name in move.sources})


def _write_step(
    step: Sequence[Move],
    read: Callable[[str], Raw],
    files: CheckpointWriter,
    quantizer: LayerQuantizer | None,
    sources: Mapping[str, Raw],
) -> None:
    """Moves one decoder layer, or the modules before or after the layers. `sources` are read already."""
    to_quantize = [move for move in step if move.is_computed]
    quantized: Mapping[str, Mapping[str, Raw]] = {}
    if to_quantize and step[0].layer is not None:
        assert quantizer is not None, "a move with a format needs a quantizer"
        sources = {name: read(name) for move in step for name in move.sources}
        quantized = quantizer.layer(step[0].layer, sources, to_quantize)
    for move in step:
        if move.is_computed:
            for output in move.outputs:
                files.write(output.file, output.name, _quantized_chunks(output, move, sources, quantized))
            continue
        raws = [sources[name] if name in sources else read(name) for name in move.sources]
        stacked = [transformed(raw, dtype, move.transform) for raw, dtype in raws]
        for output in move.outputs:
            if output.source is None:
                chunks = take([raw for raw, _ in stacked], output, stacked[0][1])
            elif output.fold is None:
                chunks = iter([raws[output.source][0]])
            else:
                chunks = iter([_folded(raws[output.source], move, _prequant(output.fold, to_quantize, quantized))])
            files.write(output.file, output.name, chunks)


def _quantized_chunks(
    output: Output, move: Move, sources: Mapping[str, Raw], quantized: Mapping[str, Mapping[str, Raw]]
) -> Iterator[np.ndarray]:
    if output.source is not None:
        return iter([sources[move.sources[output.source]][0]])
    raw, dtype = quantized[move.module][output.part]
    chunks = take([raw], output, dtype)
    if not output.is_transposed:
        return chunks
    whole = np.concatenate(list(chunks))
    return iter([whole.reshape(*output.shape[:-2], -1, whole.shape[-1]).swapaxes(-1, -2)])  # of each expert


def _prequant(input_name: str, moves: Sequence[Move], quantized: Mapping[str, Mapping[str, Raw]]) -> Raw:
    """The factor that all quantized layers with that input multiply it by."""
    return next(quantized[move.module]["prequant_scaling_factor"] for move in moves if move.input == input_name)


def _folded(norm: Raw, move: Move, prequant: Raw) -> np.ndarray:
    """A norm's weight times the factor of the layers behind it; where the model multiplies by 1 + w, 1 + w is scaled."""
    offset = np.float32(1) if move.transform == "add_one" else np.float32(0)
    weight = (to_float32(*norm) + offset) * to_float32(*prequant) - offset
    return cast(weight.view(np.uint32), "F32", norm[1])


def take(stacked: Sequence[np.ndarray], output: Output, dtype: str) -> Iterator[np.ndarray]:
    """The rows and columns that `output` asks for, as views into arrays that lie one below the other.

    Rows past the end are zeros (vocabulary padding).
    """
    if output.is_zero:
        yield np.zeros(output.shape, raw_dtype(dtype))
        return
    for start, stop in output.rows:
        offset = 0
        for array in stacked:
            low, high = max(start - offset, 0), min(stop - offset, len(array))
            if low < high:
                rows = array[low:high]
                yield rows if output.columns is None else rows[:, output.columns[0] : output.columns[1]]
            offset += len(array)
        if stop > offset:
            row_size = math.prod(output.shape[1:])
            yield np.zeros((stop - max(start, offset), row_size), raw_dtype(dtype))
