from __future__ import annotations

import torch

from tkit.quantize.statistics import InputStatistics


def collect(x: torch.Tensor, batch: int) -> InputStatistics:
    inputs = InputStatistics()
    for part in x.split(batch):
        inputs.update(part)
    return inputs


def test_statistics_are_those_of_all_tokens_however_they_are_batched():
    x = torch.randn(1700, 8, generator=torch.Generator().manual_seed(6))
    for batch in (1700, 123):
        inputs = collect(x, batch)
        assert torch.equal(inputs.abs_max, x.abs().amax(0))
        torch.testing.assert_close(inputs.abs_mean, x.abs().double().mean(0).float())
        torch.testing.assert_close(inputs.square_mean, x.double().square().mean(0).float())
        assert inputs.num_tokens == 1700
