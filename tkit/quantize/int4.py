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

GROUP_SIZE = 128
CLIPS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # on the demo model 0.65 is never chosen


def quantize(
    weight: torch.Tensor, group_size: int, dtype: torch.dtype, moments: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (out, in) int8 and scales (out, in/group) float32 holding values of `dtype`. `moments` (in,) are E[x^2]."""
    groups = weight.reshape(len(weight), -1, group_size)  # (out, groups, group)
    amax = groups.abs().amax(dim=-1)
    codes, scale = _codes(groups, amax, dtype)
    if moments is not None:
        importance = moments.reshape(-1, group_size)  # (groups, group)
        error = _error(groups, codes, scale, importance)
        for clip in CLIPS:
            clipped_codes, clipped_scale = _codes(groups, clip * amax, dtype)
            clipped_error = _error(groups, clipped_codes, clipped_scale, importance)
            is_better = clipped_error < error
            error = torch.where(is_better, clipped_error, error)
            scale = torch.where(is_better, clipped_scale, scale)
            codes = torch.where(is_better[..., None], clipped_codes, codes)
    return codes.reshape(weight.shape).to(torch.int8), scale


def _codes(groups: torch.Tensor, amax: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (amax / 7).to(dtype).float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (groups / scale[..., None]).round().clamp(-8, 7), scale


def _error(groups: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """(out, groups)"""
    return ((codes * scale[..., None] - groups).square() * importance).sum(dim=-1)


def rounded(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The nearest values of the grid; both of one shape."""
    return (values / scale).round_().clamp_(-8, 7).mul_(scale)


def nearest_codes(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(out, in) int8 on the given scales (out, in/group)."""
    groups = weight.reshape(*scale.shape, -1)
    return (groups / scale[..., None]).round_().clamp_(-8, 7).reshape(weight.shape).to(torch.int8)


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
