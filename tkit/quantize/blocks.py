"""Work in blocks of rows: on a CPU small enough for its cache, on a GPU large enough to be worth their launch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tkit.quantize.data_free import BLOCK_VALUES

GPU_BLOCK_VALUES = 1 << 26  # 256 MB of float32: whole weights of an 8 B model; more costs memory, less costs launches


def row_blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of the same rows of every tensor."""
    num_values = BLOCK_VALUES if tensors[0].device.type == "cpu" else GPU_BLOCK_VALUES  # of the first
    num_rows = max(num_values // tensors[0].shape[1], 1)
    return zip(*(tensor.split(num_rows) for tensor in tensors), strict=True)
