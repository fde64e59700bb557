"""One pass of a transformers model over rows of unequal length: positions, masks, logits. Knows no requests.

Every row has its own positions, so the mask is made here, in four dimensions, and handed to the model as it is. That
works for full and sliding-window attention with transformers' "sdpa" and "eager"; anything else is refused by name.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from tkit.errors import InputError
from tkit.runtime.cache import SlotCache
from tkit.runtime.scheduler import KV_STEP


def forward(
    model: PreTrainedModel,
    cache: SlotCache,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    *,
    first_row: int,
    length: int,
) -> torch.Tensor:
    """Logits (rows, vocab) behind the last of `tokens` (rows, tokens), which stand at `positions` (rows, tokens).

    The rows of the cache from `first_row` on; `length` is that of the longest of them, the new tokens included.
    """
    config = model.config.get_text_config()
    tokens, positions = tokens.to(model.device), positions.to(model.device)
    cache.place(first_row, positions, length)
    output = model(
        input_ids=tokens,
        position_ids=positions,
        attention_mask=attention_mask(config, positions, length, model.dtype),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]


@torch.inference_mode()
def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """What one token takes in the cache, seen by running one; refuses a model that does not run this way."""
    config = model.config.get_text_config()
    layer_windows(config)
    cache = SlotCache(num_layers=config.num_hidden_layers, max_rows=1, budget_tokens=KV_STEP)
    cache.reserve(1, 1)
    token = torch.zeros(1, 1, dtype=torch.long)
    try:
        forward(model, cache, token, token, first_row=0, length=1)
    except Exception as error:
        raise InputError(
            f"{config.model_type}: the reference runtime cannot run this model: {type(error).__name__}: {error}"
        ) from error
    return cache.allocated_bytes // cache.allocated_tokens


def attention_mask(
    config: PreTrainedConfig, positions: torch.Tensor, length: int, dtype: torch.dtype
) -> torch.Tensor | dict[str, torch.Tensor]:
    """What each new token at `positions` (rows, tokens) sees of the `length` positions of its row.

    (rows, 1, tokens, length), True where it sees, for eager attention 0; one mask, or one per kind of layer.
    """
    stored = torch.arange(length, device=positions.device)
    distance = positions[:, None, :, None] - stored  # (rows, 1, tokens, length)
    masks = {}
    for kind, window in layer_windows(config).items():
        sees = distance >= 0
        if window is not None:
            sees &= distance < window
        if config._attn_implementation == "eager":
            sees = torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
        masks[kind] = sees
    return masks if len(masks) > 1 else next(iter(masks.values()))


def max_positions(config: PreTrainedConfig) -> int:
    """How long prompt and answer may be together.

    LongRoPE has other frequencies for every token as soon as a sequence grows beyond its original length; transformers
    decides so for a whole batch and computes the cache anew. Here rows are of unequal length and stay as computed, so
    they end where the first frequencies do.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    limits = [config.max_position_embeddings]
    if rope.get("rope_type") == "longrope":
        limits.append(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)
    return min(limits)


def layer_windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """The kinds of attention in a model -> sliding window in tokens, None where a token sees all before it."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise InputError(
            f"{config.model_type}: layers of type {', '.join(sorted(unknown))} keep a state that the reference runtime "
            "cannot hold",
            hint="the reference runtime runs models with full and sliding-window attention",
        )
    if getattr(config, "alibi", False):
        raise InputError(
            f"{config.model_type}: ALiBi positions need a mask of another kind than the reference runtime makes",
            hint="the reference runtime runs models with rotary and learned positions",
        )
    if config._attn_implementation not in ("sdpa", "eager"):
        raise InputError(
            f'attention implementation "{config._attn_implementation}" takes no mask per row',
            hint='load the model with attn_implementation="sdpa"',
        )
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}
