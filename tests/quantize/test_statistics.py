from __future__ import annotations

import torch

from tkit.quantize.statistics import SAMPLE_TOKENS, InputStatistics


def collect(x: torch.Tensor, batch: int) -> InputStatistics:
    inputs = InputStatistics(len(x))
    for part in x.split(batch):
        inputs.update(part)
    return inputs


def test_statistics_do_not_depend_on_the_batches():
    x = torch.randn(1700, 8, generator=torch.Generator().manual_seed(6))
    whole, parts = collect(x, 1700), collect(x, 123)
    assert torch.equal(whole.sample, parts.sample)
    assert torch.equal(whole.abs_max, x.abs().amax(0)) and torch.equal(parts.abs_max, whole.abs_max)
    torch.testing.assert_close(parts.abs_mean, x.abs().mean(0))


def test_sample_is_spread_over_all_tokens_and_bounded():
    x = torch.arange(5000, dtype=torch.float32)[:, None]
    sample = collect(x, 100).sample[:, 0]
    assert len(sample) == SAMPLE_TOKENS
    assert sample.diff().unique().tolist() == [5000 // SAMPLE_TOKENS]
