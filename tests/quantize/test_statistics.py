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


def test_gram_blocks_lie_along_the_diagonal_of_the_second_moments():
    x = torch.randn(300, 384, generator=torch.Generator().manual_seed(7))
    moments = (x.double().T @ x.double() / 300).float()
    block, whole = InputStatistics("block"), InputStatistics("input")
    for part in x.split(123):
        block.update(part)
        whole.update(part)
    torch.testing.assert_close(whole.gram, moments[None], rtol=1e-4, atol=1e-5)
    for index, found in enumerate(block.gram):
        columns = slice(index * 128, (index + 1) * 128)
        torch.testing.assert_close(found, moments[columns, columns], rtol=1e-4, atol=1e-5)


def test_folds_hold_their_own_tokens_and_the_maxima_of_the_others():
    x = torch.randn(20, 100, 8, generator=torch.Generator().manual_seed(8))
    inputs = InputStatistics(has_folds=True)
    for batch in x.split(6):
        inputs.update(batch)
    folds = inputs.folds()
    assert len(folds) == 16  # the last four sequences join the first four folds
    for fold, (abs_max, tokens) in enumerate(folds):
        others = torch.cat([x[other] for other in range(20) if other % 16 != fold])
        assert torch.equal(abs_max, others.abs().amax(0))
        assert torch.equal(tokens, x[fold][:64])


def test_long_sequences_are_sampled_evenly_and_one_alone_is_its_own_fold():
    x = torch.randn(1, 640, 8, generator=torch.Generator().manual_seed(8))
    inputs = InputStatistics(has_folds=True)
    inputs.update(x)
    [(abs_max, tokens)] = inputs.folds()
    assert torch.equal(abs_max, x[0].abs().amax(0))
    assert torch.equal(tokens, x[0, ::10])


def test_without_means_the_maximum_is_the_same():
    x = torch.randn(3, 5, 256, dtype=torch.bfloat16)
    alone, whole = InputStatistics(has_means=False), InputStatistics()
    for sequence in x:
        alone.update(sequence)
    whole.update(x)
    assert torch.equal(alone.abs_max, x.abs().amax(dim=(0, 1)).float())
    assert torch.equal(alone.abs_max, whole.abs_max)
