"""INT4 weights and FP8 activations, multiplied as FP8: what int4.py's codes stand for is rounded to e4m3 once more.

    b >= 8/7 amax(|w'|) / 448, one for all weights with one input          a >= amax(|x / s|) / 448        powers of two
    t b = c amax(|w'|, group) / 7        q = clip(round(w' / (t b)), -8, 7)
    w' ~ e4m3(q t) b                     x' = e4m3(x / s / a) a

w' = w * s, and the factor 1 / s is searched as in awq.py. With this b no code leaves e4m3's range. Each group's c is chosen
by the error of the twice rounded values, where a t whose multiples e4m3 holds exactly has an advantage; the codes are
compensated within 128 channels (compensation.py).

Layout: TensorRT-LLM `W4A8_AWQ`: weight and prequant_scaling_factor as W4A16_AWQ (see int4.py), weights_scaling_factor = t b
(out, in/128), weights_scaling_factor_2 = b and activation_scaling_factor = a, (1,) float32. The loader casts t b to the
model's dtype, takes float16(t b / b) for t, divides the prequant factor by a and multiplies the product by a b. With t b in
that dtype, and b and a powers of two, all of that is exact, in whatever order and type it is done.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tkit.quantize import awq, int4
from tkit.quantize.blocks import row_blocks
from tkit.quantize.compensation import compensated
from tkit.quantize.fp8 import FP8_MAX, fp8_scale, rounded_per_tensor
from tkit.quantize.statistics import InputStatistics

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
GROUP_SIZE = 128  # the kernel has no other


def quantize(
    weights: Mapping[str, torch.Tensor], inputs: InputStatistics, dtype: torch.dtype
) -> dict[str, dict[str, torch.Tensor]]:
    """{module: {stored tensor: values}} for weights (out, in) that read the same activations."""
    prequant = awq.search_prequant(weights, inputs, dtype)
    factor = prequant.float()
    gram = awq.scaled_gram(inputs.gram, factor)
    amax = torch.stack([(weight.float() / factor).abs().amax() for weight in weights.values()]).amax()
    global_scale = _power_of_two(fp8_scale(amax * 8 / 7))
    stored = {}
    for module, weight in weights.items():
        scaled = weight.float() / factor
        scale = _best_scale(scaled, inputs.square_mean * factor.square(), global_scale, dtype)

        def rounded(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return _value(int4.nearest(values, scale), scale, global_scale)

        codes = int4.nearest_codes(compensated(scaled, scale, gram, rounded), scale)
        stored[module] = {
            "weight": int4.pack(codes),
            "weights_scaling_factor": scale,
            "weights_scaling_factor_2": global_scale,
            "activation_scaling_factor": _power_of_two(fp8_scale((inputs.abs_max * factor).amax())),
            "prequant_scaling_factor": prequant,
        }
    return stored


def dequantize(stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(out, in) float32."""
    codes, scale = int4.unpack(stored["weight"]), stored["weights_scaling_factor"]
    groups = codes.reshape(*scale.shape, -1).float()
    return _value(groups, scale[..., None], stored["weights_scaling_factor_2"]).reshape(codes.shape)


def kernel_input(x: torch.Tensor, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """x (..., in) scaled and rounded."""
    return rounded_per_tensor(x * stored["prequant_scaling_factor"].to(x.dtype), stored)


def _power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """The next larger one."""
    return scale.log2().ceil().exp2()


def _best_scale(
    weight: torch.Tensor, moments: torch.Tensor, global_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """t b for every group, (out, in/128)."""
    importance = moments.reshape(-1, GROUP_SIZE)
    best = weight.new_empty(len(weight), len(importance))
    best_error = torch.full_like(best, torch.inf)
    for block, block_best, block_error in row_blocks(weight, best, best_error):
        groups = block.reshape(len(block), -1, GROUP_SIZE)
        amax = groups.abs().amax(dim=-1)
        for clip in CLIPS:
            scale = (clip * amax / 7).to(dtype).float()
            scale = torch.where(scale > 0, scale, global_scale)
            difference = _value(int4.nearest(groups, scale[..., None]), scale[..., None], global_scale) - groups
            error = (difference.square() * importance).sum(dim=-1)
            is_better = error < block_error
            block_best.copy_(torch.where(is_better, scale, block_best))
            block_error.copy_(torch.where(is_better, error, block_error))
    return best


def _value(codes: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """What the kernel multiplies by in place of a code."""
    step = (scale / global_scale).half().float()
    return (codes * step).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * global_scale
