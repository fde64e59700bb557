"""AWQ with error compensation: INT4 weights after scaling the input channels that matter most.

    s = mean(|x|)^a, normalised by sqrt(max s * min s)        stored weight = int4(w * s)        x is multiplied by 1 / s

`a` is searched over a grid for all weights that read the same activations at once (q, k and v; fc and gate), against the
expected squared error of their outputs, each group's range clipped as int4.py does. One exponent per input means that what is
searched is what ships: nothing is averaged afterwards. The factor 1 / s is rounded to the model's dtype first, as the kernel
reads it. The error is sum_j E[x_j^2] (w^_j - w_j)^2, as if rounding errors were independent: measured on the outputs of 512
tokens instead, the demo model's KL divergence was 2.39e-2, with this sum 2.32e-2, at a fraction of the cost.

The codes are then chosen by compensation.py, within 128 channels (`int4_awq`) or over the whole input (`int4_gptq`). KL
divergence of the demo model: rounding to nearest 3.6e-2, without compensation 2.3e-2, within 128 channels 1.3e-2, over the
whole input 1.0e-2. Without the factor, compensation over the whole input does as well there, but twice as badly once a few
channels are 30 times as loud, as they are in large models.

Method: Lin et al., AWQ, https://arxiv.org/abs/2306.00978. Layout: TensorRT-LLM `W4A16_AWQ` (see int4.py), with
`prequant_scaling_factor` (in,) = 1 / s in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from tkit.quantize import int4
from tkit.quantize.compensation import compensated
from tkit.quantize.statistics import InputStatistics, least, positive

EXPONENTS = tuple(step / 10 for step in range(11))  # half the steps: the same KL divergence within 4 %
SEARCH_ROWS = 128  # evenly spread; the demo model's KL divergence is the same with 64 as with all of them


def quantize(
    weights: Mapping[str, torch.Tensor], inputs: InputStatistics, dtype: torch.dtype, group_size: int = int4.GROUP_SIZE
) -> dict[str, dict[str, torch.Tensor]]:
    """{module: {stored tensor: values}} for weights (out, in) that read the same activations."""
    prequant = search_prequant(weights, inputs, dtype, group_size)
    return {module: _quantized(weight, inputs, prequant, dtype, group_size) for module, weight in weights.items()}


def quantize_experts(
    weights: Sequence[torch.Tensor],
    pooled: InputStatistics,
    each: Sequence[InputStatistics],
    dtype: torch.dtype,
    group_size: int = int4.GROUP_SIZE,
) -> dict[str, torch.Tensor]:
    """The experts below one another. The kernel has one factor for all of them, searched on the inputs of all; scales and
    codes are each expert's, by its own inputs."""
    prequant = search_prequant({str(index): weight for index, weight in enumerate(weights)}, pooled, dtype, group_size)
    parts = [
        _quantized(weight, inputs, prequant, dtype, group_size) for weight, inputs in zip(weights, each, strict=True)
    ]
    stored = {name: torch.cat([part[name] for part in parts]) for name in ("weight", "weights_scaling_factor")}
    return {**stored, "prequant_scaling_factor": prequant}


def _quantized(
    weight: torch.Tensor, inputs: InputStatistics, prequant: torch.Tensor, dtype: torch.dtype, group_size: int
) -> dict[str, torch.Tensor]:
    factor = prequant.float()
    gram = scaled_gram(inputs.gram, factor)
    scaled = weight.float() / factor
    scale, _ = int4.clipped_scale(scaled, group_size, dtype, inputs.square_mean * factor.square())
    codes = int4.nearest_codes(compensated(scaled, scale, gram, int4.rounded), scale)
    return {"weight": int4.pack(codes), "weights_scaling_factor": scale, "prequant_scaling_factor": prequant}


def dequantize(stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weight that multiplies the *unscaled* input: (out, in) float32."""
    return int4.dequantize_groups(stored) * stored["prequant_scaling_factor"].float()


def scaled_gram(gram: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """That of x * factor, (blocks, size, size)."""
    blocks = factor.reshape(len(gram), -1)
    return gram * blocks[:, :, None] * blocks[:, None, :]


def search_prequant(
    weights: Mapping[str, torch.Tensor], inputs: InputStatistics, dtype: torch.dtype, group_size: int = int4.GROUP_SIZE
) -> torch.Tensor:
    """The (in,) factor with the smallest output error, in `dtype`."""
    moments = inputs.square_mean
    num_rows = sum(map(len, weights.values()))
    step = max(num_rows // SEARCH_ROWS, 1)
    stacked = torch.cat([weight[::step] for weight in weights.values()]).float()  # (rows, in)
    candidates = [candidate(inputs.abs_mean, exponent).to(dtype) for exponent in EXPONENTS]
    errors = []
    for factor in (prequant.float() for prequant in candidates):
        _, group_errors = int4.clipped_scale(stacked / factor, group_size, dtype, moments * factor.square())
        errors.append(group_errors.sum())
    return least(candidates, errors)


def candidate(abs_mean: torch.Tensor, exponent: float) -> torch.Tensor:
    """1 / s for one exponent, (in,) float32. Channels that were never active count as the weakest active one."""
    scale = positive(abs_mean).pow(exponent)
    scale = scale / (scale.max() * scale.min()).sqrt()
    return 1 / scale.clamp(1e-4, 1e4)  # beyond that, 1 / s leaves the range of float16
