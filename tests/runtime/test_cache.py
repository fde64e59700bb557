from __future__ import annotations

import pytest
import torch

from tkit.runtime.cache import SlotCache

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
