"""A mixture of experts, one expert after the other, with a place to look at or change what enters each of its layers.

transformers computes all experts at once from stacked weights; here every expert sees its own tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch.nn.functional import linear

Weight = Callable[[int], torch.Tensor]  # of one expert
Change = Callable[[int, torch.Tensor], torch.Tensor]  # of the tokens (tokens, in) of one expert


# the last part of an expert layer's Hugging Face name -> what it is
_PARTS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
T = TypeVar("T")


def experts_by_name(values: Mapping[str, T]) -> dict[tuple[int, str], T]:
    """{(expert, gate | up | down): value} of those under the name of an expert's layer."""
    found = {}
    for name, value in values.items():
        _, is_expert, rest = name.removesuffix(".weight").partition(".experts.")
        if is_expert:
            expert, _, part = rest.partition(".")
            found[int(expert), _PARTS[part]] = value
    return found


def run_experts(
    hidden: torch.Tensor,
    chosen: torch.Tensor,
    shares: torch.Tensor,
    *,
    gate_up: Weight,
    down: Weight,
    activation: Callable[[torch.Tensor], torch.Tensor],
    fc_input: Change,
    proj_input: Change,
) -> torch.Tensor:
    """`hidden` (tokens, in), the experts `chosen` for each token (tokens, k) and their `shares` (tokens, k) -> (tokens, in)."""
    output = torch.zeros_like(hidden)
    for expert in chosen.unique().tolist():
        tokens, places = torch.where(chosen == expert)
        gate, up = linear(fc_input(expert, hidden[tokens]), gate_up(expert)).chunk(2, dim=-1)
        result = linear(proj_input(expert, activation(gate) * up), down(expert))
        output.index_add_(0, tokens, (result * shares[tokens, places, None]).to(output.dtype))
    return output
