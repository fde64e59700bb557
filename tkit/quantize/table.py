"""`--quant` value -> how weights that share an input are quantized, and how TensorRT-LLM's kernels read the result."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tkit.quantize import awq, fp8
from tkit.quantize.statistics import InputStatistics

Stored = dict[str, torch.Tensor]


def quantize(
    format_name: str, weights: Mapping[str, torch.Tensor], inputs: InputStatistics, dtype: torch.dtype
) -> dict[str, Stored]:
    """{module: stored tensors} for float32 weights {module: (out, in)} that read the same activations."""
    if format_name == "fp8":
        return fp8.quantize(weights, inputs)
    if format_name == "int4_awq":
        return awq.quantize(weights, inputs, dtype)
    raise AssertionError(f"{format_name} has a format but no quantizer")


DEQUANTIZE = {"fp8": fp8.dequantize, "int4_awq": awq.dequantize}
