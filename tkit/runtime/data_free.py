"""Quantizes decoder layers in formats that look at weights only. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tkit.checkpoints.tensors import cast, raw_dtype, to_float32
from tkit.quantize.data_free import BLOCK_VALUES, fp8_rows, int4_groups
from tkit.specs.moves import Move
from tkit.specs.quantization import QuantFormat

Raw = tuple[np.ndarray, str]


class DataFreeQuantizer:
    """The `LayerQuantizer` of formats without calibration. Memory: the layer, and a block of rows per thread."""

    def __init__(self, num_threads: int = 1):
        self.num_threads = num_threads

    def begin(self, sources: Mapping[str, Raw]) -> None:
        pass

    def notes(self) -> list[str]:
        return []

    def skip(self, index: int, sources: Mapping[str, Raw]) -> None:
        pass

    def layer(self, index: int, sources: Mapping[str, Raw], moves: Sequence[Move]) -> dict[str, dict[str, Raw]]:
        return {move.module: quantize_rows(move, sources, self.num_threads) for move in moves}


def quantize_rows(move: Move, sources: Mapping[str, Raw], num_threads: int) -> dict[str, Raw]:
    """{stored tensor: bits} of one linear layer: its sources one below the other, in blocks of rows."""
    assert move.format is not None
    format = move.format
    dtype = sources[move.sources[0]][1]
    weights = [sources[name][0].T if move.transform == "transpose" else sources[name][0] for name in move.sources]
    stored = {}
    for tensor in format.tensors:
        shape = tensor.shape(sum(move.source_rows), weights[0].shape[1])
        stored[tensor.name] = (np.empty(shape, raw_dtype(tensor.dtype)), tensor.dtype)

    def quantize_block(block: tuple[int, np.ndarray]) -> None:
        first_row, raw = block
        values = to_float32(np.array(raw, order="C"), dtype)  # a copy of its own, which the quantizer overwrites
        parts = _quantized(format, values, dtype)
        for tensor in format.tensors:
            assert tensor.out_axis is not None and tensor.out_axis[0] == 0, "rows that depend on each other"
            part, start = parts[tensor.name], first_row // tensor.out_axis[1]
            stored[tensor.name][0][start : start + len(part)] = part.view(raw_dtype(tensor.dtype))

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(quantize_block, _blocks(weights)))
    return stored


def _quantized(format: QuantFormat, values: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    if format.name == "fp8_rowwise":
        return fp8_rows(values)
    assert format.name == "int4" and format.group_size is not None, f"{format.name} has no data-free quantizer"
    return int4_groups(
        values, format.group_size, lambda scale: to_float32(cast(scale.view(np.uint32), "F32", dtype), dtype)
    )


def _blocks(weights: Sequence[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows), an even number of them: INT4 packs pairs."""
    first_row = 0
    for weight in weights:
        num_rows = max(BLOCK_VALUES // weight.shape[1] // 2, 1) * 2
        for start in range(0, len(weight), num_rows):
            yield first_row + start, weight[start : start + num_rows]
        first_row += len(weight)
