from __future__ import annotations

import copy

import pytest
import torch
import transformers

from tkit.runtime.evaluate import layer_snr_db

WINDOWS = torch.randint(0, 400, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("config_class", "overrides", "prefix"),
    [
        (transformers.GPT2Config, {}, "transformer.h"),
        (transformers.GPTJConfig, {"rotary_dim": 8, "attn_implementation": "eager"}, "transformer.h"),
        (transformers.FalconConfig, {"new_decoder_architecture": True}, "transformer.h"),
        (transformers.FalconConfig, {"multi_query": False, "parallel_attn": False, "alibi": True}, "transformer.h"),
        (transformers.MixtralConfig, {"num_local_experts": 4}, "model.layers"),
        (
            transformers.Gemma2Config,
            {"head_dim": 16, "sliding_window": 8, "attn_implementation": "eager"},
            "model.layers",
        ),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_layers_of_every_kind_are_measured_by_themselves(make_model, config_class, overrides, prefix):
    source = make_model(config_class, **overrides)
    candidate = copy.deepcopy(source)
    layers = [f"{prefix}.{layer}" for layer in range(3)]
    assert layer_snr_db(source, candidate, layers, WINDOWS) == (None, None, None)
    for parameter in candidate.get_submodule(layers[1]).parameters():
        parameter.data *= 1.01
    first, second, third = layer_snr_db(source, candidate, layers, WINDOWS)
    assert first is None and third is None
    assert second is not None and 10 < second < 60
