"""Two models on the same tokens: perplexity, KL divergence and top-1 agreement. Knows models and tokens; no files.

Per predicted token t with context c: KL = sum_v p(v|c) (log p(v|c) - log q(v|c)), p the reference, q the candidate;
perplexity = exp(mean of -log p(t|c)); top-1 agreement = share of positions where both rank the same token first.
Per decoder layer, both get the input that the reference's layer has: signal-to-noise = 10 log10(sum h^2 / sum (h - h')^2) of
what they make of it, so that a layer's figure holds its own error and not that of the layers before.
Memory: logits of one window for both models, on the device that both are on.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel

from tkit.runtime.device import gpu_memory_for
from tkit.runtime.kv_cache import CACHE_ARGUMENTS, CacheStandIn


@dataclass(frozen=True, kw_only=True)
class Comparison:
    ppl: float  # of the candidate
    ppl_source: float
    kl: float  # nats per token
    kl_max: float  # the worst token
    top1: float
    tokens: int


@gpu_memory_for("an engine beside its source", hint="use --device cpu, or a GPU with more free memory")
@torch.inference_mode()
def compare_models(
    source: PreTrainedModel, candidate: PreTrainedModel, windows: torch.Tensor, done: Callable[[int], None]
) -> Comparison:
    """Over `windows` (windows, length) int64; every window predicts its tokens 1..length-1. `done` counts windows.

    Tokens that only one of the two has are the padding of its vocabulary: no text has them, and they do not count.
    """
    vocab_size = min(model.config.vocab_size for model in (source, candidate))
    nll = nll_source = kl = kl_max = same = 0.0
    for index, window in enumerate(windows.split(1)):
        window = window.to(source.device)
        log_p, log_q = (
            model(window).logits[0, :-1, :vocab_size].float().log_softmax(-1) for model in (source, candidate)
        )  # (length - 1, vocab)
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


@torch.inference_mode()
def layer_snr_db(
    source: PreTrainedModel, candidate: PreTrainedModel, layers: Sequence[str], windows: torch.Tensor
) -> tuple[float | None, ...]:
    """The signal-to-noise ratio of each of the decoder `layers`, in dB; None where they agree bit by bit."""
    sums = torch.zeros(len(layers), 2, dtype=torch.float64)  # of the signal's squares, of the noise's
    hooks = []
    for index, name in enumerate(layers):
        layer = candidate.get_submodule(name)
        hook = functools.partial(_measure, layer, inspect.signature(layer.forward), sums[index])
        hooks.append(source.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
    try:
        for window in windows.split(1):
            source(window.to(source.device), use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return tuple(10 * math.log10(signal / noise) if noise else None for signal, noise in sums.tolist())


def _measure(
    layer: torch.nn.Module,
    signature: inspect.Signature,
    sums: torch.Tensor,
    _: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    call = signature.bind(*args, **kwargs)
    for name in CACHE_ARGUMENTS:
        if name in signature.parameters:  # rounded keys and values are read from a cache, so there must be one
            call.arguments[name] = CacheStandIn(lambda keys, values: (keys, values))
    expected, found = (h[0] if isinstance(h, tuple) else h for h in (output, layer(*call.args, **call.kwargs)))
    sums += torch.stack([x.double().square().sum() for x in (expected, expected - found)]).cpu()


@torch.inference_mode()
def continued(model: PreTrainedModel, prompt: torch.Tensor, num_tokens: int) -> list[int]:
    """The likeliest token, `num_tokens` times, behind `prompt` (tokens,)."""
    greedy = GenerationConfig(do_sample=False, max_new_tokens=num_tokens, pad_token_id=0, use_cache=True)
    ids = prompt[None].to(model.device)
    output = cast(Any, model).generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens
