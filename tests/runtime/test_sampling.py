from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tkit.runtime.sampling import Sampler, distribution, inverse_cdf, sample
from tkit.specs.generation import GenerationRequest

VOCAB = 1000


def request(**parameters: Any) -> GenerationRequest:
    return GenerationRequest(prompt="x", max_tokens=1000, **parameters)


def sampler(prompt_ids: list[int] | None = None, end_id: int | None = None, **parameters: Any) -> Sampler:
    return Sampler(request(**parameters), end_id, prompt_ids or [], VOCAB)


def random_logits(rows: int = 1, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def transformers_says(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers(torch.zeros(1, 1, dtype=torch.long), logits).softmax(-1)


CASES = [
    (1.0, 0, 1.0), (0.7, 0, 1.0), (2.5, 0, 1.0), (1.0, 5, 1.0), (1.0, VOCAB, 1.0), (1.0, 5000, 1.0), (1.0, 0, 0.9),
    (1.0, 0, 0.3), (1.0, 0, 0.01), (0.6, 40, 0.95), (1.7, 300, 0.99), (5.0, 0, 0.999), (1.0, 2, 0.5),
]  # fmt: skip


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), CASES)
@pytest.mark.parametrize("spread", [0.3, 3.0])  # flat and peaked: the top-p set beyond and within the first look
def test_the_distribution_is_what_transformers_processors_leave(
    temperature: float, top_k: int, top_p: float, spread: float
) -> None:
    logits = random_logits(3, spread)
    ours = distribution(logits, [request(temperature=temperature, top_k=top_k, top_p=top_p)] * 3)
    ours = ours / ours.sum(-1, keepdim=True)
    theirs = transformers_says(logits, temperature, top_k, top_p)
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_rows_with_different_parameters_do_not_mix() -> None:
    logits = random_logits(len(CASES))
    parameters = [request(temperature=t, top_k=k, top_p=p) for t, k, p in CASES]
    together = distribution(logits, parameters)
    for row, one in enumerate(parameters):
        torch.testing.assert_close(together[row], distribution(logits[row : row + 1], [one])[0])


def test_a_tiny_temperature_is_greedy_not_nan() -> None:
    logits = random_logits()
    assert sample(logits, [sampler(temperature=1e-40)])[0].token == logits.argmax()


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_repetition_penalty_is_transformers_over_prompt_and_output(penalty: float) -> None:
    ours = sampler(prompt_ids=[3, 5, 5], temperature=0, repetition_penalty=penalty)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)
    history = [3, 5, 5]
    for step in range(40):
        logits = random_logits(seed=step) + 8 * torch.isin(torch.arange(VOCAB), torch.tensor(history)) - 10
        expected = theirs(torch.tensor([history]), logits).argmax().item()
        assert sample(logits, [ours])[0].token == expected
        history.append(expected)
    assert len(set(history)) > 3


def test_end_of_sequence_is_impossible_before_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 5
    ours = sampler(end_id=7, temperature=0, min_tokens=3)
    tokens = [sample(logits, [ours])[0].token for _ in range(4)]
    processor = MinNewTokensLengthLogitsProcessor(0, 3, 7)
    expected = [processor(torch.zeros(1, step, dtype=torch.long), logits).argmax().item() for step in range(4)]
    assert tokens == expected == [0, 0, 0, 7]


def test_greedy_rows_take_the_likeliest_token() -> None:
    logits = random_logits(2)
    draws = sample(logits, [sampler(temperature=0), sampler(top_k=1)])
    assert [draw.token for draw in draws] == logits.argmax(-1).tolist()


def test_log_probs_are_of_the_models_own_distribution() -> None:
    logits = random_logits(3)
    asks = {"return_log_probs": True}
    samplers = [
        sampler(temperature=0.1, top_k=5, repetition_penalty=2.0, prompt_ids=list(range(500)), **asks),
        sampler(),
        sampler(temperature=0, **asks),
    ]
    draws = sample(logits, samplers)
    for row in (0, 2):
        assert draws[row].log_prob == pytest.approx(logits[row].log_softmax(-1)[draws[row].token].item(), abs=1e-5)
    assert draws[1].log_prob is None


def test_draws_follow_the_distribution() -> None:
    parameters = request(temperature=0.8, top_k=6)
    logits = random_logits()
    expected = transformers_says(logits, 0.8, 6, 1.0)[0].numpy()
    uniform = np.random.default_rng(0).random(20_000)
    tokens = inverse_cdf(distribution(logits, [parameters]).expand(len(uniform), -1), uniform.tolist())
    share = np.bincount(tokens.numpy(), minlength=VOCAB) / len(uniform)
    assert not share[expected == 0].any()
    assert np.abs(share - expected).max() < 0.015  # four standard errors


def test_the_ends_of_the_interval_draw_tokens_that_have_probability() -> None:
    probabilities = torch.tensor([[0, 0.25, 0, 0.5, 0]] * 3)
    assert inverse_cdf(probabilities, [0.0, 0.3334, 1.0]).tolist() == [1, 3, 3]


def test_a_seed_draws_the_same_tokens_whatever_runs_beside_it() -> None:
    def tokens(num_neighbours: int, seed: int) -> list[int]:
        ours, others = sampler(seed=seed), [sampler(seed=9, top_p=0.5) for _ in range(num_neighbours)]
        beside = random_logits(num_neighbours, seed=99)
        steps = [torch.cat([beside, random_logits(seed=step)]) for step in range(20)]
        return [sample(logits, [*others, ours])[-1].token for logits in steps]

    assert tokens(0, seed=4) == tokens(3, seed=4) == tokens(7, seed=4)
    assert tokens(0, seed=4) != tokens(0, seed=5)


@pytest.mark.parametrize("seed", [0, -1, 2**64 - 1, 2**70])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert sample(random_logits(), [sampler(seed=seed)])[0] is not None


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_row_without_a_distribution_gives_no_token_and_leaves_the_others_alone(poison: float) -> None:
    logits = random_logits(3)
    logits[1, 17] = poison
    draws = sample(logits, [sampler(temperature=0), sampler(temperature=0.5), sampler(temperature=0)])
    assert draws[1] is None
    assert [draws[0].token, draws[2].token] == logits[[0, 2]].argmax(-1).tolist()
