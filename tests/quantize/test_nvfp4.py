from __future__ import annotations

import pytest
import slow
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


def nearest(values: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    codes = [nearest_code(value) for value in (values / step).tolist()]
    return torch.tensor([(-1 if code & 8 else 1) * E2M1[code & 7] for code in codes], dtype=torch.double) * step


def test_stored_tensors_equal_a_slow_recomputation():
    weight = torch.randn(6, 256, generator=GENERATOR)
    weight[2, 5] = 9.0
    x = torch.randn(300, 40, generator=GENERATOR) @ torch.randn(40, 256, generator=GENERATOR)  # channels that correlate
    x[:, ::37] *= 30
    stored = nvfp4.quantize({"m": weight}, statistics(x), torch.bfloat16)["m"]
    global_scale = weight.abs().max() / (6 * 448)
    assert stored["weights_scaling_factor_2"].tolist() == [global_scale.item()]
    assert stored["activation_scaling_factor"].tolist() == [(x.abs().max() / (6 * 448)).item()]
    scales, chosen = torch.zeros(6, 16, dtype=torch.double), set()
    for row in range(6):
        for block in range(16):
            columns = slice(block * 16, (block + 1) * 16)
            values = weight[row, columns]
            candidates = {
                clip: (clip * values.abs().max() / 6 / global_scale).clamp(max=448).to(torch.float8_e4m3fn).double()
                for clip in (1.0, 1.5, 1.25, 0.9, 0.8)
            }
            scales[row, block], _ = slow.best_scale(
                values.double(), x[:, columns].double().square().mean(dim=0), candidates.values(),
                lambda values, scale: nearest(values, scale * global_scale),
            )  # fmt: skip
            chosen |= {clip for clip, scale in candidates.items() if scale == scales[row, block]}
    assert torch.equal(stored["weights_scaling_factor"].double(), scales) and len(chosen) > 2
    steps = scales.float() * global_scale  # as the quantizer has them, since a tie falls either way

    def grid(values: torch.Tensor, column: int) -> torch.Tensor:
        return torch.stack(
            [nearest(v[None], s.double())[0] for v, s in zip(values, steps[:, column // 16], strict=True)]
        )

    targets = slow.settled(weight, x, grid, 128)
    for row in range(6):
        codes = [nearest_code(float(targets[row, j] / steps[row, j // 16])) for j in range(256)]
        packed = stored["weight"][row].tolist()
        assert [nibble for byte in packed for nibble in (byte & 15, byte >> 4)] == codes


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
