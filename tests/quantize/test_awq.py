from __future__ import annotations

import pytest
import torch

from tkit.quantize import awq, int4
from tkit.quantize.statistics import InputStatistics

GENERATOR = torch.Generator().manual_seed(4)


def outlier_inputs(tokens=300, channels=256):
    """Activations with a few loud channels, as language models have them."""
    x = torch.randn(tokens, channels, generator=GENERATOR)
    x[:, ::37] *= 30
    inputs = InputStatistics("block")
    inputs.update(x)
    return x, inputs


def test_modules_that_share_an_input_share_the_factor():
    _, inputs = outlier_inputs()
    weights = {name: torch.randn(64, 256, generator=GENERATOR) for name in ("fc", "gate")}
    stored = awq.quantize(weights, inputs, torch.bfloat16)
    assert torch.equal(stored["fc"]["prequant_scaling_factor"], stored["gate"]["prequant_scaling_factor"])
    assert stored["fc"]["prequant_scaling_factor"].dtype == torch.bfloat16


@pytest.mark.parametrize("gram", ["block", "input"])
def test_stored_tensors_equal_a_slow_recomputation(gram):
    """Given the factor and the scales: column after column, each error spread over the columns behind it within reach."""
    x, _ = outlier_inputs()
    inputs = InputStatistics(gram)
    inputs.update(x)
    weight = torch.randn(6, 256, generator=GENERATOR)
    stored = awq.quantize({"m": weight}, inputs, torch.bfloat16)["m"]
    factor = stored["prequant_scaling_factor"].float()
    scale, _ = int4.clipped_scale(weight / factor, 128, torch.bfloat16, inputs.square_mean * factor.square())
    assert torch.equal(stored["weights_scaling_factor"], scale)
    codes = slow_codes_within(128 if gram == "block" else 256, weight / factor, scale, x * factor)
    assert torch.equal(int4.unpack(stored["weight"]), codes)


def test_experts_share_the_factor_and_have_codes_by_their_own_inputs():
    x, pooled = outlier_inputs(600)
    tokens = [x[:200], x[200:450], x[450:]]
    each = [InputStatistics("block") for _ in tokens]
    for inputs, own in zip(each, tokens, strict=True):
        inputs.update(own)
    weights = [torch.randn(4, 256, generator=GENERATOR) for _ in tokens]
    stored = awq.quantize_experts(weights, pooled, each, torch.bfloat16)
    factor = stored["prequant_scaling_factor"].float()
    assert factor.shape == (256,)
    scales, codes = stored["weights_scaling_factor"].chunk(3), int4.unpack(stored["weight"]).chunk(3)
    for weight, scale, found, own in zip(weights, scales, codes, tokens, strict=True):
        assert torch.equal(found, slow_codes_within(128, weight / factor, scale, own * factor))


def slow_codes_within(reach, weight, scale, x):
    ranges = (slice(start, start + reach) for start in range(0, 256, reach))
    return torch.cat([slow_codes(weight[:, r], scale[:, r.start // 128 :], x[:, r]) for r in ranges], dim=1)


def slow_codes(weight, scale, x):
    """Hassibi and Stork's surgeon: the inverse Hessian loses a row and a column with every weight that is fixed."""
    weight, x = weight.double().clone(), x.double()
    hessian = x.T @ x / len(x)
    inverse = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))).inverse()
    codes = torch.zeros(weight.shape, dtype=torch.int8)
    for j in range(weight.shape[1]):
        step = scale[:, j // 128].double()
        codes[:, j] = (weight[:, j] / step).round().clamp(-8, 7)
        error = (weight[:, j] - codes[:, j] * step) / inverse[j, j]
        weight[:, j + 1 :] -= error[:, None] * inverse[j, j + 1 :]
        inverse = inverse - inverse[:, j, None] * inverse[j] / inverse[j, j]
    return codes


def test_output_error_is_below_round_to_nearest_and_the_best_of_the_grid():
    x, inputs = outlier_inputs()
    weight = torch.randn(64, 256, generator=GENERATOR)
    found = awq.dequantize(awq.quantize({"m": weight}, inputs, torch.bfloat16)["m"])
    error = (x @ (found - weight).T).square().sum()
    errors = []
    for exponent in awq.EXPONENTS:  # the slow, obvious search over the whole input
        factor = x.abs().mean(0).pow(exponent)
        factor = (1 / (factor / (factor.max() * factor.min()).sqrt())).to(torch.bfloat16).float()
        scale = ((weight / factor).reshape(64, -1, 128).abs().amax(-1) / 7).to(torch.bfloat16).float()
        codes = int4.nearest_codes(weight / factor, scale)
        errors.append((x @ (int4.dequantize(codes, scale) * factor - weight).T).square().sum())
    assert error < 0.6 * errors[0]  # exponent 0 is round to nearest
    assert error < 0.8 * min(errors)  # clipping and compensation come on top


def test_dead_channels_and_dead_inputs_are_survived():
    weight = torch.randn(8, 128, generator=GENERATOR)
    x = torch.randn(20, 128, generator=GENERATOR)
    x[:, 7] = 0
    for values in (x, torch.zeros(20, 128)):
        inputs = InputStatistics("block")
        inputs.update(values)
        assert awq.dequantize(awq.quantize({"m": weight}, inputs, torch.float16)["m"]).isfinite().all()
