"""`--quant` value -> how weights that share an input are quantized, and how TensorRT-LLM's kernels read the result."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tkit.quantize import awq, fp8, int4
from tkit.quantize.statistics import InputStatistics

Stored = dict[str, torch.Tensor]


def quantize(
    format_name: str, weights: Mapping[str, torch.Tensor], inputs: InputStatistics | None, dtype: torch.dtype
) -> dict[str, Stored]:
    """{module: stored tensors} for float32 weights {module: (out, in)} that read the same activations.

    `inputs` are the calibrated statistics of those; None for formats that look at weights only.
    """
    if format_name == "fp8_rowwise":
        return fp8.quantize_rows(weights)
    if format_name == "int4":
        return int4.quantize_groups(weights, dtype)
    assert inputs is not None, f"{format_name} needs calibration"
    if format_name == "fp8":
        return fp8.quantize(weights, inputs)
    if format_name == "int4_awq":
        return awq.quantize(weights, inputs, dtype)
    raise AssertionError(f"{format_name} has a format but no quantizer")


DEQUANTIZE = {
    "fp8": fp8.dequantize,
    "fp8_rowwise": fp8.dequantize_rows,
    "int4": int4.dequantize_groups,
    "int4_awq": awq.dequantize,
}
