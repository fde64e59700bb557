from __future__ import annotations

import pytest
import slow
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


def slow_tensors(weights, x, each, group, reach):
    """The factor for all of `weights`, and the scales and codes of each, by the inputs in `each`."""
    factor, errors = slow.awq_factor(weights, x, group, torch.bfloat16)
    assert len(set(errors.values())) > 2 and min(errors, key=errors.get) not in (0.0, 1.0)  # there is something to find
    scales, codes = [], []
    for weight, own in zip(weights, each, strict=True):
        own = own.double() * factor
        scale, _ = slow.int4_scales(weight / factor, own.square().mean(dim=0), group, torch.bfloat16)

        def grid(values, column, scale=scale):
            return slow.int4(values, scale[:, column // group]) * scale[:, column // group]

        targets = slow.settled(weight / factor, own, grid, reach)
        scales.append(scale.float())
        codes.append(slow.int4(targets, scale.repeat_interleave(group, dim=1)).to(torch.int8))
    return factor, torch.cat(scales), torch.cat(codes)


@pytest.mark.parametrize(("gram", "group"), [("block", 128), ("block", 64), ("input", 128)])
def test_stored_tensors_equal_a_slow_recomputation(gram, group):
    x, _ = outlier_inputs()
    inputs = InputStatistics(gram)
    inputs.update(x)
    weights = {name: torch.randn(4, 256, generator=GENERATOR) for name in ("fc", "gate")}
    stored = awq.quantize(weights, inputs, torch.bfloat16, group)
    factor, scales, codes = slow_tensors([*weights.values()], x, [x, x], group, 128 if gram == "block" else 256)
    for parts, scale, code in zip(stored.values(), scales.chunk(2), codes.chunk(2), strict=True):
        assert torch.equal(parts["prequant_scaling_factor"].double(), factor)
        assert torch.equal(parts["weights_scaling_factor"], scale)
        assert torch.equal(int4.unpack(parts["weight"]), code)


def test_experts_share_the_factor_and_have_codes_by_their_own_inputs():
    x, pooled = outlier_inputs(600)
    tokens = [x[:200], x[200:450], x[450:]]
    each = [InputStatistics("block") for _ in tokens]
    for inputs, own in zip(each, tokens, strict=True):
        inputs.update(own)
    weights = [torch.randn(4, 256, generator=GENERATOR) for _ in tokens]
    stored = awq.quantize_experts(weights, pooled, each, torch.bfloat16)
    factor, scales, codes = slow_tensors(weights, x, tokens, 128, 128)
    assert torch.equal(stored["prequant_scaling_factor"].double(), factor)
    assert torch.equal(stored["weights_scaling_factor"], scales)
    assert torch.equal(int4.unpack(stored["weight"]), codes)


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
