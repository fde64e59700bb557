from __future__ import annotations

import pytest
import torch

from tkit.quantize import fp8
from tkit.quantize.statistics import InputStatistics

E4M3 = sorted(  # every finite e4m3fn value from its definition: 4 exponent bits (bias 7), 3 mantissa bits, S.1111.111 is NaN
    {
        sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2 ** (exponent - 7))
        for sign in (1, -1)
        for exponent in range(16)
        for mantissa in range(8)
        if (exponent, mantissa) != (15, 7)
    }
)


def nearest_e4m3(value: float) -> float:
    """Slow and obvious: the closest value of the grid; on a tie the one with the even mantissa."""
    distance = min(abs(value - candidate) for candidate in E4M3)
    closest = [candidate for candidate in E4M3 if abs(value - candidate) == distance]
    if len(closest) == 1:
        return closest[0]
    return next(c for c in closest if int(torch.tensor(c).to(torch.float8_e4m3fn).view(torch.uint8)) % 2 == 0)


def statistics(x: torch.Tensor) -> InputStatistics:
    inputs = InputStatistics()
    inputs.update(x)
    return inputs


def test_stored_values_are_the_nearest_of_the_grid():
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
    weight[0, 0] = 9.0
    stored = fp8.quantize({"m": weight}, statistics(torch.ones(4, 24)))["m"]
    scale = weight.abs().max() / 448
    assert stored["weights_scaling_factor"].tolist() == [scale.item()]
    slow = [[nearest_e4m3(value) for value in row] for row in (weight / scale).tolist()]
    assert stored["weight"].float().tolist() == slow


def test_weights_that_the_build_fuses_share_the_scale_of_the_largest():
    """Rounded once under it: a second rounding of the codes under the smaller scale gives other codes."""
    gate, up = torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(3))
    up[0, 0] = 9.0
    stored = fp8.quantize({"fc": gate, "gate": up}, statistics(torch.ones(4, 24)))
    scale = torch.tensor([9.0 / 448])
    for module, weight in (("fc", gate), ("gate", up)):
        assert torch.equal(stored[module]["weights_scaling_factor"], scale)
        slow = [[nearest_e4m3(value) for value in row] for row in (weight / scale).tolist()]
        assert stored[module]["weight"].float().tolist() == slow
    own = gate.abs().max() / 448
    twice = ((gate / own).to(torch.float8_e4m3fn).float() * own / scale).to(torch.float8_e4m3fn)
    assert not torch.equal(twice.float(), stored["fc"]["weight"].float())


def test_activation_scale_is_the_largest_input_over_448():
    x = torch.randn(10, 8)
    x[3, 5] = -7.0
    stored = fp8.quantize({"m": torch.ones(2, 8)}, statistics(x))["m"]
    assert stored["activation_scaling_factor"].tolist() == [torch.tensor(7.0 / 448).item()]


def test_error_stays_within_half_a_step_of_the_grid():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    stored = fp8.quantize({"m": weight}, statistics(torch.ones(4, 64)))["m"]
    error = (fp8.dequantize(stored) - weight).abs()
    scale = stored["weights_scaling_factor"]
    assert (error <= torch.maximum(weight.abs() * 2**-4, scale * 2**-10) * (1 + 1e-6)).all()


def test_all_zero_weights_do_not_divide_by_zero():
    stored = fp8.quantize({"m": torch.zeros(4, 8)}, statistics(torch.zeros(2, 8)))["m"]
    assert fp8.dequantize(stored).tolist() == torch.zeros(4, 8).tolist()
    assert stored["activation_scaling_factor"].item() == 1.0


def test_values_beyond_the_calibrated_range_saturate():
    assert fp8.round_to_fp8(torch.tensor([1e6, -1e6]), torch.tensor([1.0])).float().tolist() == [448.0, -448.0]


def test_tokens_are_scaled_one_by_one():
    x = torch.tensor([[448.0, 1.0], [0.448, 0.001]])
    assert fp8.rounded_per_token(x)[0].tolist() == [448.0, 1.0]
    assert fp8.rounded_per_token(x)[1].tolist() == pytest.approx([0.448, 0.001], rel=1e-3)
