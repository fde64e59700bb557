"""NVFP4: weights and activations in e2m1, blocks of 16 along the input with an e4m3 scale each.

    g = amax(|w|) / (6 * 448), one for all weights with one input       s = e4m3(c amax(|w|, block) / 6 / g)
    q = e2m1(w / (s g)), nearest, ties to the even code, saturating at 6        w ~ q s g

c is the one of CLIPS with the smallest sum_j E[x_j^2] (w^_j - w_j)^2 over the block; with 1.5 the largest weight becomes 4
instead of 6, where the grid is finer. The codes are compensated within 128 channels (compensation.py). Activations are
quantized by the kernel, each block with its own scale under the static a = amax(|x|) / (6 * 448).

Layout: TensorRT-LLM `NVFP4`: weight uint8 (out, in/2), the even channel in the low nibble (sign, then magnitude),
weights_scaling_factor float8_e4m3fn (out, in/16), weights_scaling_factor_2 = g and activation_scaling_factor = a, (1,)
float32. Follows NVIDIA ModelOpt 0.47.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tkit.quantize.blocks import row_blocks
from tkit.quantize.compensation import compensated
from tkit.quantize.fp8 import FP8_MAX
from tkit.quantize.statistics import InputStatistics

BLOCK = 16
E2M1_MAX = 6.0
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code
CLIPS = (1.0, 1.5, 1.25, 0.9, 0.8)


def quantize(
    weights: Mapping[str, torch.Tensor], inputs: InputStatistics, dtype: torch.dtype
) -> dict[str, dict[str, torch.Tensor]]:
    """{module: {stored tensor: values}} for weights (out, in) that read the same activations."""
    global_scale = _global_scale(torch.stack([weight.abs().amax() for weight in weights.values()]).amax())
    input_scale = _global_scale(inputs.abs_max.amax())
    stored = {}
    for module, weight in weights.items():
        weight = weight.float()
        scale = _best_scale(weight, inputs.square_mean, global_scale)  # (out, in/16)
        targets = compensated(weight, scale.float() * global_scale, inputs.gram, rounded)
        stored[module] = {
            "weight": pack(_divided(targets.reshape(*scale.shape, BLOCK), scale, global_scale).reshape(weight.shape)),
            "weights_scaling_factor": scale,
            "weights_scaling_factor_2": global_scale,
            "activation_scaling_factor": input_scale,
        }
    return stored


def dequantize(stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(out, in) float32."""
    values, scale = unpack(stored["weight"]), stored["weights_scaling_factor"].float()
    blocks = values.reshape(*scale.shape, BLOCK) * (scale * stored["weights_scaling_factor_2"])[..., None]
    return blocks.reshape(values.shape)


def kernel_input(x: torch.Tensor, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """x (..., in), each block of 16 channels of a token with its own scale."""
    blocks = x.float().reshape(-1, BLOCK)
    global_scale = stored["activation_scaling_factor"]
    scale = _block_scale(blocks.abs().amax(dim=-1), global_scale).float() * global_scale
    return rounded(blocks, scale[:, None]).reshape(x.shape).to(x.dtype)


def rounded(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The nearest values of the grid."""
    return round_to_e2m1(values / scale).mul_(scale)


def round_to_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Steps of 0.5 below 2, of 1 below 4, of 2 up to 6; halves to the even code."""
    magnitude = values.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return (values / step).round_().mul_(step).clamp_(-E2M1_MAX, E2M1_MAX)


def pack(values: torch.Tensor) -> torch.Tensor:
    """(out, in) values of the grid -> (out, in/2) uint8."""
    magnitudes = torch.tensor(MAGNITUDES, device=values.device)
    codes = torch.searchsorted(magnitudes, values.abs()).to(torch.uint8)
    codes |= (values < 0).to(torch.uint8) << 3
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """(out, in/2) uint8 -> (out, in) float32."""
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).reshape(len(packed), -1).long()
    grid = torch.tensor(MAGNITUDES + tuple(-magnitude for magnitude in MAGNITUDES), device=packed.device)
    return grid[codes]


def _best_scale(weight: torch.Tensor, moments: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """(out, in/16) e4m3"""
    importance = moments.reshape(-1, BLOCK)
    best = weight.new_empty(len(weight), len(importance))
    best_error = torch.full_like(best, torch.inf)
    for rows, rows_best, rows_error in row_blocks(weight, best, best_error):
        blocks = rows.reshape(len(rows), -1, BLOCK)
        amax = blocks.abs().amax(dim=-1)
        for clip in CLIPS:
            scale = _block_scale(clip * amax, global_scale).float()
            difference = rounded(blocks, (scale * global_scale)[..., None]) - blocks
            error = (difference.square() * importance).sum(dim=-1)
            is_better = error < rows_error
            rows_best.copy_(torch.where(is_better, scale, rows_best))
            rows_error.copy_(torch.where(is_better, error, rows_error))
    return best.to(torch.float8_e4m3fn)


def _global_scale(amax: torch.Tensor) -> torch.Tensor:
    """(1,) float32. All zeros get 1.0: any scale is exact, and 0 would divide."""
    scale = amax.float().reshape(1) / (E2M1_MAX * FP8_MAX)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _block_scale(amax: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """e4m3. Blocks that e4m3 cannot tell from zero get 1.0, on whose grid they are zero."""
    scale = (amax / E2M1_MAX / global_scale).clamp(max=FP8_MAX).to(torch.float8_e4m3fn)
    return torch.where(scale.float() > 0, scale.float(), 1.0).to(torch.float8_e4m3fn)


def _divided(blocks: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """Values of the grid, before they are multiplied by their scales."""
    return round_to_e2m1(blocks / (scale.float() * global_scale)[..., None])
