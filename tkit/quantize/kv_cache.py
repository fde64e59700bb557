"""Keys and values in 8 bits: one scale per layer, or one for the keys and one for the values.

    fp8:  scale = amax / 448        q = e4m3(x / scale), nearest even, saturating
    int8: scale = amax / 127        q = clip(round_half_even(x / scale), -128, 127)        x ~ q * scale

amax is that of what the kernel stores: keys behind the rotary embedding, values as they are. A rotation can make a value up
to 1.41 times as large, so the outputs of k_proj would not do. TensorRT-LLM's checkpoint has one scale, the larger of the two.

Source: TensorRT-LLM 1.0-1.2 `kernels/unfusedAttentionKernels` (keys are stored behind RoPE), `models/modeling_utils.py`.
"""

from __future__ import annotations

import torch

from tkit.quantize import fp8

INT8_MAX = 127.0


class KvStatistics:
    """Absolute maxima of keys and of values, (1,) float32 each."""

    def __init__(self) -> None:
        self.keys = torch.zeros(1)
        self.values = torch.zeros(1)

    def update(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys = torch.maximum(self.keys, keys.abs().amax().float().cpu().reshape(1))
        self.values = torch.maximum(self.values, values.abs().amax().float().cpu().reshape(1))


def scales(dtype: str, seen: KvStatistics) -> dict[str, torch.Tensor]:
    """{stored tensor: (1,) float32}: the common scale, and one each."""
    keys, values = _scale(dtype, seen.keys), _scale(dtype, seen.values)
    return {"kv_cache_scaling_factor": torch.maximum(keys, values), "k_scale": keys, "v_scale": values}


def _scale(dtype: str, amax: torch.Tensor) -> torch.Tensor:
    """All-zero tensors get 1.0: any scale is exact, and 0 would divide."""
    scale = amax / (fp8.FP8_MAX if dtype == "fp8" else INT8_MAX)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def rounded(x: torch.Tensor, scale: torch.Tensor, dtype: str) -> torch.Tensor:
    """What attention reads back from the cache."""
    values = x.float() / scale
    if dtype == "fp8":
        codes = values.clamp(-fp8.FP8_MAX, fp8.FP8_MAX).to(torch.float8_e4m3fn).float()
    else:
        codes = values.round().clamp(-128, 127)
    return (codes * scale).to(x.dtype)
