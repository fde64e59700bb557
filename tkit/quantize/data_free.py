"""Formats that look at weights only, in numpy: a build that needs no calibration does not pay for importing torch.

Each takes float32 rows (rows, in), which it may overwrite, and returns {stored tensor: array}. Rows do not know of each other
(INT4 packs them in pairs), so callers hand over blocks that stay in the processor's cache.

    fp8_rowwise    scale = max(amax(|row|) / 448, 1 / (448 * 512))          q = e4m3(w / scale), nearest even
    int4           scale = amax(|w|, group) / 7 in the model's dtype        q = clip(round_half_even(w / scale), -8, 7)

Layouts: TensorRT-LLM `FP8_PER_CHANNEL_PER_TOKEN`, weight (out, in) and per_channel_scale (out,); `W4A16_AWQ`, see int4.py.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

BLOCK_VALUES = 1 << 18  # 1 MB of float32: what such a block of rows needs stays in the processor's cache
FP8_MAX = 448.0  # largest finite e4m3fn value
MIN_ROW_SCALE = 1 / (FP8_MAX * 512)  # the kernel's own floor


def fp8_rows(weight: np.ndarray) -> dict[str, np.ndarray]:
    """`weight` (rows, in) uint8 bits of e4m3fn, `per_channel_scale` (rows,) float32."""
    scale = np.maximum(np.abs(weight).max(axis=1) / np.float32(FP8_MAX), np.float32(MIN_ROW_SCALE))
    weight /= scale[:, None]
    return {"weight": fp8_bits(weight), "per_channel_scale": scale}


def fp8_bits(values: np.ndarray) -> np.ndarray:
    """float32 values up to 448 as e4m3fn bits (uint8), rounded to nearest even."""
    return values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def int4_groups(
    weight: np.ndarray, group_size: int, to_model_dtype: Callable[[np.ndarray], np.ndarray]
) -> dict[str, np.ndarray]:
    """`weight` (rows/2, in) uint8, `weights_scaling_factor` (rows, in/group) float32 holding values of the model's dtype."""
    groups = weight.reshape(len(weight), -1, group_size)
    scale = to_model_dtype(np.abs(groups).max(axis=2) / np.float32(7))
    scale[scale == 0] = 1
    groups /= scale[..., None]
    codes = np.rint(weight, out=weight).astype(np.int8).clip(-8, 7).view(np.uint8)
    return {"weight": (codes[0::2] & np.uint8(0xF)) | (codes[1::2] << 4), "weights_scaling_factor": scale}
