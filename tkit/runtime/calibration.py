"""Calibration, one decoder layer at a time: the layer's weights come, the calibration tokens pass through it, statistics
of every linear layer's input are taken, its weights are quantized, it goes.

Each layer sees the activations of the original weights, not of the layers quantized so far. The layers are transformers'
own modules; how the model calls them (masks, rotary tables, per-layer kinds) is recorded from a run of the empty model.
Memory: one layer, the embedding, and the activations (samples x length x hidden), whatever the depth.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, PreTrainedModel

from tkit.architectures.config import hf_config
from tkit.errors import InputError
from tkit.files import read_jsonl_texts
from tkit.quantize.statistics import InputStatistics
from tkit.quantize.table import QUANTIZERS
from tkit.runtime.bits import to_raw, to_torch
from tkit.runtime.data_free import quantize_rows
from tkit.specs.model import ModelSpec
from tkit.specs.moves import Move

Raw = tuple[np.ndarray, str]

BATCH_TOKENS = 4096  # bounds the activations inside a layer; larger batches are not faster on a CPU


class CalibratedQuantizer:
    """The `LayerQuantizer` of every format that looks at activations. `tokens` is (samples, length) int64."""

    def __init__(
        self,
        spec: ModelSpec,
        tokens: torch.Tensor,
        device: str = "cpu",
        num_threads: int = 1,
        dtype: torch.dtype | None = None,
    ):
        self.num_threads = num_threads  # of what needs no calibration
        self.dtype = dtype or compute_dtype(spec, device)
        self.spec = spec
        self.tokens = tokens
        self.device = device
        self.hidden = torch.zeros(0)  # (samples, length, hidden), the input of the next layer
        self._layers = torch.nn.ModuleList()
        self._calls: list[dict[str, Any]] = []

    def embedding(self, weight: Raw) -> None:
        table = to_torch(*weight)
        model = _empty_model(self.spec, self.device)
        embeddings = torch.nn.functional.embedding(self.tokens, table).float()
        embeddings *= getattr(
            model.embed_tokens, "scalar_embed_scale", 1.0
        )  # Gemma's embedding scales what it looks up
        with torch.inference_mode():
            self.hidden, self._calls = _record_layer_calls(model, embeddings.to(self.device, self.dtype))
        self._layers = cast(torch.nn.ModuleList, model.layers)

    def layer(self, index: int, sources: Mapping[str, Raw], moves: Sequence[Move]) -> dict[str, dict[str, Raw]]:
        prefix = f"model.layers.{index}."
        weights = {name.removeprefix(prefix): to_torch(*raw) for name, raw in sources.items()}
        calibrated = [move for move in moves if move.format is not None and move.format.needs_calibration]
        statistics = self._run(index, weights, calibrated, prefix)
        quantized = {
            move.module: quantize_rows(move, sources, self.num_threads) for move in moves if move not in calibrated
        }
        for input_name in dict.fromkeys(move.input for move in calibrated):
            group = [move for move in calibrated if move.input == input_name]
            stacked = {
                move.module: _stacked([weights[name.removeprefix(prefix)] for name in move.sources], move)
                for move in group
            }
            assert group[0].format is not None
            dtype = getattr(torch, self.spec.dtype)
            quantize = QUANTIZERS[group[0].format.name].quantize
            assert quantize is not None, f"{group[0].format.name} needs no calibration"
            for module, stored in quantize(stacked, statistics[input_name], dtype).items():
                quantized[module] = {part: to_raw(values) for part, values in stored.items()}
        return quantized

    def skip(self, index: int, sources: Mapping[str, Raw]) -> None:
        prefix = f"model.layers.{index}."
        self._run(index, {name.removeprefix(prefix): to_torch(*raw) for name, raw in sources.items()}, (), prefix)

    @torch.inference_mode()
    def _run(
        self, index: int, weights: Mapping[str, torch.Tensor], moves: Sequence[Move], prefix: str
    ) -> dict[str | None, InputStatistics]:
        """Passes the activations through layer `index`; returns the statistics of each input."""
        layer, call = self._layers[index], self._calls[index]
        layer.load_state_dict({name: w.to(self.device, self.dtype) for name, w in weights.items()}, assign=True)
        statistics, hooks = {}, []
        for move in moves:
            if move.input in statistics:  # modules with the same input see the same activations
                continue
            assert move.format is not None
            linear = layer.get_submodule(move.sources[0].removeprefix(prefix).removesuffix(".weight"))
            inputs = InputStatistics(QUANTIZERS[move.format.name].gram)
            statistics[move.input] = inputs
            hooks.append(
                linear.register_forward_pre_hook(lambda _, arguments, inputs=inputs: inputs.update(arguments[0]))
            )
        batch = max(BATCH_TOKENS // self.tokens.shape[1], 1)
        for start in range(0, len(self.hidden), batch):
            output = layer(self.hidden[start : start + batch], **call)
            self.hidden[start : start + batch] = output[0] if isinstance(output, tuple) else output
        for hook in hooks:
            hook.remove()
        layer.to("meta")
        return statistics


def compute_dtype(spec: ModelSpec, device: str) -> torch.dtype:
    """What the layers compute in: the model's dtype on CUDA, and bfloat16 also on a CPU that multiplies it natively."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if device != "cpu" or (dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()):
        return dtype
    return torch.float32


def _stacked(sources: Sequence[torch.Tensor], move: Move) -> torch.Tensor:
    """The sources as one linear layer (out, in), in their dtype; no copy of a single one."""
    parts = [source.T if move.transform == "transpose" else source for source in sources]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def calibration_tokens(file: Path, tokenizer: Tokenizer, num_samples: int, length: int, seed: int) -> torch.Tensor:
    """(num_samples, length) int64: windows of the text at random places, the same for the same seed.

    `.txt` is one text; each line of `.jsonl` holds one under "text". Raises InputError when the text is too short.
    """
    texts = read_jsonl_texts(file) if file.suffix == ".jsonl" else [file.read_text(encoding="utf-8")]
    ids = [token for text in texts for token in tokenizer.encode(text, add_special_tokens=False).ids]
    if len(ids) < length + num_samples:
        raise InputError(
            f"{file}: {len(ids)} tokens, {num_samples} samples of {length} need at least {length + num_samples}",
            hint="give a longer --calib text, or lower --calib-len",
        )
    starts = sorted(random.Random(seed).sample(range(len(ids) - length + 1), num_samples))
    return torch.tensor([ids[start : start + length] for start in starts], dtype=torch.int64)


def _empty_model(spec: ModelSpec, device: str) -> PreTrainedModel:
    """The decoder without weights, on the meta device; only its rotary tables are real."""
    arguments = hf_config(spec)
    config = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    config.dtype = torch.float32
    with torch.device("meta"):
        model = AutoModel.from_config(config).eval()
    model.rotary_emb = type(model.rotary_emb)(config=config).to(device)
    model.norm = torch.nn.Identity()
    return model


class _Recorder(torch.nn.Module):
    """Stands where a decoder layer will be; keeps how it was called and passes its input on."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.zeros(0)
        self.call: dict[str, Any] = {}

    def forward(self, hidden_states: torch.Tensor, **call: Any) -> torch.Tensor:
        self.hidden, self.call = hidden_states, call
        return hidden_states


def _record_layer_calls(model: PreTrainedModel, embeddings: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """The first layer's input for every sample, and the keyword arguments of each layer.

    One sample decides the arguments: tables and masks of one row broadcast over the batch.
    """
    layers = cast(torch.nn.ModuleList, model.layers)
    recorders = [_Recorder() for _ in layers]
    model.layers = torch.nn.ModuleList(recorders)
    try:
        first = []
        for sample in embeddings.split(1):
            model(inputs_embeds=sample, use_cache=False)
            first.append(recorders[0].hidden)
        return torch.cat(first), [recorder.call for recorder in recorders]
    finally:
        model.layers = layers
