from __future__ import annotations

import pytest
import torch

from tkit.quantize import int4

GENERATOR = torch.Generator().manual_seed(3)


def test_packing_puts_the_even_row_in_the_low_nibble():
    codes = torch.randint(-8, 8, (8, 5), generator=GENERATOR, dtype=torch.int8)
    packed = int4.pack(codes)
    for row in range(4):
        for column in range(5):
            byte = (int(codes[2 * row, column]) & 15) | (int(codes[2 * row + 1, column]) & 15) << 4
            assert int(packed[row, column]) & 255 == byte
    assert torch.equal(int4.unpack(packed), codes)


def test_error_stays_within_half_a_step():
    weight = torch.randn(32, 256, generator=GENERATOR)
    scales = nearest_scale(weight, torch.bfloat16)
    error = (int4.dequantize(int4.nearest_codes(weight, scales), scales) - weight).abs().reshape(32, 2, 128)
    # the scale is rounded to bfloat16 first, which can push the largest value up to 2^-9 * 7 beyond the last code
    assert (error <= scales[..., None] * (0.5 + 7 * 2**-8)).all()


def nearest_scale(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (weight.reshape(len(weight), -1, 128).abs().amax(-1) / 7).to(dtype).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_survive_the_loaders_cast_to_the_models_dtype(dtype):
    scales, _ = int4.clipped_scale(torch.randn(8, 128, generator=GENERATOR), 128, dtype, torch.ones(128))
    assert torch.equal(scales.to(dtype).float(), scales)


def test_clipping_picks_the_best_ratio_of_every_group_by_itself():
    weight = torch.randn(4, 256, generator=GENERATOR)
    weight[1, 5] = 9.0  # an outlier on a channel that hardly matters
    moments = torch.rand(256, generator=GENERATOR) + 0.1
    moments[5] = 1e-3
    scales, left = int4.clipped_scale(weight, 128, torch.bfloat16, moments)
    codes = int4.nearest_codes(weight, scales)
    chosen = set()
    for row in range(4):
        for group in range(2):
            columns = slice(group * 128, (group + 1) * 128)
            values, importance = weight[row, columns], moments[columns]
            errors = {}
            for clip in (1.0, *int4.CLIPS):
                scale = (clip * values.abs().max() / 7).to(torch.bfloat16).float()
                rounded = (values / scale).round().clamp(-8, 7)
                errors[clip] = (((rounded * scale - values) ** 2 * importance).sum().item(), scale)
            best = min(errors, key=lambda clip: errors[clip][0])
            chosen.add(best)
            assert scales[row, group] == errors[best][1]
            assert left[row, group].item() == pytest.approx(errors[best][0], rel=1e-4)
            assert torch.equal(codes[row, columns], (values / scales[row, group]).round().clamp(-8, 7).to(torch.int8))
    assert len(chosen) > 2
