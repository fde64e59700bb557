"""INT8 weights, 16-bit activations, one scale per output row (W8A16).

    scale = amax(|w|, row) / 128, stored in the weight's own dtype        q = clip(round_half_away(w / scale), -128, 127)

The checkpoint holds the plain 16-bit weights: the packed layout differs between GPU generations, so trtllm-build makes it
on the machine that will run it (`symmetric_quantize_last_axis_of_batched_matrix`). `rounded` is what it will make of them.
"""

from __future__ import annotations

import torch


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """The values of `weight` (out, in), float16 or bfloat16, after the build has quantized it; float32."""
    values = weight.float()
    scale = (values.abs().amax(dim=1, keepdim=True) / 128).to(weight.dtype).float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = values / scale
    codes = (codes.sign() * (codes.abs() + 0.5).floor()).clamp(-128, 127)  # torch.round would round halves to even
    return codes * scale
