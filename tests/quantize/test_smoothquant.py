from __future__ import annotations

import pytest
import torch

from tkit.quantize import smoothquant
from tkit.quantize.statistics import InputStatistics

GENERATOR = torch.Generator()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test sees the same numbers, whichever ran before."""
    GENERATOR.manual_seed(11)


def loud_inputs(sequences: int = 16, tokens: int = 64, channels: int = 96) -> tuple[torch.Tensor, InputStatistics]:
    """Heavy-tailed activations with a few loud channels: every sequence has larger values than the others somewhere."""
    x = torch.randn(sequences, tokens, channels, generator=GENERATOR)
    x *= x.abs()
    x[..., ::31] *= 20
    inputs = InputStatistics(has_folds=True)
    inputs.update(x)
    return x, inputs


def test_the_factor_is_that_of_a_slow_search():
    """What rounding the weights costs, and what rounding the inputs costs in sequences that did not set their scale."""
    x, inputs = loud_inputs()
    weights = [torch.randn(12, 96, generator=GENERATOR), 3 * torch.randn(8, 96, generator=GENERATOR)]
    stored = smoothquant.quantize({"fc": weights[0], "gate": weights[1]}, inputs, torch.bfloat16)
    x, weight = x.double(), torch.cat(weights).double()
    weight_max, energy = weight.abs().amax(dim=0), weight.square().sum(dim=0)

    def factor(input_max, exponent):
        s = input_max**exponent / weight_max ** (1 - exponent)
        return 1 / (s / (s.max() * s.min()).sqrt())

    def rounded(values, scale):
        return (values / scale).round().clamp(-128, 127) * scale

    errors = {}
    for exponent in (step / 20 for step in range(21)):
        own = factor(x.abs().amax(dim=(0, 1)), exponent).bfloat16().double()
        error = 0.0
        for row in weight:
            lost = rounded(row / own, (row / own).abs().max() / 127) - row / own
            error += (lost.square() * own.square() * x.square().mean(dim=(0, 1))).sum().item()
        for sequence in range(16):
            others = torch.cat((x[:sequence], x[sequence + 1 :])).abs().amax(dim=(0, 1))
            unseen = factor(others, exponent)
            lost = rounded(x[sequence] * unseen, (others * unseen).max() / 127) - x[sequence] * unseen
            error += (lost.square().mean(dim=0) * energy / unseen.square()).sum().item() / 16
        errors[error] = own
    for parts in stored.values():
        assert torch.equal(parts["prequant_scaling_factor"].double(), errors[min(errors)])
    assert list(errors).index(min(errors)) not in (0, 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_tensors_equal_a_slow_recomputation(dtype):
    x, inputs = loud_inputs()
    weight = torch.randn(12, 96, generator=GENERATOR)
    stored = smoothquant.quantize({"m": weight}, inputs, dtype)["m"]
    assert stored["prequant_scaling_factor"].dtype == dtype
    factor = stored["prequant_scaling_factor"].float()
    largest = max(abs(value * factor[channel]) for row in x.reshape(-1, 96) for channel, value in enumerate(row))
    assert stored["activation_scaling_factor"].tolist() == [(largest / 127).item()]
    for row in range(12):
        values = weight[row] / factor
        scale = values.abs().max() / 127
        assert stored["weights_scaling_factor"][row] == scale
        codes = [min(max(round((value / scale).item()), -128), 127) for value in values]  # Python rounds halves to even
        assert stored["weight"][row].tolist() == codes


def test_error_stays_within_half_a_step():
    _, inputs = loud_inputs()
    weight = torch.randn(12, 96, generator=GENERATOR)
    stored = smoothquant.quantize({"m": weight}, inputs, torch.bfloat16)["m"]
    error = (smoothquant.dequantize(stored) - weight / stored["prequant_scaling_factor"].float()).abs()
    assert (error <= stored["weights_scaling_factor"][:, None] * 0.5 * (1 + 1e-5)).all()


def test_inputs_are_scaled_rounded_and_cut_off():
    stored = {"prequant_scaling_factor": torch.tensor([2.0, 0.5]), "activation_scaling_factor": torch.tensor([0.5])}
    x = torch.tensor([[0.3, 0.3], [-100.0, 1000.0], [0.125, 0.5]])  # the last line: halves, to even
    expected = [[0.5, 0.0], [-64.0, 63.5], [0.0, 0.0]]
    assert smoothquant.kernel_input(x, stored).tolist() == expected


def test_modules_that_share_an_input_share_its_factor_and_scale():
    _, inputs = loud_inputs()
    stored = smoothquant.quantize(
        {name: torch.randn(16, 96, generator=GENERATOR) for name in ("fc", "gate")}, inputs, torch.bfloat16
    )
    for part in ("prequant_scaling_factor", "activation_scaling_factor"):
        assert torch.equal(stored["fc"][part], stored["gate"][part])


def test_the_exponent_found_is_the_best_on_tokens_it_has_not_seen():
    x, inputs = loud_inputs()
    weight = torch.randn(64, 96, generator=GENERATOR)
    new, _ = loud_inputs()

    def error(prequant: torch.Tensor) -> float:
        factor = prequant.to(torch.bfloat16).float()
        scaled = weight / factor
        scale = scaled.abs().amax(dim=1, keepdim=True) / 127
        input_scale = (x.reshape(-1, 96).abs().amax(dim=0) * factor).max() / 127
        rounded = (new * factor / input_scale).round().clamp(-128, 127) * input_scale
        return (rounded @ ((scaled / scale).round() * scale).T - new @ weight.T).square().sum().item()

    input_max, weight_max = x.reshape(-1, 96).abs().amax(dim=0), weight.abs().amax(dim=0)
    errors = {
        exponent: error(smoothquant.candidate(input_max, weight_max, exponent)) for exponent in smoothquant.EXPONENTS
    }
    found = error(smoothquant.quantize({"m": weight}, inputs, torch.bfloat16)["m"]["prequant_scaling_factor"])
    assert found < 0.8 * errors[1.0]
    assert found < 1.2 * min(errors.values())


def test_dead_channels_and_dead_inputs_are_survived():
    weight = torch.randn(8, 32, generator=GENERATOR)
    weight[:, 3] = 0
    x = torch.randn(2, 10, 32, generator=GENERATOR)
    x[..., 7] = 0
    for values in (x, torch.zeros(2, 10, 32), x[:1]):
        inputs = InputStatistics(has_folds=True)
        inputs.update(values)
        for some_weight in (weight, torch.zeros(8, 32)):
            stored = smoothquant.quantize({"m": some_weight}, inputs, torch.float16)["m"]
            assert smoothquant.dequantize(stored).isfinite().all()
            assert smoothquant.kernel_input(values, stored).isfinite().all()
