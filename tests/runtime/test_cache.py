from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, PreTrainedModel, Qwen3Config, Qwen3NextConfig
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from tkit.errors import InputError
from tkit.runtime.cache import SlotCache, attention_mask, kv_bytes_per_token, layer_windows

HEADS, HEAD_SIZE = 2, 4


def write(
    cache: SlotCache, first_row: int, positions: list[list[int]], mark: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes `mark + position` as keys, the negative as values; returns what attention would see."""
    where = torch.tensor(positions)
    length = int(where.max()) + 1
    cache.reserve(first_row + len(positions), length)
    cache.place(first_row, where, length)
    keys = (mark + where)[:, None, :, None].expand(-1, HEADS, -1, HEAD_SIZE).float()
    return cache.update(keys, -keys, 0)


def stored(cache: SlotCache, row: int, length: int) -> list[float]:
    layer = cache.layers[0]
    assert torch.equal(layer.values[row], -layer.keys[row])
    assert (layer.keys[row] == layer.keys[row, :1, :, :1]).all()
    return layer.keys[row, 0, :length, 0].tolist()


def test_rows_are_written_at_their_own_positions_and_seen_up_to_the_longest() -> None:
    cache = SlotCache(num_layers=1, max_rows=4, budget_tokens=4 * 256)
    write(cache, 0, [[0, 1, 2]], 100)
    write(cache, 1, [[0, 1, 2, 3, 4]], 200)
    keys, values = write(cache, 0, [[3], [5]], 300)
    assert keys.shape == values.shape == (2, HEADS, 6, HEAD_SIZE)
    assert stored(cache, 0, 6) == [100, 101, 102, 303, 0, 0]
    assert stored(cache, 1, 6) == [200, 201, 202, 203, 204, 305]


def test_growing_keeps_what_is_stored_and_stays_within_the_budget() -> None:
    cache = SlotCache(num_layers=1, max_rows=8, budget_tokens=6 * 256)
    assert cache.allocated_tokens == 0
    write(cache, 0, [list(range(100))], 1000)
    assert cache.allocated_tokens == 128
    sizes = []
    for row, length in ((1, 100), (2, 129), (3, 256), (4, 256), (5, 200)):
        write(cache, row, [list(range(length))], 1000 * row)
        sizes.append((cache.num_rows, cache.length))
        assert cache.allocated_tokens <= 6 * 256
    assert sizes == [(2, 128), (4, 256), (4, 256), (5, 256), (6, 256)]
    for row, length in ((0, 100), (1, 100), (2, 129), (3, 256), (4, 256), (5, 200)):
        assert stored(cache, row, length) == [1000 * max(row, 1) + position for position in range(length)]
    with pytest.raises(AssertionError, match="7 x 256 tokens exceed 1536"):
        cache.reserve(7, 256)


def test_near_the_budget_a_long_row_gives_way_to_many_short_ones() -> None:
    cache = SlotCache(num_layers=1, max_rows=8, budget_tokens=1024)
    write(cache, 0, [list(range(1000))], 0)
    assert (cache.num_rows, cache.length) == (1, 1024)
    write(cache, 7, [[0]], 0)
    assert (cache.num_rows, cache.length) == (8, 128)
    assert stored(cache, 0, 128) == list(range(128))


def test_an_allocation_that_fails_half_way_leaves_a_cache_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = SlotCache(num_layers=2, max_rows=2, budget_tokens=1024)
    write(cache, 0, [[0, 1]], 5)
    cache.update(torch.ones(1, HEADS, 2, HEAD_SIZE), torch.ones(1, HEADS, 2, HEAD_SIZE), 1)
    with monkeypatch.context() as patch:
        patch.setattr(cache.layers[1], "resize", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            cache.reserve(2, 128)
    assert (cache.num_rows, cache.length) == (1, 128)
    write(cache, 1, [[0]], 7)
    assert [layer.keys.shape[0] for layer in cache.layers] == [2, 2]
    assert stored(cache, 0, 2) == [5, 6]


def test_a_new_layout_that_fails_half_way_promises_only_what_every_layer_has(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = SlotCache(num_layers=1, max_rows=8, budget_tokens=1024)
    write(cache, 0, [list(range(1000))], 0)
    with monkeypatch.context() as patch:
        patch.setattr(cache.layers[0], "resize", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            cache.reserve(8, 128)
    assert (cache.num_rows, cache.length) == (1, 128)


def test_moved_rows_arrive_and_cleared_rows_are_zero() -> None:
    cache = SlotCache(num_layers=1, max_rows=2, budget_tokens=512)
    write(cache, 0, [[0, 1, 2]], float("nan"))
    write(cache, 1, [[0, 1]], 10)
    cache.clear(0)
    cache.move(source=1, target=0, length=2)
    assert stored(cache, 0, 4) == [10, 11, 0, 0]


def test_release_gives_the_memory_back() -> None:
    cache = SlotCache(num_layers=1, max_rows=2, budget_tokens=512)
    write(cache, 0, [[0, 1, 2]], 1)
    cache.release()
    assert cache.allocated_tokens == 0 and cache.layers[0].keys.numel() == 0
    write(cache, 0, [[0]], 2)
    assert stored(cache, 0, 2) == [2, 0]


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
    ours = attention_mask(
        torch.tensor([[6, 7, 8], [9, 10, 11]]), total, layer_windows(config), torch.float32, is_additive
    )
    assert isinstance(ours, torch.Tensor) and ours.shape == (2, 1, new, total)
    hidden = torch.finfo(torch.float32).min if is_additive else False
    assert (ours[0, :, :, past + new :] == hidden).all()
    assert torch.equal(ours[0, :, :, : past + new], expected[0])


def test_one_mask_per_kind_of_layer() -> None:
    kinds = ["full_attention", "sliding_attention"]
    config = Qwen3Config(
        num_hidden_layers=2, layer_types=kinds, use_sliding_window=True, sliding_window=2, attn_implementation="sdpa"
    )  # fmt: skip
    masks = attention_mask(torch.tensor([[3]]), 5, layer_windows(config), torch.float32, False)
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


def test_bytes_per_token_are_what_one_token_takes(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model()
    kept = model(torch.tensor([[1]]), use_cache=True).past_key_values
    measured = sum(tensor.nbytes for layer in kept.layers for tensor in (layer.keys, layer.values))
    assert kv_bytes_per_token(model.config, model.dtype) == measured
