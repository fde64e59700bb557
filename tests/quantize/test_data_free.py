"""The numpy roundings against torch's casts, which round in another way, and against a slow recomputation."""

from __future__ import annotations

import numpy as np
import torch

from tkit.quantize.data_free import fp8_bits, fp8_rows, int4_groups


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().float().numpy()


def test_fp8_bits_are_those_of_torchs_cast_from_the_smallest_value_to_the_largest():
    # every float32 sign and exponent up to 448, with mantissas on, just below and just above every tie of e4m3
    exponents = np.arange(0, 127 + 9, dtype=np.uint32) << 23
    ties = (np.arange(0, 17, dtype=np.uint32) << 19)[:, None] + np.array([-1, 0, 1], dtype=np.int64).astype(np.uint32)
    bits = (exponents[:, None, None] + ties).astype(np.uint32).reshape(-1)
    values = np.concatenate([bits, bits | np.uint32(1 << 31)]).view(np.float32)
    values = values[np.abs(values) <= 448 * (1 + 1e-6)]
    expected = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(fp8_bits(values.copy()), expected)


def test_rows_are_scaled_one_by_one_with_the_kernels_floor():
    weight = np.random.default_rng(3).standard_normal((5, 16), dtype=np.float32)
    weight[2] = 1e-9
    stored = fp8_rows(weight.copy())
    for row in range(5):
        scale = max(np.abs(weight[row]).max() / np.float32(448), np.float32(1 / (448 * 512)))
        assert stored["per_channel_scale"][row] == scale
        codes = (torch.from_numpy(weight[row]) / scale).to(torch.float8_e4m3fn).view(torch.uint8)
        assert stored["weight"][row].tolist() == codes.tolist()


def test_int4_codes_and_scales_equal_a_slow_recomputation():
    weight = np.random.default_rng(4).standard_normal((6, 256), dtype=np.float32)
    weight[1, :128] = 0
    stored = int4_groups(weight.copy(), 128, to_bfloat16)
    for row in range(6):
        for column in range(256):
            group = weight[row, column // 128 * 128 :][:128]
            scale = float(to_bfloat16(np.abs(group).max(keepdims=True) / np.float32(7))[0]) or 1.0
            assert stored["weights_scaling_factor"][row, column // 128] == scale
            code = min(max(round(float(weight[row, column] / np.float32(scale))), -8), 7)
            byte = int(stored["weight"][row // 2, column])
            assert (byte >> 4 if row % 2 else byte & 15) == code & 15
