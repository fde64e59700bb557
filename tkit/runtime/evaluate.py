"""Two models on the same tokens: perplexity, KL divergence and top-1 agreement. Knows models and tokens; no files.

Per predicted token t with context c: KL = sum_v p(v|c) (log p(v|c) - log q(v|c)), p the reference, q the candidate;
perplexity = exp(mean of -log p(t|c)); top-1 agreement = share of positions where both rank the same token first.
Memory: logits of one window for both models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Comparison:
    ppl: float  # of the candidate
    ppl_source: float
    kl: float  # nats per token
    kl_max: float  # the worst token
    top1: float
    tokens: int


@torch.inference_mode()
def compare_models(
    source: PreTrainedModel, candidate: PreTrainedModel, windows: torch.Tensor, done: Callable[[int], None]
) -> Comparison:
    """Over `windows` (windows, length) int64; every window predicts its tokens 1..length-1. `done` counts windows."""
    nll = nll_source = kl = kl_max = same = 0.0
    for index, window in enumerate(windows.split(1)):
        log_q = (
            candidate(window.to(candidate.device)).logits[0, :-1].float().log_softmax(-1).cpu()
        )  # (length - 1, vocab)
        log_p = source(window.to(source.device)).logits[0, :-1].float().log_softmax(-1).cpu()
        targets = window[0, 1:, None]
        nll -= log_q.gather(1, targets).sum(dtype=torch.float64).item()
        nll_source -= log_p.gather(1, targets).sum(dtype=torch.float64).item()
        per_token = (log_p.exp() * (log_p - log_q)).sum(-1)
        kl += per_token.sum(dtype=torch.float64).item()
        kl_max = max(kl_max, per_token.max().item())
        same += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
        done(index + 1)
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    return Comparison(
        ppl=float(torch.tensor(nll / tokens).exp()),
        ppl_source=float(torch.tensor(nll_source / tokens).exp()),
        kl=max(kl / tokens, 0.0),  # rounding can leave -1e-9
        kl_max=max(kl_max, 0.0),
        top1=same / tokens,
        tokens=tokens,
    )
