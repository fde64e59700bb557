"""Quantizes decoder layers in formats that look at weights only. Loads torch, but no transformers: half the start-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from tkit.quantize.statistics import InputStatistics
from tkit.quantize.table import QUANTIZERS
from tkit.runtime.bits import to_raw, to_torch
from tkit.specs.moves import Move

Raw = tuple[np.ndarray, str]


class DataFreeQuantizer:
    """The `LayerQuantizer` of formats without calibration. Memory: one module in float32 at a time."""

    def embedding(self, weight: Raw) -> None:
        pass

    def skip(self, index: int, sources: Mapping[str, Raw]) -> None:
        pass

    def layer(self, index: int, sources: Mapping[str, Raw], moves: Sequence[Move]) -> dict[str, dict[str, Raw]]:
        quantized = {}
        for move in moves:
            assert move.format is not None
            parts = [to_torch(*sources[name]) for name in move.sources]
            weight = torch.cat([as_linear(part, move) for part in parts])
            quantize = QUANTIZERS[move.format.name].quantize
            stored = quantize({move.module: weight}, InputStatistics(), parts[0].dtype)[move.module]
            quantized[move.module] = {name: to_raw(values) for name, values in stored.items()}
        return quantized


def as_linear(weight: torch.Tensor, move: Move) -> torch.Tensor:
    """A source as the rows of a linear layer: (out, in) float32."""
    return (weight.T if move.transform == "transpose" else weight).float()
