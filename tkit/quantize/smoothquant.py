"""SmoothQuant: INT8 weights and INT8 activations, with the loud input channels made quieter and their weights larger.

    s = amax(|x|)^a / amax(|w|)^(1-a) per channel, normalised by sqrt(max s * min s)        x' = x / s        w' = w * s
    weight scale = amax(|w'|, row) / 127        activation scale = amax(|x'|) / 127, static        codes: nearest, even

`a` is searched for all weights that read the same activations at once (q, k and v; fc and gate). The error is that of the
weights, as in awq.py, and that of the activations, sum_j E[(x^'_j - x'_j)^2] sum_rows w'^2. The latter is measured on tokens
that the scales have not seen: each fold of the calibration text against the scales of all others. What those scales cut off
is most of the error; judged on the very tokens that set them, a = 1 looks best, where every channel just reaches its
limit, and does worst: KL divergence of the demo model 3.4e-3, of the a found here 1.9e-3, of a = 0.5 2.4e-3.

Method: Xiao et al., SmoothQuant, https://arxiv.org/abs/2211.10438. Layout: TensorRT-LLM `W8A8_SQ_PER_CHANNEL`: weight (out,
in) int8, weights_scaling_factor (out,) and activation_scaling_factor (1,) float32, prequant_scaling_factor (in,) = 1 / s.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tkit.quantize.statistics import InputStatistics, least, positive

EXPONENTS = tuple(step / 20 for step in range(21))
SEARCH_ROWS = 512  # evenly spread
INT8_MAX = 127


def quantize(
    weights: Mapping[str, torch.Tensor], inputs: InputStatistics, dtype: torch.dtype
) -> dict[str, dict[str, torch.Tensor]]:
    """{module: {stored tensor: values}} for weights (out, in) that read the same activations."""
    prequant = search_prequant(weights, inputs, dtype)
    factor = prequant.float()
    stored = {}
    for module, weight in weights.items():
        scaled = weight.float() / factor
        scale = _scale(scaled.abs().amax(dim=1))
        stored[module] = {
            "weight": _codes(scaled, scale[:, None]).to(torch.int8),
            "weights_scaling_factor": scale,
            "activation_scaling_factor": _scale((inputs.abs_max * factor).amax().reshape(1)),
            "prequant_scaling_factor": prequant,
        }
    return stored


def dequantize(stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(out, in) float32."""
    return stored["weight"].float() * stored["weights_scaling_factor"][:, None]


def kernel_input(x: torch.Tensor, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """x (..., in) scaled and rounded."""
    scaled = x.float() * stored["prequant_scaling_factor"].float()
    return _rounded(scaled, stored["activation_scaling_factor"]).to(x.dtype)


def search_prequant(weights: Mapping[str, torch.Tensor], inputs: InputStatistics, dtype: torch.dtype) -> torch.Tensor:
    """The (in,) factor 1 / s with the smallest output error, in `dtype`."""
    weight_max = torch.stack([weight.abs().amax(dim=0) for weight in weights.values()]).amax(dim=0).float()
    energy = torch.stack([weight.float().square().sum(dim=0) for weight in weights.values()]).sum(dim=0)
    num_rows = sum(map(len, weights.values()))
    step = max(num_rows // SEARCH_ROWS, 1)
    rows = torch.cat([weight[::step] for weight in weights.values()]).float()
    folds = inputs.folds()
    candidates = [candidate(inputs.abs_max, weight_max, exponent).to(dtype) for exponent in EXPONENTS]
    errors = []
    for exponent, prequant in zip(EXPONENTS, candidates, strict=True):
        factor = prequant.float()
        scaled = rows / factor
        difference = _rounded(scaled, _scale(scaled.abs().amax(dim=1, keepdim=True))) - scaled
        error = (difference.square() * inputs.square_mean * factor.square()).sum().double() * num_rows / len(rows)
        for abs_max, x in folds:
            factor = candidate(abs_max, weight_max, exponent)
            x_scaled = x * factor
            x_difference = _rounded(x_scaled, _scale((abs_max * factor).amax())) - x_scaled
            error += (x_difference.square().mean(dim=0) * energy / factor.square()).sum().double() / len(folds)
        errors.append(error)
    return least(candidates, errors)


def candidate(input_max: torch.Tensor, weight_max: torch.Tensor, exponent: float) -> torch.Tensor:
    """1 / s for one exponent, (in,) float32. Channels without inputs or weights count as the weakest that have some."""
    scale = positive(input_max).pow(exponent) / positive(weight_max).pow(1 - exponent)
    scale = scale / (scale.max() * scale.min()).sqrt()
    return 1 / scale.clamp(1e-4, 1e4)  # beyond that, 1 / s leaves the range of float16


def _scale(amax: torch.Tensor) -> torch.Tensor:
    scale = amax / INT8_MAX
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _codes(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (values / scale).round_().clamp_(-INT8_MAX - 1, INT8_MAX)


def _rounded(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return _codes(values, scale).mul_(scale)
