from __future__ import annotations

import slow
import torch

from tkit.quantize import awq, int4, w4a8
from tkit.quantize.statistics import InputStatistics

GENERATOR = torch.Generator().manual_seed(12)


def outlier_inputs() -> tuple[torch.Tensor, InputStatistics]:
    x = torch.randn(300, 256, generator=GENERATOR)
    x[:, ::37] *= 30
    inputs = InputStatistics("block")
    inputs.update(x)
    return x, inputs


def e4m3(values: torch.Tensor) -> torch.Tensor:
    assert values.abs().max() <= 448
    return values.to(torch.float8_e4m3fn).float()


def test_the_loaders_arithmetic_gives_the_weights_that_were_chosen():
    """alpha * (fp8(x p / a) @ fp8(q s / b)), as the loader and the kernel compute it from what is stored."""
    x, inputs = outlier_inputs()
    stored = w4a8.quantize({"m": torch.randn(16, 256, generator=GENERATOR)}, inputs, torch.bfloat16)["m"]
    a, b = stored["activation_scaling_factor"], stored["weights_scaling_factor_2"]
    scale = stored["weights_scaling_factor"].to(torch.bfloat16)
    scale /= b  # in place, so in bfloat16
    factor = stored["prequant_scaling_factor"].clone()
    factor /= a
    weight = e4m3(int4.unpack(stored["weight"]).float() * scale.half().float().repeat_interleave(128, dim=1))
    activations = e4m3((x * factor.float()).clamp(-448, 448))
    expected = a * b * (activations @ weight.T)
    found = w4a8.kernel_input(x, stored) @ w4a8.dequantize(stored).T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_stored_tensors_equal_a_slow_recomputation():
    x, inputs = outlier_inputs()
    weights = {name: torch.randn(4, 256, generator=GENERATOR) * size for name, size in (("fc", 1.0), ("gate", 3.0))}
    stored = w4a8.quantize(weights, inputs, torch.bfloat16)
    factor, _ = slow.awq_factor(weights.values(), x, 128, torch.bfloat16)
    scaled = {name: weight / factor for name, weight in weights.items()}
    x = x.double() * factor
    b = power_of_two(max(weight.abs().max() for weight in scaled.values()) * 8 / 7 / 448)

    def rounded(values, scale):
        """Codes as the kernel reads them: times t in float16's precision, and that in e4m3."""
        return e4m3(slow.int4(values, scale) * (scale / b).half().double()).double() * b

    chosen = set()
    for name, weight in scaled.items():
        scales = torch.zeros(4, 2, dtype=torch.double)
        for row in range(4):
            for group in range(2):
                columns = slice(group * 128, (group + 1) * 128)
                largest = weight[row, columns].abs().max()
                candidates = {clip: (clip / 100 * largest / 7).bfloat16().double() for clip in range(100, 65, -5)}
                scales[row, group], _ = slow.best_scale(
                    weight[row, columns], x[:, columns].square().mean(dim=0), candidates.values(), rounded
                )
                chosen |= {clip for clip, scale in candidates.items() if scale == scales[row, group]}
        targets = slow.settled(weight, x, lambda values, column, s=scales: rounded(values, s[:, column // 128]), 128)
        codes = slow.int4(targets, scales.repeat_interleave(128, dim=1)).to(torch.int8)
        parts = stored[name]
        assert torch.equal(parts["prequant_scaling_factor"].double(), factor)
        assert parts["weights_scaling_factor_2"].tolist() == [b]
        assert parts["activation_scaling_factor"].tolist() == [power_of_two(x.abs().max() / 448)]
        assert torch.equal(parts["weights_scaling_factor"].double(), scales)
        assert torch.equal(int4.unpack(parts["weight"]), codes)
    assert len(chosen) > 2


def power_of_two(least):
    """The smallest that is not below `least`."""
    power = 2.0**-60
    while power < least:
        power *= 2
    return power


def test_rounding_twice_costs_little_beside_int4():
    x, inputs = outlier_inputs()
    weight = torch.randn(64, 256, generator=GENERATOR)
    four = awq.dequantize(awq.quantize({"m": weight}, inputs, torch.bfloat16)["m"])
    stored = w4a8.quantize({"m": weight}, inputs, torch.bfloat16)["m"]
    eight = w4a8.dequantize(stored) * stored["prequant_scaling_factor"].float()
    errors = [(x @ (found - weight).T).square().sum() for found in (four, eight)]
    assert errors[1] < 1.3 * errors[0]


def test_zero_weights_and_dead_inputs_are_survived():
    inputs = InputStatistics("block")
    inputs.update(torch.zeros(4, 128))
    stored = w4a8.quantize({"m": torch.zeros(4, 128)}, inputs, torch.float16)["m"]
    assert w4a8.dequantize(stored).tolist() == torch.zeros(4, 128).tolist()
    assert w4a8.kernel_input(torch.ones(1, 128), stored).isfinite().all()
