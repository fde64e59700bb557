from __future__ import annotations

import pytest
import torch

from tkit.quantize import compensation
from tkit.quantize.compensation import compensated

GENERATOR = torch.Generator().manual_seed(9)


def rounded(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (values / scale).round() * scale


def correlated_inputs(tokens: int = 400, channels: int = 64) -> torch.Tensor:
    return torch.randn(tokens, channels // 4, generator=GENERATOR) @ torch.randn(
        channels // 4, channels, generator=GENERATOR
    )


def gram_blocks(x: torch.Tensor, num_blocks: int) -> torch.Tensor:
    blocks = x.reshape(len(x), num_blocks, -1).transpose(0, 1)
    return blocks.mT @ blocks / len(x)


def output_error(x: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> float:
    columns = scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    return (x @ (rounded(targets, columns) - weight).T).square().sum().item()


def test_the_farther_errors_reach_the_smaller_the_output_error():
    x, weight = correlated_inputs(), torch.randn(10, 64, generator=GENERATOR)
    scale = torch.full((10, 4), 0.5)
    errors = [output_error(x, weight, weight, scale)]
    errors += [
        output_error(x, compensated(weight, scale, gram_blocks(x, n), rounded), weight, scale) for n in (4, 2, 1)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]


def test_blocks_do_not_touch_each_other():
    x, weight = correlated_inputs(), torch.randn(10, 64, generator=GENERATOR)
    scale, gram = torch.rand(10, 2, generator=GENERATOR) + 0.1, gram_blocks(x, 2)
    halves = [
        compensated(weight[:, half * 32 :][:, :32], scale[:, half, None], gram[half : half + 1], rounded)
        for half in (0, 1)
    ]
    torch.testing.assert_close(compensated(weight, scale, gram, rounded), torch.cat(halves, dim=1))


@pytest.mark.parametrize("num_groups", [1, 2, 16])
def test_rows_are_settled_alone_with_the_scale_of_their_group(monkeypatch, num_groups):
    x, weight = correlated_inputs(), torch.randn(10, 64, generator=GENERATOR)
    scale = torch.rand(10, num_groups, generator=GENERATOR) + 0.1
    whole = compensated(weight, scale, gram_blocks(x, 1), rounded)
    monkeypatch.setattr(compensation, "MAX_ROWS", 3)
    torch.testing.assert_close(compensated(weight, scale, gram_blocks(x, 1), rounded), whole)


def test_inputs_without_correlation_leave_nothing_to_compensate():
    weight = torch.randn(4, 32, generator=GENERATOR)
    for gram in (torch.eye(32)[None], torch.zeros(1, 32, 32)):
        assert torch.equal(compensated(weight, torch.ones(4, 1), gram, rounded), weight)


def test_a_dead_channel_neither_gives_nor_takes():
    x, weight = correlated_inputs(), torch.randn(4, 64, generator=GENERATOR)
    x[:, 11] = 0
    alive = [channel for channel in range(64) if channel != 11]
    targets = compensated(weight, torch.ones(4, 1), gram_blocks(x, 1), rounded)
    assert torch.equal(targets[:, 11], weight[:, 11])
    weight[:, 11] += 5
    assert torch.equal(compensated(weight, torch.ones(4, 1), gram_blocks(x, 1), rounded)[:, alive], targets[:, alive])


def test_a_matrix_that_float32_finds_indefinite_is_damped_until_it_is_not():
    direction = torch.randn(64, generator=GENERATOR)
    gram = torch.outer(direction, direction)[None] * 1e6 - 2e4 * torch.eye(64)
    weight = torch.randn(4, 64, generator=GENERATOR)
    assert compensated(weight, torch.ones(4, 1), gram, rounded).isfinite().all()
