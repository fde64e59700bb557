"""transformers' own `generate` on one batch, and when each of its tokens came: what an engine has to be better than."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Monotonic nanoseconds. Every sequence gets its n-th token at `token_ns[n]`."""

    start_ns: int
    token_ns: tuple[int, ...]
    tokens: list[list[int]]  # what was generated, per sequence


class _Clock(StoppingCriteria):
    """Called after each token of the batch; stops nothing."""

    def __init__(self) -> None:
        self.times: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.monotonic_ns())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def generate_batch(model: Any, prompts: Sequence[Sequence[int]], num_tokens: int) -> Batch:
    """`model` is a PreTrainedModel. Greedy, exactly `num_tokens` each, end of sequence ignored. All prompts have one length."""
    clock = _Clock()
    start = time.monotonic_ns()
    ids = torch.tensor(prompts, device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return Batch(start_ns=start, token_ns=tuple(clock.times), tokens=output[:, ids.shape[1] :].tolist())
