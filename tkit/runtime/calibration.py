"""Calibration, one decoder layer at a time: the layer's weights come, the calibration tokens pass through it, statistics
of every linear layer's input are taken, its weights are quantized, it goes.

Each layer sees the activations of the original weights, not of the layers quantized so far. The layers are transformers'
own modules; how the model calls them (masks, rotary tables, per-layer kinds) is recorded from a run of the empty model.
Memory: one layer, the embedding, and the activations (samples x length x hidden), whatever the depth; activations of more
than SPILL_BYTES lie in a file.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.initialization import no_init_weights

from tkit.architectures.config import hf_config
from tkit.architectures.table import ARCHITECTURES
from tkit.errors import InputError
from tkit.quantize import kv_cache
from tkit.quantize.kv_cache import KvStatistics
from tkit.quantize.statistics import InputStatistics
from tkit.quantize.table import QUANTIZERS, Quantizer, input_statistics
from tkit.runtime.bits import to_raw, to_torch
from tkit.runtime.data_free import quantize_rows
from tkit.runtime.device import gpu_memory_for
from tkit.runtime.experts import experts_by_name, run_experts
from tkit.runtime.kv_cache import CACHE_ARGUMENTS, CacheStandIn, Change
from tkit.specs.model import ModelSpec
from tkit.specs.moves import Move
from tkit.units import format_bytes

Raw = tuple[np.ndarray, str]

EXPERT_TOKENS = 128  # an expert that saw fewer is quantized by the inputs of all experts of its layer
SPILL_BYTES = 1 << 30  # activations up to this size stay in memory: 16 times those of the default text in an 8 B model
BATCH_TOKENS = 4096  # bounds the activations inside a layer; larger batches are not faster on a CPU

_gpu_memory = gpu_memory_for(
    "a decoder layer with its calibration tokens",
    hint="use --device cpu, or a GPU with more free memory; a --calib-len above 4096 could be smaller",
)


class CalibratedQuantizer:
    """The `LayerQuantizer` of every format that looks at activations. `tokens` is (samples, length) int64."""

    def __init__(
        self,
        spec: ModelSpec,
        tokens: torch.Tensor,
        device: str = "cpu",
        num_threads: int = 1,
        dtype: torch.dtype | None = None,
        spill_directory: Path | None = None,
    ):
        self.num_threads = num_threads  # of what needs no calibration
        self.dtype = dtype or compute_dtype(spec, device)
        self.spec = spec
        self.tokens = tokens
        self.device = device
        self.spill_directory = spill_directory
        self.hidden = torch.zeros(0)  # (samples, length, hidden), the input of the next layer; never on the device
        self._layer_prefix = ARCHITECTURES[spec.architecture].layer_prefix
        self._layers = torch.nn.ModuleList()
        self._calls: list[dict[str, Any]] = []
        self._num_experts = self._num_starved = 0

    @_gpu_memory
    def begin(self, sources: Mapping[str, Raw]) -> None:
        model = _empty_model(self.spec, self.device)
        inside = len(model.base_model_prefix) + 1  # names within the decoder
        weights = {name[inside:]: to_torch(*raw) for name, raw in sources.items()}
        ids = _hold_embeddings(model, weights, self.tokens, self.device, self.dtype)
        layers_name = self._layer_prefix[inside:].partition(".")[0]
        self._layers = cast(torch.nn.ModuleList, getattr(model, layers_name))
        self.hidden = _activations((*self.tokens.shape, self.spec.hidden_size), self.dtype, self.spill_directory)
        with torch.inference_mode():
            self._calls = _record_layer_calls(model, layers_name, ids, self.hidden)

    @_gpu_memory
    def layer(self, index: int, sources: Mapping[str, Raw], moves: Sequence[Move]) -> dict[str, dict[str, Raw]]:
        prefix = self._layer_prefix.format(layer=index)
        weights = {name.removeprefix(prefix): to_torch(*raw) for name, raw in sources.items()}
        calibrated = [move for move in moves if move.format is not None and move.needs_calibration]
        seen_kv = KvStatistics() if any(move.kv_cache is not None for move in moves) else None
        statistics = self._run(index, weights, calibrated, prefix, seen_kv)
        quantized = {
            move.module: quantize_rows(move, sources, self.num_threads) for move in moves if not move.needs_calibration
        }
        for move in moves:
            if move.kv_cache is not None and seen_kv is not None:
                found = kv_cache.scales(move.kv_cache, seen_kv)
                quantized[move.module] = {part: to_raw(values) for part, values in found.items()}
        dtype = getattr(torch, self.spec.dtype)
        for input_name in dict.fromkeys(move.input for move in calibrated):
            group = [move for move in calibrated if move.input == input_name]
            sources_of = [(move, [weights[name.removeprefix(prefix)] for name in move.sources]) for move in group]
            assert group[0].format is not None
            quantizer = QUANTIZERS[group[0].format.name]
            options = {"group_size": group[0].format.group_size} if quantizer.has_group_size else {}
            if group[0].num_experts:
                stored_by_module = {
                    move.module: self._experts(quantizer, move, sources, statistics[input_name], dtype, options)
                    for move, sources in sources_of
                }
            else:
                assert quantizer.quantize is not None, f"{group[0].format.name} needs no calibration"
                stacked = {move.module: _stacked(sources, move).to(self.device) for move, sources in sources_of}
                stored_by_module = quantizer.quantize(stacked, statistics[input_name].of_all, dtype, **options)
            for module, stored in stored_by_module.items():
                quantized[module] = {part: to_raw(values) for part, values in stored.items()}
        return quantized

    def notes(self) -> list[str]:
        """What a reader of the card could not guess."""
        if not self._num_starved:
            return []
        return [
            f"{self._num_starved} of {self._num_experts} expert layers saw fewer than {EXPERT_TOKENS} calibration tokens"
            " and were quantized by the inputs of all experts beside them"
        ]

    def _experts(
        self,
        quantizer: Quantizer,
        move: Move,
        sources: Sequence[torch.Tensor],
        seen: Seen,
        dtype: torch.dtype,
        options: Mapping[str, Any],
    ) -> dict[str, torch.Tensor]:
        assert quantizer.quantize_experts is not None
        per_expert = len(sources) // move.num_experts
        starts = range(0, len(sources), per_expert)
        weights = [torch.cat(list(sources[start : start + per_expert])).to(self.device) for start in starts]
        each = [seen.experts.get(expert, seen.of_all) for expert in range(move.num_experts)]
        each = [inputs if inputs.num_tokens >= EXPERT_TOKENS else seen.of_all for inputs in each]
        self._num_experts += len(each)
        self._num_starved += sum(inputs is seen.of_all for inputs in each)
        return quantizer.quantize_experts(weights, seen.of_all, each, dtype, **options)

    @_gpu_memory
    def skip(self, index: int, sources: Mapping[str, Raw]) -> None:
        prefix = self._layer_prefix.format(layer=index)
        weights = {name.removeprefix(prefix): to_torch(*raw) for name, raw in sources.items()}
        self._run(index, weights, (), prefix, None)

    @torch.inference_mode()
    def _run(
        self,
        index: int,
        weights: Mapping[str, torch.Tensor],
        moves: Sequence[Move],
        prefix: str,
        seen_kv: KvStatistics | None,
    ) -> dict[str | None, Seen]:
        """Passes the activations through layer `index`; returns the statistics of each input."""
        layer, call = self._layers[index], dict(self._calls[index])
        dense = {name: weight for name, weight in weights.items() if ".experts." not in name}
        _load(layer, {name: weight.to(self.device, self.dtype) for name, weight in dense.items()})
        if seen_kv is not None:
            call[_cache_argument(layer)] = CacheStandIn(_watching(seen_kv))
        statistics: dict[str | None, Seen] = {}
        hooks = []
        for move in moves:
            if move.input in statistics:  # modules with the same input see the same activations
                continue
            assert move.format is not None
            seen = statistics[move.input] = Seen(move.format.name, of_experts=bool(move.num_experts))
            if not move.num_experts:
                linear = layer.get_submodule(move.sources[0].removeprefix(prefix).removesuffix(".weight"))
                hooks.append(
                    linear.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.of_all.update(arguments[0]))
                )
        if len(dense) < len(weights):
            self._watch_experts(layer, weights, statistics.get("mlp"), statistics.get("mlp.proj"))
        batch = max(BATCH_TOKENS // self.tokens.shape[1], 1)
        for start in range(0, len(self.hidden), batch):
            output = layer(self.hidden[start : start + batch].to(self.device), **call)
            self.hidden[start : start + batch] = output[0] if isinstance(output, tuple) else output
        for hook in hooks:
            hook.remove()
        layer.to("meta")
        return statistics

    def _watch_experts(
        self, layer: torch.nn.Module, weights: Mapping[str, torch.Tensor], fc: Seen | None, proj: Seen | None
    ) -> None:
        """Has the experts of `layer` run one by one, from the sources themselves: stacked they would take twice the room."""
        named = experts_by_name(weights)
        experts: Any = layer.get_submodule("mlp.experts")

        def gate_up(expert: int) -> torch.Tensor:
            return torch.cat([named[expert, "gate"], named[expert, "up"]]).to(self.device, self.dtype)

        def down(expert: int) -> torch.Tensor:
            return named[expert, "down"].to(self.device, self.dtype)

        def watched(seen: Seen | None) -> Callable[[int, torch.Tensor], torch.Tensor]:
            def watch(expert: int, x: torch.Tensor) -> torch.Tensor:
                if seen is not None:
                    seen.update_expert(expert, x)
                return x

            return watch

        experts.forward = functools.partial(
            run_experts, gate_up=gate_up, down=down, activation=experts.act_fn,
            fc_input=watched(fc), proj_input=watched(proj),
        )  # fmt: skip


class Seen:
    """The statistics of one input: of all tokens, and, where experts share them, of each expert's own."""

    def __init__(self, format_name: str, of_experts: bool) -> None:
        self._format_name = format_name
        self.of_all = input_statistics(format_name, of_experts)
        self.experts: dict[int, InputStatistics] = {}

    def update_expert(self, expert: int, x: torch.Tensor) -> None:
        self.of_all.update(x)
        self.experts.setdefault(expert, input_statistics(self._format_name, True)).update(x)


def _load(layer: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Puts all but the experts into a decoder layer; transformers would have those stacked."""
    # the block has had one name for all families since transformers 5
    inside = {name.replace("block_sparse_moe.", "mlp."): weight for name, weight in weights.items()}
    missing, unexpected = layer.load_state_dict(inside, assign=True, strict=False)
    lost = [name for name in missing if ".experts." not in name]
    assert not lost and not unexpected, f"missing {lost}, unexpected {unexpected}"


def _watching(seen: KvStatistics) -> Change:
    def watch(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.update(keys, values)
        return keys, values

    return watch


def _cache_argument(layer: torch.nn.Module) -> str:
    return next(name for name in CACHE_ARGUMENTS if name in inspect.signature(layer.forward).parameters)


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


class _NoMemory(TorchFunctionMode):
    """`torch.empty`, from which modules make their parameters, takes no memory; tables that they compute are real."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.empty:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def _empty_model(spec: ModelSpec, device: str) -> PreTrainedModel:
    """The decoder without weights; only its buffers are real: rotary tables, Gemma's scale."""
    arguments = hf_config(spec)
    config = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    config.dtype = torch.float32
    with _NoMemory(), no_init_weights():
        model: PreTrainedModel = AutoModel.from_config(config).eval()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model


def _hold_embeddings(
    model: PreTrainedModel,
    weights: Mapping[str, torch.Tensor],
    tokens: torch.Tensor,
    device: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Gives the model its embeddings; of the vocabulary only the rows of `tokens`. Returns the ids of `tokens` in those."""
    vocabulary = cast(torch.nn.Embedding, model.get_input_embeddings())
    used, ids = tokens.unique(return_inverse=True)
    for name, weight in weights.items():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        held = weight[used] if module is vocabulary else weight
        setattr(module, attribute, torch.nn.Parameter(held.to(device, dtype), requires_grad=False))
    vocabulary.padding_idx = None  # an id of the whole vocabulary
    return ids.to(device)


def _activations(shape: tuple[int, ...], dtype: torch.dtype, directory: Path | None) -> torch.Tensor:
    """Room for activations: in memory, or past SPILL_BYTES in a file of `directory` that goes when the process does."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if directory is None or num_bytes <= SPILL_BYTES:
        return torch.empty(shape, dtype=dtype)
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".activations-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # writing to a mapped file of a full disk would kill us
        except OSError as error:
            raise InputError(
                f"{directory}: the calibration activations take {format_bytes(num_bytes)}: {error.strerror}",
                hint="lower --calib-samples or --calib-len, or build elsewhere with --out",
            ) from error
        return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).reshape(shape)


class _Recorded(Exception):
    """The last layer was called; what the model does behind it is of no interest."""


class _Recorder(torch.nn.Module):
    """Stands where a decoder layer will be; keeps how it was called and passes its input on."""

    def __init__(self, layer: torch.nn.Module, is_last: bool) -> None:
        super().__init__()
        self.signature = inspect.signature(layer.forward)
        self.is_last = is_last
        self.hidden = torch.zeros(0)
        self.call: dict[str, Any] = {}

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        call = dict(self.signature.bind(*args, **kwargs).arguments)
        hidden = call.pop("hidden_states")
        self.hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        self.call = {**call, **call.pop("kwargs", {})}
        if self.is_last:
            raise _Recorded
        return (self.hidden,)  # some models take the first of what a layer returns; the others pass it on as it is


def _record_layer_calls(
    model: PreTrainedModel, layers_name: str, ids: torch.Tensor, hidden: torch.Tensor
) -> list[dict[str, Any]]:
    """The arguments of each layer; fills `hidden` with the first layer's input for every sample.

    One sample decides the arguments: tables and masks of one row broadcast over the batch.
    """
    layers = list(cast(torch.nn.ModuleList, getattr(model, layers_name)))
    recorders = [_Recorder(layer, layer is layers[-1]) for layer in layers]
    setattr(model, layers_name, torch.nn.ModuleList(recorders))
    try:
        for index, sample in enumerate(ids.split(1)):
            with contextlib.suppress(_Recorded):
                model(input_ids=sample, use_cache=False)
            hidden[index] = recorders[0].hidden[0]
        return [recorder.call for recorder in recorders]
    finally:
        setattr(model, layers_name, torch.nn.ModuleList(layers))
