"""`--quant` value -> how weights that share an input are quantized, and how TensorRT-LLM's kernels read the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from tkit.quantize import awq, fp8, int4, nvfp4, smoothquant, w4a8
from tkit.quantize.statistics import InputStatistics
from tkit.specs.quantization import QuantFormat

Stored = Mapping[str, torch.Tensor]
Weights = Mapping[str, torch.Tensor]


# the experts' weights, the statistics of all their inputs and of each one's, the model's dtype
ExpertQuantizer = Callable[..., dict[str, torch.Tensor]]


class Quantizer(NamedTuple):
    """One format. `quantize` takes weights {module: (out, in)} that read the same activations, the statistics of
    those and the model's dtype; it gives {module: stored tensors}. None: looks at weights only, see data_free.py.

    `dequantize` gives the float32 weight (out, in) that multiplies the kernel's input. `kernel_input` makes that of x
    (..., in), where it is not x itself; it needs only those stored tensors that do not grow with the rows of the weight.
    """

    quantize: Callable[..., dict[str, dict[str, torch.Tensor]]] | None
    dequantize: Callable[[Stored], torch.Tensor]
    kernel_input: Callable[[torch.Tensor, Stored], torch.Tensor] | None = None
    quantize_experts: ExpertQuantizer | None = None
    gram: str | None = None  # how far `quantize` compensates rounding errors: within a "block", over the whole "input"
    has_group_size: bool = False  # it takes the size of groups as well
    has_folds: bool = False  # it tries scales on tokens that they have not seen
    has_means: bool = True  # it weighs errors by how loud their channels are


# fmt: off
QUANTIZERS: dict[str, Quantizer] = {
    "fp8":         Quantizer(lambda weights, inputs, dtype: fp8.quantize(weights, inputs), fp8.dequantize,
                             fp8.rounded_per_tensor,
                             lambda weights, pooled, each, dtype: fp8.quantize_experts(weights, pooled),
                             has_means=False),
    "fp8_rowwise": Quantizer(None, fp8.dequantize_rows, lambda x, stored: fp8.rounded_per_token(x)),
    "fp8_block":   Quantizer(None, fp8.dequantize_blocks, lambda x, stored: fp8.rounded_per_block(x)),
    "int8_codes":  Quantizer(None, smoothquant.dequantize),
    "int4":        Quantizer(None, int4.dequantize_groups),
    "int4_awq":    Quantizer(awq.quantize, awq.dequantize, quantize_experts=awq.quantize_experts, gram="block",
                             has_group_size=True),
    "int4_gptq":   Quantizer(awq.quantize, awq.dequantize, quantize_experts=awq.quantize_experts, gram="input",
                             has_group_size=True),
    "w4a8_awq":    Quantizer(w4a8.quantize, w4a8.dequantize, w4a8.kernel_input, gram="block"),
    "nvfp4":       Quantizer(nvfp4.quantize, nvfp4.dequantize, nvfp4.kernel_input, gram="block"),
    "int8_sq":     Quantizer(smoothquant.quantize, smoothquant.dequantize, smoothquant.kernel_input, has_folds=True),
}
# fmt: on


def input_statistics(format_name: str, of_experts: bool = False) -> InputStatistics:
    """What the format's quantizer asks of the activations, still empty. Of experts the Gram matrix in blocks only: whole,
    those of a layer would take gigabytes."""
    quantizer = QUANTIZERS[format_name]
    gram = "block" if of_experts and quantizer.gram else quantizer.gram
    return InputStatistics(gram, quantizer.has_folds, quantizer.has_means)


def dequantize_experts(format: QuantFormat, stored: Stored, num_experts: int) -> torch.Tensor:
    """The weights of all experts, one below the other: (experts * out, in) float32."""
    shared = {tensor.name for tensor in format.tensors if tensor.out_axis is None and not tensor.is_per_expert}
    chunks = {name: values.chunk(num_experts) for name, values in stored.items() if name not in shared}
    of_all = {name: values for name, values in stored.items() if name in shared}
    dequantize = QUANTIZERS[format.name].dequantize
    each = ({name: parts[index] for name, parts in chunks.items()} for index in range(num_experts))
    return torch.cat([dequantize({**of_all, **expert}) for expert in each])
