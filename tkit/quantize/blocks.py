"""Work in blocks of rows that stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tkit.quantize.data_free import BLOCK_VALUES


def row_blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of the same rows of every tensor; about BLOCK_VALUES values of the first."""
    num_rows = max(BLOCK_VALUES // tensors[0].shape[1], 1)
    return zip(*(tensor.split(num_rows) for tensor in tensors), strict=True)
