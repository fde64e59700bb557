from __future__ import annotations

import pytest
import torch

from tkit.quantize import nvfp4
from tkit.quantize.statistics import InputStatistics

GENERATOR = torch.Generator().manual_seed(13)
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # 2 exponent bits, bias 1, one mantissa bit


def nearest_code(value: float) -> int:
    """Slow and obvious: the closest magnitude, on a tie the even code; bit 3 is the sign."""
    distances = [abs(abs(value) - magnitude) for magnitude in E2M1]
    code = min((code for code in range(8) if distances[code] == min(distances)), key=lambda code: code % 2)
    return code | (8 if value < 0 and code else 0)


def statistics(x: torch.Tensor) -> InputStatistics:
    inputs = InputStatistics("block")
    inputs.update(x)
    return inputs


def test_rounding_and_packing_are_those_of_the_grid():
    values = torch.cat((torch.linspace(-7, 7, 1025), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])))
    values = torch.cat((values, -values))
    codes = [nearest_code(value) for value in values.tolist()]
    packed = nvfp4.pack(nvfp4.round_to_e2m1(values)[None])[0].tolist()
    assert packed == [low | high << 4 for low, high in zip(codes[0::2], codes[1::2], strict=True)]
    expected = [(-1 if code & 8 else 1) * E2M1[code & 7] for code in codes]
    assert nvfp4.unpack(nvfp4.pack(nvfp4.round_to_e2m1(values)[None]))[0].tolist() == expected


def test_stored_tensors_equal_a_slow_recomputation():
    """With inputs that do not correlate, nothing is compensated: every code is the nearest under its block's best scale."""
    weight = torch.randn(6, 64, generator=GENERATOR)
    weight[2, 5] = 9.0
    inputs = statistics(torch.eye(64))
    stored = nvfp4.quantize({"m": weight}, inputs, torch.bfloat16)["m"]
    global_scale = weight.abs().max() / (6 * 448)
    assert stored["weights_scaling_factor_2"].tolist() == [global_scale.item()]
    assert stored["activation_scaling_factor"].item() == pytest.approx(1 / (6 * 448))
    chosen = set()
    for row in range(6):
        for block in range(4):
            values = weight[row, block * 16 : (block + 1) * 16]
            errors = {}
            for clip in nvfp4.CLIPS:
                raw = (clip * values.abs().max() / 6 / global_scale).clamp(max=448).to(torch.float8_e4m3fn)
                step = raw.float() * global_scale
                codes = [nearest_code(value) for value in (values / step).tolist()]
                found = torch.tensor([(-1 if code & 8 else 1) * E2M1[code & 7] for code in codes]) * step
                errors[clip] = (((found - values) ** 2).sum().item(), raw.float().item(), codes)
            best = min(errors, key=lambda clip: errors[clip][0])
            chosen.add(best)
            assert stored["weights_scaling_factor"][row, block].float().item() == errors[best][1]
            packed = stored["weight"][row, block * 8 : (block + 1) * 8].tolist()
            assert [nibble for byte in packed for nibble in (byte & 15, byte >> 4)] == errors[best][2]
    assert len(chosen) > 2


def test_error_stays_within_half_the_widest_step_of_its_block():
    weight = torch.randn(32, 128, generator=GENERATOR)
    stored = nvfp4.quantize({"m": weight}, statistics(torch.eye(128)), torch.bfloat16)["m"]
    step = (stored["weights_scaling_factor"].float() * stored["weights_scaling_factor_2"]).repeat_interleave(16, 1)
    error = (nvfp4.dequantize(stored) - weight).abs()
    assert (error <= torch.maximum(step, weight.abs() - 6 * step) * (1 + 1e-5)).all()


def test_activations_have_a_scale_per_block_under_the_static_one():
    x = torch.randn(3, 2, 32, generator=GENERATOR) * 10
    x[0, 0, :16] = 0
    stored = {"activation_scaling_factor": torch.tensor([x.abs().max().item() / (6 * 448)])}
    found = nvfp4.kernel_input(x, stored)
    for values, rounded in zip(x.reshape(-1, 16), found.reshape(-1, 16), strict=True):
        scale = (values.abs().max() / 6 / stored["activation_scaling_factor"]).to(torch.float8_e4m3fn).float()
        step = (scale * stored["activation_scaling_factor"]).item()
        codes = [nearest_code(value / step) if step else 0 for value in values.tolist()]
        expected = [(-1 if code & 8 else 1) * E2M1[code & 7] * step for code in codes]
        assert rounded.tolist() == pytest.approx(expected, rel=1e-6)


def test_modules_that_share_an_input_share_the_global_scales():
    weights = {name: torch.randn(8, 32, generator=GENERATOR) * size for name, size in (("fc", 1.0), ("gate", 4.0))}
    stored = nvfp4.quantize(weights, statistics(torch.randn(50, 32, generator=GENERATOR)), torch.bfloat16)
    for part in ("weights_scaling_factor_2", "activation_scaling_factor"):
        assert torch.equal(stored["fc"][part], stored["gate"][part])


def test_zero_blocks_and_dead_inputs_are_survived():
    weight = torch.randn(4, 32, generator=GENERATOR)
    weight[:, :16] = 0
    for some_weight in (weight, torch.zeros(4, 32)):
        stored = nvfp4.quantize({"m": some_weight}, statistics(torch.zeros(5, 32)), torch.bfloat16)["m"]
        assert torch.equal(nvfp4.dequantize(stored)[:, :16], torch.zeros(4, 16))
        assert nvfp4.kernel_input(torch.zeros(1, 32), stored).tolist() == torch.zeros(1, 32).tolist()
