"""INT4 in groups along the input: the grid and the packing, shared by every int4 format.

    scale = c amax(|w|, group) / 7      q = clip(round_half_even(w / scale), -8, 7)        w ~ q * scale

c is 1, or, where the inputs' second moments m are known, the one of CLIPS with the smallest sum_j m_j (q_j scale - w_j)^2 over
the group: cutting off the largest weight makes the grid finer for all others. That sum is the expected squared error of the
output if rounding errors of different weights are independent.

The loader casts scales to the model's dtype, so the scale is rounded to it *before* the codes are chosen: what is searched
and validated is what the kernel multiplies by. Stored as float32, the type every reader accepts.

Layout: TensorRT-LLM `W4A16_AWQ`, neutral: int8 (out/2, in), byte [r, c] holds rows 2r (low nibble) and 2r+1, two's
complement; scales (out, in/group).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tkit.quantize.blocks import row_blocks

GROUP_SIZE = 128
# six of them, 0.95 to 0.7: KL divergence of compensated codes 3 % lower or 2 % higher, twice the time
CLIPS = (0.88, 0.76)


def clipped_scale(
    weight: torch.Tensor, group_size: int, dtype: torch.dtype, moments: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scales of `weight` (out, in) float32 and the errors that they leave; both (out, in/group) float32.

    Scales hold values of `dtype`. `moments` (in,) are E[x^2].
    """
    importance = moments.reshape(-1, group_size)  # (groups, group)
    scale = weight.new_empty(len(weight), len(importance))
    error = torch.full_like(scale, float("inf"))
    for block, block_scale, block_error in row_blocks(weight, scale, error):
        groups = block.reshape(len(block), -1, group_size)  # (rows, groups, group)
        amax = groups.abs().amax(dim=-1)
        for clip in (1.0, *CLIPS):
            candidate = _scale(clip * amax, dtype)
            exact = groups / candidate[..., None]
            steps = exact.round().clamp_(-8, 7).sub_(exact)  # how many steps off
            candidate_error = steps.square_().mul_(importance).sum(dim=-1) * candidate.square()
            is_better = candidate_error < block_error
            block_error.copy_(torch.where(is_better, candidate_error, block_error))
            block_scale.copy_(torch.where(is_better, candidate, block_scale))
    return scale, error


def _scale(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    scale = (amax / 7).to(dtype).float()
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def nearest(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes as floats."""
    return (values / scale).round_().clamp_(-8, 7)


def rounded(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The nearest values of the grid."""
    return nearest(values, scale).mul_(scale)


def nearest_codes(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(out, in) int8 on the given scales (out, in/group)."""
    codes = torch.empty_like(weight, dtype=torch.int8)
    for block, block_scale, block_codes in row_blocks(weight, scale, codes):
        groups = block.reshape(*block_scale.shape, -1)
        block_codes.copy_(nearest(groups, block_scale[..., None]).reshape(block.shape))
    return codes


def dequantize_groups(stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(out, in) float32. `zero` (out, in/group), where a format has zero points, is added."""
    weight = dequantize(unpack(stored["weight"]), stored["weights_scaling_factor"])
    if "zero" not in stored:
        return weight
    zero = stored["zero"].float()
    return (weight.reshape(*zero.shape, -1) + zero[..., None]).reshape(weight.shape)


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(out, in) float32."""
    groups = codes.reshape(*scale.shape, -1).float()
    return (groups * scale[..., None]).reshape(codes.shape)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """(out, in) int8 codes -> (out/2, in) int8."""
    return (codes[0::2] & 0xF) | (codes[1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """(out/2, in) int8 -> (out, in) int8; shifting left and back right carries the sign into the low nibble."""
    codes = torch.stack(((packed << 4) >> 4, packed >> 4), dim=1)  # (out/2, 2, in)
    return codes.reshape(-1, packed.shape[1])
