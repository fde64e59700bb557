"""Keys and values of what runs, one row per request, as a transformers cache. Knows rows and positions; no requests.

Each layer is a pair of tensors (rows, kv_heads, length, head_size). A forward pass writes each row at its own positions
and attends to a view of the leading rows up to the longest of them: nothing is gathered or copied, the mask hides what
lies beyond a row's own length. Memory is allocated as it is needed and never exceeds `budget_tokens` positions, plus
one layer's share while it is laid out anew.

Gathering rows by index before each attention, as a paged cache must, made the decode step 14 to 19 % slower on the CPU
(4 layers of hidden size 256, and 108 M parameters; 16 rows of 128 + 64 tokens).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from tkit.runtime.scheduler import round_up


class SlotCache(Cache):
    def __init__(self, *, num_layers: int, max_rows: int, budget_tokens: int):
        self.max_rows = max_rows
        self.budget_tokens = budget_tokens
        self.num_rows = 0
        self.length = 0
        self._slots = [_SlotLayer(self) for _ in range(num_layers)]
        super().__init__(layers=[*self._slots])

    @property
    def allocated_tokens(self) -> int:
        return self.num_rows * self.length

    @property
    def allocated_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._slots if layer.is_initialized)

    def reserve(self, num_rows: int, length: int) -> None:
        """Makes room for `length` tokens in each of `num_rows` rows; keeps what those hold, and no more is promised.

        Grows by doubling, so that what is copied over time stays below what is stored; near the budget to what is
        asked and no more. The caller counts every row that is in use, and keeps num_rows x round_up(length) within
        the budget.
        """
        if num_rows <= self.num_rows and length <= self.length:
            return
        rows, tokens = self.num_rows, self.length
        if num_rows > rows:
            rows = min(self.max_rows, max(num_rows, 2 * rows))
        if length > tokens:
            tokens = round_up(max(length, 2 * tokens))
        if rows * tokens > self.budget_tokens:
            rows, tokens = num_rows, round_up(length)
        assert rows * tokens <= self.budget_tokens, f"{rows} x {tokens} tokens exceed {self.budget_tokens}"
        target = rows, tokens
        # What every layer is sure to have if an allocation fails half way.
        self.num_rows, self.length = min(rows, self.num_rows), min(tokens, self.length)
        for layer in self._slots:
            layer.resize(*target)
        self.num_rows, self.length = target

    def release(self) -> None:
        """Gives the memory back; every row is empty."""
        self.num_rows = self.length = 0
        for layer in self._slots:
            layer.release()

    def place(self, first_row: int, positions: torch.Tensor, length: int) -> None:
        """Says where the next forward pass writes: `positions` (rows, tokens), for the rows from `first_row` on.

        It attends to the first `length` positions: as many as the longest row has, the new ones included.
        """
        last_row = first_row + positions.shape[0]
        self.rows = torch.arange(first_row, last_row, device=positions.device)[:, None]  # (rows, 1)
        self.positions = positions
        self.view_rows = slice(first_row, last_row)
        self.view_length = length

    def move(self, source: int, target: int, length: int) -> None:
        for layer in self._slots:
            if layer.is_initialized:
                layer.keys[target, :, :length] = layer.keys[source, :, :length]
                layer.values[target, :, :length] = layer.values[source, :, :length]

    def clear(self, row: int) -> None:
        """Zeroes a row. Masked positions weigh 0, and 0 x NaN would still reach the row's next user."""
        for layer in self._slots:
            if layer.is_initialized and row < layer.keys.shape[0]:
                layer.keys[row] = 0
                layer.values[row] = 0


class _SlotLayer(CacheLayerMixin):
    is_sliding = False  # a sliding window is a matter of the mask; every position stays in its place
    supports_early_init = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, cache: SlotCache):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys = _zeros_like(key_states, self.cache.num_rows, self.cache.length)
        self.values = _zeros_like(value_states, self.cache.num_rows, self.cache.length)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores (rows, kv_heads, tokens, head_size); returns all keys and values of those rows up to the longest."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self.cache
        self.keys[cache.rows, :, cache.positions] = key_states.transpose(1, 2)
        self.values[cache.rows, :, cache.positions] = value_states.transpose(1, 2)
        return (
            self.keys[cache.view_rows, :, : cache.view_length],
            self.values[cache.view_rows, :, : cache.view_length],
        )

    def resize(self, num_rows: int, length: int) -> None:
        if self.is_initialized:
            self.keys = _resized(self.keys, num_rows, length)
            self.values = _resized(self.values, num_rows, length)

    def release(self) -> None:
        self.keys = self.values = torch.empty(0)
        self.is_initialized = False

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.view_length, 0

    def get_seq_length(self) -> int:
        return self.cache.view_length

    def get_max_length(self) -> int:
        return -1


def _zeros_like(states: torch.Tensor, num_rows: int, length: int) -> torch.Tensor:
    return states.new_zeros(num_rows, states.shape[1], length, states.shape[3])


def _resized(stored: torch.Tensor, num_rows: int, length: int) -> torch.Tensor:
    resized = _zeros_like(stored, num_rows, length)
    kept_rows, kept_length = min(num_rows, stored.shape[0]), min(length, stored.shape[2])
    resized[:kept_rows, :, :kept_length] = stored[:kept_rows, :, :kept_length]
    return resized
