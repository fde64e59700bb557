"""Watches and rounds what attention puts into its KV cache, whatever cache that is.

The layers of a transformers model hand keys (behind the rotary embedding) and values to the cache they are given, and
attend to what it gives back. A stand-in between the two sees both. The prompt's own keys and values are rounded too before
they are attended to, as kernels that read the cache for every token do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache

CACHE_ARGUMENTS = ("past_key_values", "layer_past")  # its name in a decoder layer, by family
Change = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # of keys and values


class CacheStandIn:
    """Passes keys and values through `change`, and on to `cache` where there is one."""

    def __init__(self, change: Change, cache: Cache | None = None):
        self._change = change
        self._cache = cache

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._change(key_states, value_states)
        if self._cache is None:
            return keys, values
        return self._cache.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def change_cached(layer: torch.nn.Module, change: Change) -> None:
    """From now on `layer`, a decoder layer, caches what `change` makes of its keys and values."""
    signature = inspect.signature(layer.forward)

    def replace_cache(_: torch.nn.Module, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        bound = signature.bind(*args, **kwargs)
        for name in CACHE_ARGUMENTS:
            if bound.arguments.get(name) is not None:
                bound.arguments[name] = CacheStandIn(change, bound.arguments[name])
        return bound.args, bound.kwargs

    layer.register_forward_pre_hook(replace_cache, with_kwargs=True)
