"""The shape of a decoder-only language model, whoever wrote its config file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tkit.errors import InputError

DTYPES = ("bfloat16", "float16", "float32")
MAX_COUNT = 10_000  # of layers, heads and experts: a plan is made one by one of them, and no model is near


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Global (unsharded) sizes. `architecture` is the Hugging Face class name, the key of the architecture table."""

    architecture: str
    dtype: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    max_position_embeddings: int
    hidden_act: str
    norm_epsilon: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    num_experts: int = 0  # 0 = a dense model
    experts_per_token: int = 0
    expert_size: int = 0  # intermediate size of one expert
    shared_expert_size: int = 0
    extras: Mapping[str, Any] = field(default_factory=dict)  # fields only one family has, under their HF names

    def __post_init__(self) -> None:
        problems = []
        for name in ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_size",
                     "vocab_size", "max_position_embeddings"):  # fmt: skip
            if getattr(self, name) < 1:
                problems.append(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("num_layers", "num_heads", "num_experts"):
            if getattr(self, name) > MAX_COUNT:
                problems.append(f"{name} is {getattr(self, name)}, expected at most {MAX_COUNT}")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            problems.append(f"experts_per_token is {self.experts_per_token}, expected 1 to {self.num_experts}")
        if self.norm_epsilon < 0:
            problems.append(f"norm_epsilon is {self.norm_epsilon}, expected at least 0")
        if self.dtype not in DTYPES:
            problems.append(f'dtype is "{self.dtype}", expected one of {", ".join(DTYPES)}')
        if self.num_kv_heads >= 1 and self.num_heads % self.num_kv_heads:
            problems.append(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if problems:
            raise InputError(f"{self.architecture}: sizes contradict each other", problems=problems)
