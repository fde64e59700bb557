"""The precision of an engine: one format for all quantized layers, and the modules that differ. Knows names; no model.

A pattern is fnmatch's and names modules as TensorRT-LLM (`transformer.layers.3.mlp.proj`) or Hugging Face
(`model.layers.3.mlp.down_proj`) call them. It may begin at any dot, and stands for everything inside what it names, so
`layers.0`, `layers.0.*` and `transformer.layers.0.*` are the same. The first pattern that matches decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from tkit.errors import InputError, did_you_mean
from tkit.specs.quantization import QUANT_FORMATS, QuantFormat, quant_format

KV_CACHES: dict[str, str | None] = {"auto": None, "fp8": "FP8", "int8": "INT8"}  # --kv-cache -> kv_cache_quant_algo
UNQUANTIZED = QUANT_FORMATS["none"]


@dataclass(frozen=True, kw_only=True)
class Precision:
    default: QuantFormat
    overrides: tuple[tuple[str, QuantFormat], ...] = ()  # (pattern, format), the first match counts
    modules: Mapping[str, QuantFormat] = field(default_factory=dict)  # by TensorRT-LLM's name, before any pattern
    kv_cache: str = "auto"  # a key of KV_CACHES; auto = the model's own 16 bits

    def __post_init__(self) -> None:
        if self.kv_cache not in KV_CACHES:
            raise InputError(
                f'unknown KV cache "{self.kv_cache}"{did_you_mean(self.kv_cache, KV_CACHES)}',
                hint=f"known: {', '.join(KV_CACHES)}",
            )

    @classmethod
    def of(
        cls, quant: str, overrides: Mapping[str, str] | None = None, exclude: Iterable[str] = (), kv_cache: str = "auto"
    ) -> Precision:
        """From what a recipe says; excluded patterns come before every override. Raises InputError for unknown formats."""
        return cls(
            default=quant_format(quant, where="quant"),
            overrides=(
                *((pattern, UNQUANTIZED) for pattern in exclude),
                *((pattern, quant_format(name, f'"{pattern}"')) for pattern, name in (overrides or {}).items()),
            ),
            kv_cache=kv_cache,
        )

    @property
    def kv_cache_algo(self) -> str | None:
        return KV_CACHES[self.kv_cache]

    def override(self, names: Iterable[str]) -> int | None:
        """The index of the first override that matches any of a module's names."""
        names = list(names)
        for index, (pattern, _) in enumerate(self.overrides):
            if any(matches(pattern, name) for name in names):
                return index
        return None


def matches(pattern: str, name: str) -> bool:
    return any(fnmatchcase(name, form) for form in (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*"))
