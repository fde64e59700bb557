"""Logits -> the next token of each row. Knows logits and sampling parameters; no model, no text, no cache.

The order and the meaning of the steps are transformers': repetition penalty, minimum length, temperature, top-k, top-p.
The draw is the inverse of the cumulative distribution at u in [0, 1), and u comes from the request's own generator:
what else runs in the batch, and on which device, moves no draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tkit.specs.generation import GenerationRequest

# Likeliest tokens looked at for top-p before the whole vocabulary is sorted: sorting 4096 logits of 16 rows takes 6 ms
# of a CPU core, more than half a decode step of a small model; a real model's top-p set is nearly always smaller.
TOP_P_WIDTH = 256


class Sampler:
    """One request's parameters, its random generator, and the tokens its repetition penalty has seen."""

    def __init__(self, request: GenerationRequest, end_id: int | None, prompt_ids: Sequence[int], num_vocab: int):
        self.request = request
        self.end_id = end_id
        self.num_sampled = 0
        self.random = np.random.default_rng(request.seed % 2**64)
        self.seen: torch.Tensor | None = None  # (vocab,) bool
        if request.repetition_penalty != 1:
            self.seen = torch.zeros(num_vocab, dtype=torch.bool)
            self.seen[list(prompt_ids)] = True

    @property
    def edits_logits(self) -> bool:
        return self.seen is not None or self.forbids_end

    @property
    def forbids_end(self) -> bool:
        return self.end_id is not None and self.num_sampled < self.request.min_tokens

    def edit(self, logits: torch.Tensor) -> None:
        """Applies the repetition penalty and the minimum length to logits (vocab,), in place."""
        if self.seen is not None:
            self.seen = self.seen.to(logits.device)
            penalty = self.request.repetition_penalty
            penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits.copy_(torch.where(self.seen, penalised, logits))
        if self.forbids_end:
            logits[self.end_id] = -torch.inf

    def accept(self, token: int) -> None:
        self.num_sampled += 1
        if self.seen is not None:
            self.seen[token] = True


@dataclass(frozen=True)
class Draw:
    token: int
    log_prob: float | None  # under the model's own distribution, before any of the steps above; None when not asked for


def sample(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[Draw | None]:
    """The next token of each row of logits (rows, vocab); None where the model gave no distribution (NaN, infinity)."""
    logits = logits.float()
    scores = logits
    if any(sampler.edits_logits for sampler in samplers):
        scores = logits.clone()
        for row, sampler in enumerate(samplers):
            if sampler.edits_logits:
                sampler.edit(scores[row])
    is_sound = torch.isfinite(logits.amax(-1)).tolist()
    tokens = scores.argmax(-1)
    drawn = [row for row, sampler in enumerate(samplers) if is_sound[row] and not sampler.request.is_greedy]
    if drawn:
        requests = [samplers[row].request for row in drawn]
        uniform = [samplers[row].random.random() for row in drawn]
        tokens[drawn] = inverse_cdf(distribution(scores[drawn], requests), uniform)
    log_probs: dict[int, float] = {}
    asked = [row for row, sampler in enumerate(samplers) if is_sound[row] and sampler.request.return_log_probs]
    if asked:
        chosen = logits[asked].log_softmax(-1).gather(1, tokens[asked, None])[:, 0]
        log_probs = dict(zip(asked, chosen.tolist(), strict=True))
    draws: list[Draw | None] = []
    for row, (token, sampler) in enumerate(zip(tokens.tolist(), samplers, strict=True)):
        if is_sound[row]:
            sampler.accept(token)
        draws.append(Draw(token, log_probs.get(row)) if is_sound[row] else None)
    return draws


def distribution(scores: torch.Tensor, requests: Sequence[GenerationRequest]) -> torch.Tensor:
    """Probabilities (rows, vocab) after temperature, top-k and top-p; what was cut is 0, rows need not sum to 1."""
    num_vocab = scores.shape[-1]
    temperature = scores.new_tensor([request.temperature for request in requests])[:, None]
    # Relative to the largest, so that a tiny temperature gives 0 and -inf, not inf - inf.
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature
    top_k = [min(request.top_k, num_vocab) or num_vocab for request in requests]
    if limited := [k for k in top_k if k < num_vocab]:
        best = scores.topk(max(limited), dim=-1).values  # (rows, largest k), descending
        last = torch.tensor([min(k, best.shape[1]) - 1 for k in top_k], device=scores.device)[:, None]
        smallest = best.gather(1, last)
        smallest[[row for row, k in enumerate(top_k) if k == num_vocab]] = -torch.inf
        scores = scores.masked_fill(scores < smallest, -torch.inf)
    probabilities = scores.softmax(-1)
    if any(request.top_p < 1 for request in requests):
        top_p = scores.new_tensor([request.top_p for request in requests])[:, None]
        probabilities = probabilities.masked_fill(probabilities < _smallest_in_top_p(probabilities, top_p), 0)
    return probabilities


def _smallest_in_top_p(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """(rows, 1): the least of the likeliest tokens that together reach `top_p` (rows, 1); 0 where it is 1."""
    num_vocab = probabilities.shape[-1]
    for width in (min(TOP_P_WIDTH, num_vocab), num_vocab):
        best = probabilities.topk(width, dim=-1).values  # descending
        likelier = best.cumsum(-1) - best  # the mass before each
        is_kept = likelier < top_p
        is_kept[:, 0] = True
        if not (is_kept[:, -1:] & (top_p < 1)).any():
            break
    smallest = best.gather(1, is_kept.sum(-1, keepdim=True) - 1)
    return torch.where(top_p < 1, smallest, 0)


def inverse_cdf(probabilities: torch.Tensor, uniform: Sequence[float]) -> torch.Tensor:
    """(rows,) the token at which the running sum of `probabilities` (rows, vocab) first exceeds that share of it."""
    cumulative = probabilities.double().cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    share = torch.tensor(uniform, dtype=torch.float64, device=probabilities.device)[:, None] * total
    token = torch.searchsorted(cumulative, share, right=True)
    # A share that rounds up to the total belongs to the last token that has any probability.
    last = torch.searchsorted(cumulative, total)
    return torch.minimum(token, last)[:, 0]
