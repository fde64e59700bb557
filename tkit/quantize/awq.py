"""AWQ: INT4 weights after scaling the input channels that matter most.

    s = mean(|x|)^a, normalised by sqrt(max s * min s)        stored weight = int4(w * s)        x is multiplied by 1 / s

`a` is searched over a grid for all weights that read the same activations at once (q, k and v; fc and gate), against the
summed squared error of their outputs on the calibration sample. One exponent per input means that what is searched is what
ships: nothing is averaged afterwards. The factor 1 / s is rounded to the model's dtype first, as the kernel reads it.

Method: Lin et al., AWQ, https://arxiv.org/abs/2306.00978. Layout: TensorRT-LLM `W4A16_AWQ` (see int4.py), with
`prequant_scaling_factor` (in,) = 1 / s in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tkit.quantize import int4
from tkit.quantize.statistics import InputStatistics

EXPONENTS = tuple(step / 20 for step in range(21))


def quantize(
    weights: Mapping[str, torch.Tensor], inputs: InputStatistics, dtype: torch.dtype
) -> dict[str, dict[str, torch.Tensor]]:
    """{module: {stored tensor: values}} for float32 weights (out, in) that read the same activations."""
    prequant = search_prequant(weights, inputs, dtype)
    stored = {}
    for module, weight in weights.items():
        codes, scale = int4.quantize(weight / prequant.float(), int4.GROUP_SIZE, dtype)
        stored[module] = {
            "weight": int4.pack(codes),
            "weights_scaling_factor": scale,
            "prequant_scaling_factor": prequant,
        }
    return stored


def dequantize(stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weight that multiplies the *unscaled* input: (out, in) float32."""
    return int4.dequantize_groups(stored) * stored["prequant_scaling_factor"].float()


def search_prequant(weights: Mapping[str, torch.Tensor], inputs: InputStatistics, dtype: torch.dtype) -> torch.Tensor:
    """The (in,) factor with the smallest output error, in `dtype`."""
    sample = inputs.sample  # (tokens, in)
    stacked = torch.cat(list(weights.values()))  # (sum of out, in)
    best_error, best = float("inf"), torch.ones(0)
    for exponent in EXPONENTS:
        prequant = candidate(inputs.abs_mean, exponent).to(dtype)
        codes, scale = int4.quantize(stacked / prequant.float(), int4.GROUP_SIZE, dtype)
        difference = int4.dequantize(codes, scale) * prequant.float() - stacked
        error = (sample @ difference.T).square().sum().item()
        if error < best_error:
            best_error, best = error, prequant
    return best


def candidate(abs_mean: torch.Tensor, exponent: float) -> torch.Tensor:
    """1 / s for one exponent, (in,) float32. Channels that were never active count as the weakest active one."""
    active = abs_mean[abs_mean > 0]
    if len(active) == 0:
        return torch.ones_like(abs_mean)
    scale = abs_mean.clamp(min=active.min().item()).pow(exponent)
    scale = scale / (scale.max() * scale.min()).sqrt()
    return 1 / scale.clamp(1e-4, 1e4)  # beyond that, 1 / s leaves the range of float16
