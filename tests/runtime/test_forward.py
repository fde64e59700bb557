from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import (
    BloomConfig,
    FalconConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3NextConfig,
)
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from tkit.errors import InputError
from tkit.runtime.forward import attention_mask, kv_bytes_per_token, layer_windows


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("is_additive", [False, True])
def test_a_rows_mask_is_the_one_transformers_makes_for_it_alone(window: int | None, is_additive: bool) -> None:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 8, "sliding_window": window}
    config = MistralConfig(**sizes, attn_implementation="eager" if is_additive else "sdpa")
    past, new, total = 6, 3, 12  # the row has 6 tokens and gets 3; the longest row beside it has 12
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, past, 8), torch.zeros(1, 1, past, 8), 0)
    make = create_causal_mask if window is None else create_sliding_window_causal_mask
    expected = make(
        config=config, inputs_embeds=torch.zeros(1, new, 8), attention_mask=None, past_key_values=cache
    )  # fmt: skip
    ours = attention_mask(config, torch.tensor([[6, 7, 8], [9, 10, 11]]), total, torch.float32)
    assert isinstance(ours, torch.Tensor) and ours.shape == (2, 1, new, total)
    hidden = torch.finfo(torch.float32).min if is_additive else False
    assert (ours[0, :, :, past + new :] == hidden).all()
    assert torch.equal(ours[0, :, :, : past + new], expected[0])


def test_one_mask_per_kind_of_layer() -> None:
    kinds = ["full_attention", "sliding_attention"]
    config = Qwen3Config(
        num_hidden_layers=2, layer_types=kinds, use_sliding_window=True, sliding_window=2, attn_implementation="sdpa"
    )  # fmt: skip
    masks = attention_mask(config, torch.tensor([[3]]), 5, torch.float32)
    assert isinstance(masks, dict)
    assert {kind: mask.flatten().tolist() for kind, mask in masks.items()} == {
        "full_attention": [True, True, True, True, False],
        "sliding_attention": [False, False, True, True, False],
    }


def test_models_it_cannot_hold_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="qwen3_next: layers of type linear_attention keep a state"):
        layer_windows(Qwen3NextConfig(attn_implementation="sdpa"))
    with pytest.raises(InputError, match='"flash_attention_2" takes no mask per row'):
        config = LlamaConfig()
        config._attn_implementation = "flash_attention_2"
        layer_windows(config)


def test_bytes_per_token_are_those_of_keys_and_values(make_model: Callable[..., PreTrainedModel]) -> None:
    assert kv_bytes_per_token(make_model()) == 2 * 3 * 2 * 16 * 4  # both, layers, heads, head size, float32
    one_kv_head = {"multi_query": True, "alibi": False, "new_decoder_architecture": False}
    assert kv_bytes_per_token(make_model(FalconConfig, **one_kv_head)) == 2 * 3 * 1 * 16 * 4


def test_a_model_that_does_not_run_this_way_is_refused_before_any_request(
    make_model: Callable[..., PreTrainedModel],
) -> None:
    with pytest.raises(InputError, match="bloom: the reference runtime cannot run this model: ValueError"):
        kv_bytes_per_token(make_model(BloomConfig, attn_implementation="eager"))
