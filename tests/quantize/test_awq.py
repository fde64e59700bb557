from __future__ import annotations

import torch

from tkit.quantize import awq, int4
from tkit.quantize.statistics import InputStatistics

GENERATOR = torch.Generator().manual_seed(4)


def outlier_inputs(tokens=300, channels=256):
    """Activations with a few loud channels, as language models have them."""
    x = torch.randn(tokens, channels, generator=GENERATOR)
    x[:, ::37] *= 30
    inputs = InputStatistics()
    inputs.update(x)
    return x, inputs


def test_modules_that_share_an_input_share_the_factor():
    _, inputs = outlier_inputs()
    weights = {name: torch.randn(64, 256, generator=GENERATOR) for name in ("fc", "gate")}
    stored = awq.quantize(weights, inputs, torch.bfloat16)
    assert torch.equal(stored["fc"]["prequant_scaling_factor"], stored["gate"]["prequant_scaling_factor"])
    assert stored["fc"]["prequant_scaling_factor"].dtype == torch.bfloat16


def test_stored_tensors_are_those_of_the_factor_and_nothing_else():
    _, inputs = outlier_inputs()
    weight = torch.randn(64, 256, generator=GENERATOR)
    stored = awq.quantize({"m": weight}, inputs, torch.bfloat16)["m"]
    factor = stored["prequant_scaling_factor"].float()
    codes, scale = int4.quantize(weight / factor, 128, torch.bfloat16, inputs.square_mean * factor.square())
    assert torch.equal(stored["weight"], int4.pack(codes))
    assert torch.equal(stored["weights_scaling_factor"], scale)


def test_output_error_is_below_round_to_nearest_and_the_best_of_the_grid():
    x, inputs = outlier_inputs()
    weight = torch.randn(64, 256, generator=GENERATOR)
    found = awq.dequantize(awq.quantize({"m": weight}, inputs, torch.bfloat16)["m"])
    error = (x @ (found - weight).T).square().sum()
    errors = []
    for exponent in awq.EXPONENTS:  # the slow, obvious search over the whole input
        factor = x.abs().mean(0).pow(exponent)
        factor = (1 / (factor / (factor.max() * factor.min()).sqrt())).to(torch.bfloat16).float()
        codes, scale = int4.quantize(weight / factor, 128, torch.bfloat16)
        errors.append((x @ (int4.dequantize(codes, scale) * factor - weight).T).square().sum())
    assert error < 0.6 * errors[0]  # exponent 0 is round to nearest
    assert error < min(errors)  # clipping comes on top


def test_dead_channels_and_dead_inputs_are_survived():
    weight = torch.randn(8, 128, generator=GENERATOR)
    x = torch.randn(20, 128, generator=GENERATOR)
    x[:, 7] = 0
    for values in (x, torch.zeros(20, 128)):
        inputs = InputStatistics()
        inputs.update(values)
        assert awq.dequantize(awq.quantize({"m": weight}, inputs, torch.float16)["m"]).isfinite().all()
