from __future__ import annotations

import math

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


def test_scales_are_those_of_the_formula():
    x, inputs = outlier_inputs()
    weights = {name: torch.randn(8, 256, generator=GENERATOR) * size for name, size in (("fc", 1.0), ("gate", 3.0))}
    stored = w4a8.quantize(weights, inputs, torch.bfloat16)
    factor = stored["fc"]["prequant_scaling_factor"].float()
    amax = max((weight / factor).abs().max() for weight in weights.values())
    for module, weight in weights.items():
        parts = stored[module]
        assert torch.equal(parts["prequant_scaling_factor"].float(), factor)
        for part, least in (
            ("weights_scaling_factor_2", (amax * 8 / 7 / 448).item()),
            ("activation_scaling_factor", ((x * factor).abs().max() / 448).item()),
        ):
            assert math.frexp(parts[part].item())[0] == 0.5  # a power of two
            assert least <= parts[part].item() < 2 * least
        ratio = parts["weights_scaling_factor"] * 7 / (weight / factor).reshape(8, 2, 128).abs().amax(-1)
        distance = (ratio[..., None] - torch.tensor(w4a8.CLIPS)).abs().amin(-1)
        assert (distance < 2**-8).all()  # bfloat16's relative step


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
