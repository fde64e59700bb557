"""A written checkpoint -> a transformers model that computes what its kernels would.

Reads `checkpoint/`, or `hf/` where an engine has only that, and nothing else: the model's shape comes from its config.json,
the weights are merged from the rank files and dequantized, and what enters a layer is rounded where its kernel rounds it.
Memory: the whole model in `dtype`.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tkit.architectures.config import checkpoint_dtype, hf_config, parallel_from_trtllm, spec_from_hf, spec_from_trtllm
from tkit.architectures.formats import precision_from_trtllm
from tkit.architectures.moves import fused_modules, has_fused_gate, plan_moves
from tkit.architectures.source_formats import Forms, carried_moves, check_transposed, source_format
from tkit.architectures.table import ARCHITECTURES
from tkit.architectures.unified_hf import UNREAD_NAMES, hf_layer_format
from tkit.checkpoints.convert import check_sources
from tkit.checkpoints.merge import merge
from tkit.checkpoints.reader import TensorFiles, open_ranks, open_source, read_config
from tkit.errors import InputError
from tkit.files import read_json
from tkit.quantize import fp8, int8
from tkit.quantize.kv_cache import rounded
from tkit.quantize.table import QUANTIZERS, dequantize_experts
from tkit.runtime.bits import to_torch
from tkit.runtime.carried import by_layer, unpacked, zero_biases
from tkit.runtime.device import gpu_memory_for, pick_device
from tkit.runtime.experts import experts_by_name, run_experts
from tkit.runtime.kv_cache import Change, change_cached
from tkit.specs.model import ModelSpec
from tkit.specs.moves import Move
from tkit.specs.parallel import Parallel
from tkit.specs.precision import Precision
from tkit.specs.quantization import QuantFormat

transformers.utils.logging.disable_progress_bar()  # a bar per loaded model says nothing that tkit's own progress does not


Weights = dict[str, torch.Tensor]  # by Hugging Face name, dequantized
Hook = Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor]]
KernelInputs = dict[str, Hook]  # by Hugging Face module, where the kernel rounds what enters it
KvCache = dict[int, Change]  # by layer, where keys and values are stored in 8 bits
# the weights' and the inputs' scale by layer, where FP8 layers are fused when they are loaded
CommonScales = dict[str, tuple[torch.Tensor, torch.Tensor]]


_gpu_memory = gpu_memory_for("the model", hint="use --device cpu, or a GPU with more free memory")


@_gpu_memory
def load_model(engine_dir: Path, device: str = "auto") -> tuple[PreTrainedModel, ModelSpec]:
    """The model in eval mode; float32 on the CPU (faster there than 16 bits, and batching does not change greedy text),
    the checkpoint's own dtype on CUDA. Takes the directory of a bare checkpoint as well."""
    device = pick_device(device)
    if (engine_dir / "rank0.safetensors").exists():
        spec, weights, kernel_inputs, kv_cache = _read_trtllm(engine_dir, device)
    elif (engine_dir / "config.json").exists():
        config = read_config(engine_dir)
        if not config.get("quantization_config"):
            return load_source(engine_dir, device), spec_from_hf(config, str(engine_dir / "config.json"))
        spec, weights, kernel_inputs, kv_cache = _read_hugging_face(engine_dir, device, is_served=True)
    elif (engine_dir / "checkpoint").is_dir():
        spec, weights, kernel_inputs, kv_cache = _read_trtllm(engine_dir / "checkpoint", device)
    else:
        spec, weights, kernel_inputs, kv_cache = _read_hugging_face(engine_dir / "hf", device, is_served=True)
    return _model(spec, weights, kernel_inputs, kv_cache, device), spec


@_gpu_memory
def load_source(directory: Path, device: str = "auto") -> PreTrainedModel:
    """A Hugging Face model as it was published, in the dtype that `load_model` gives its engine. One that is quantized
    computes what its own kernels would, without the packages that made it; each layer with its own scales, while
    `load_model` takes one for those that are served as one layer."""
    device = pick_device(device)
    config = read_config(directory)
    if config.get("quantization_config"):
        return _model(*_read_hugging_face(directory, device, is_served=False), device)
    own = checkpoint_dtype(config.get("dtype") or config.get("torch_dtype") or "float32")
    with _transformers_errors(f"{directory}"):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory, dtype=_dtype(own, device), local_files_only=True, trust_remote_code=False
        )
    return model.eval().to(device)


@contextlib.contextmanager
def _transformers_errors(what: str) -> Iterator[None]:
    """transformers checks a config field by field, and files as it opens them, with errors of many libraries."""
    try:
        yield
    except Exception as error:
        reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2]) or type(error).__name__
        raise InputError(f"{what}: transformers refuses it: {reason}") from error


def _model(
    spec: ModelSpec, weights: Weights, kernel_inputs: KernelInputs, kv_cache: KvCache, device: str
) -> PreTrainedModel:
    if spec.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    model = model_from_weights(spec, weights, _dtype(spec.dtype, device))
    torch.nn.Module.to(model, device)
    for name, kernel_input in kernel_inputs.items():
        if ".experts." not in name:
            model.get_submodule(name).register_forward_pre_hook(kernel_input)
    for index in range(spec.num_layers):
        prefix = ARCHITECTURES[spec.architecture].layer_prefix.format(layer=index)
        if of_experts := experts_by_name({n: hook for n, hook in kernel_inputs.items() if n.startswith(prefix)}):
            _round_expert_inputs(model.get_submodule(f"{prefix}mlp.experts"), of_experts)
    for index, change in kv_cache.items():
        prefix = ARCHITECTURES[spec.architecture].layer_prefix
        change_cached(model.get_submodule(prefix.format(layer=index).removesuffix(".")), change)
    if kv_cache:
        model.config.use_cache = True  # without one, a plain call would attend to what was never rounded
    return model


def _dtype(own: str, device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else getattr(torch, own)


def _read_trtllm(directory: Path, device: str) -> tuple[ModelSpec, Weights, KernelInputs, KvCache]:
    config = read_json(directory / "config.json")
    spec, parallel = spec_from_trtllm(config), parallel_from_trtllm(config)
    layer_config = directory / "quant_cfg.json"
    quant_cfg = read_json(layer_config) if layer_config.exists() else None
    weights: Weights = {}
    kernel_inputs: KernelInputs = {}
    kv_cache: KvCache = {}
    with open_ranks(directory, parallel.world_size) as files:
        precision = precision_from_trtllm(config, quant_cfg, spec, parallel, files.entries.keys())
        moves = plan_moves(spec, precision, parallel)
        merged = merge(files, moves)
        common = _gate_scales(files, moves, spec)
        for move, parts in merged:
            stored = {part: to_torch(raw, code) for part, (raw, code) in parts.items()}
            if move.module in common:
                stored = fp8.under_scales(stored, *common[move.module])
            if move.kv_cache is not None and move.layer is not None:
                scale = stored["kv_cache_scaling_factor"].to(device)
                kv_cache[move.layer] = _cached(move.kv_cache, scale, scale)
                continue
            if move.format is not None and move.format.group_size is not None:  # the loader casts the scales of groups
                scale = stored["weights_scaling_factor"].to(getattr(torch, spec.dtype))
                stored["weights_scaling_factor"] = scale.float()
            weights.update(_hugging_face_weights(move, stored, _dtype(spec.dtype, device)))
            hook = None if move.format is None else _kernel_input(move.format, stored, device)
            if hook is not None:
                kernel_inputs.update(dict.fromkeys((name.removesuffix(".weight") for name in move.sources), hook))
    return spec, weights, kernel_inputs, kv_cache


def _gate_scales(files: TensorFiles, moves: Sequence[Move], spec: ModelSpec) -> CommonScales:
    """Those that trtllm-build gives fc and gate when it fuses them in FP8."""
    common: CommonScales = {}
    for fused in fused_modules([move for move in moves if move.input is not None], has_fused_gate(spec)):
        if len(fused) < 2 or any(move.format is None or move.format.name != "fp8" for move in fused):
            continue
        outputs = [output for move in fused for output in move.outputs]
        weights, inputs = (
            _largest(files, [f"{output.rank}/{output.name}" for output in outputs if output.part == part])
            for part in ("weights_scaling_factor", "activation_scaling_factor")
        )
        common.update((move.module, (weights, inputs)) for move in fused)
    return common


def _served_scales(files: TensorFiles, moves: Sequence[Move]) -> CommonScales:
    """Those that the PyTorch backend and vLLM give FP8 layers when they fuse them: q, k and v, gate and up. The weights of
    each expert have one, the inputs of all experts too."""
    common: CommonScales = {}
    for fused in fused_modules([move for move in moves if move.input is not None], is_gate_fused=True):
        layers = [name.removesuffix(".weight") for move in fused for name in move.sources]
        of_inputs, of_weights = ([f"{layer}.{part}" for layer in layers] for part in ("input_scale", "weight_scale"))
        entries = [files.entries.get(name) for name in (*of_inputs, *of_weights)]
        if any(entry is None or math.prod(entry.shape) != 1 for entry in entries):
            continue  # in 16 bits, or in another format
        inputs = _largest(files, of_inputs)
        per_expert = len(layers) // max(fused[0].num_experts, 1)
        for start in range(0, len(layers), per_expert):
            expert = slice(start, start + per_expert)
            common.update(dict.fromkeys(layers[expert], (_largest(files, of_weights[expert]), inputs)))
    return common


def _largest(files: TensorFiles, names: Sequence[str]) -> torch.Tensor:
    """(1,) float32 of scales that are one number each."""
    scales = [to_torch(files.read(name), files.entries[name].dtype).float().reshape(1) for name in names]
    return torch.cat(scales).amax(dim=0, keepdim=True)


def _round_expert_inputs(experts: Any, hooks: Mapping[tuple[int, str], Hook]) -> None:
    """From now on the experts run one by one, and what enters each is rounded as its kernel rounds it."""

    def rounding(part: str) -> Callable[[int, torch.Tensor], torch.Tensor]:
        return lambda expert, x: hooks[expert, part](experts, (x,))[0]

    experts.forward = functools.partial(
        run_experts,
        gate_up=lambda expert: experts.gate_up_proj[expert],
        down=lambda expert: experts.down_proj[expert],
        activation=experts.act_fn,
        fc_input=rounding("gate"),
        proj_input=rounding("down"),
    )


def _cached(dtype: str, k_scale: torch.Tensor, v_scale: torch.Tensor) -> Change:
    """What attention reads of keys and values that were stored in `dtype`."""
    return lambda keys, values: (rounded(keys, k_scale, dtype), rounded(values, v_scale, dtype))


class _Layer(NamedTuple):
    """A weight of a Hugging Face checkpoint as it is stored: `parts` under TensorRT-LLM's names, or one that is plain."""

    name: str
    format: QuantFormat | None
    parts: Mapping[str, torch.Tensor]
    is_transposed: bool = False


def _read_hugging_face(
    directory: Path, device: str, is_served: bool
) -> tuple[ModelSpec, Weights, KernelInputs, KvCache]:
    """A Hugging Face checkpoint, whoever wrote it; each layer with its own scales, or, where it `is_served`, with those that
    its readers give it. Raises InputError naming what is missing."""
    config, path = read_config(directory), str(directory / "config.json")
    spec = spec_from_hf(config, path)
    dtype = _dtype(spec.dtype, device)
    weights: Weights = {}
    kernel_inputs: KernelInputs = {}
    plain = plan_moves(spec, Precision.of("none"), Parallel())
    with open_source(directory) as files:
        common = _served_scales(files, plain) if is_served else {}
        quantization = config.get("quantization_config") or {}
        is_unified = isinstance(quantization, Mapping) and quantization.get("quant_method") == "modelopt"
        layers = _unified_layers(files, spec, quantization) if is_unified else _source_layers(files, spec, config, path)
        for name, format, parts, is_transposed in layers:
            if format is None:
                weights[name] = parts["weight"].to(dtype)
                continue
            if format.name == "fp8" and name.removesuffix(".weight") in common:
                parts = fp8.under_scales(parts, *common[name.removesuffix(".weight")])
            weight = QUANTIZERS[format.name].dequantize(parts).to(dtype)
            weights[name] = weight.T.contiguous() if is_transposed else weight
            hook = _kernel_input(format, parts, device)
            if hook is not None:
                kernel_inputs[name.removesuffix(".weight")] = hook
        kv_cache = _kv_cache(files, spec, device)
    planned = (name for move in plain for name in move.sources)
    if missing := sorted({f"{name} is missing" for name in planned if name not in weights}):
        raise InputError(f"{directory}: the weights do not match config.json", problems=missing)
    return spec, weights, kernel_inputs, kv_cache


def _unified_layers(files: TensorFiles, spec: ModelSpec, quantization: Mapping[str, Any]) -> Iterator[_Layer]:
    """The unified form, tkit's and ModelOpt's. A weight with a scale beside it is quantized as `quantization` says."""
    check_transposed(plan_moves(spec, Precision.of("none"), Parallel()), _forms(files), "ModelOpt")
    for name, entry in files.entries.items():
        module, _, part = name.rpartition(".")
        if f"{module}.weight_scale" not in files.entries or part == "bias":
            if part not in ("k_scale", "v_scale"):
                yield _Layer(name, None, {"weight": to_torch(files.read(name), entry.dtype)})
        elif part == "weight":
            format = hf_layer_format(quantization, module)
            yield _Layer(name, format, _unified_parts(files, module, format))


def _unified_parts(files: TensorFiles, module: str, format: QuantFormat) -> dict[str, torch.Tensor]:
    """The stored tensors of one projection under TensorRT-LLM's names."""
    stored = {}
    for tensor in format.tensors:
        name = f"{module}.{tensor.hf_name or UNREAD_NAMES[tensor.name]}"
        if name in files.entries:
            is_signed = tensor.dtype == "I8"  # the same bytes, under whatever name this format gives them
            stored[tensor.name] = to_torch(files.read(name), "I8" if is_signed else files.entries[name].dtype)
        elif tensor.name == "prequant_scaling_factor":  # folded into the norm in front
            stored[tensor.name] = torch.ones(stored["weight"].shape[1])
    return stored


def _source_layers(files: TensorFiles, spec: ModelSpec, config: Mapping[str, Any], path: str) -> Iterator[_Layer]:
    """What other quantizers write, or nobody quantized."""
    format = source_format(config, files.entries.keys(), path)
    moves = plan_moves(spec, Precision.of("none", kv_cache=format.kv_cache if format else "auto"), Parallel())
    if format is not None:
        moves = carried_moves(moves, format, _forms(files))
    known = (*(format.ignored if format else ()), *zero_biases(files, moves))
    check_sources(files, moves, (*ARCHITECTURES[spec.architecture].ignored, *known))
    for move in moves:
        if move.kv_cache is not None:
            continue
        sources = {name: (files.read(name), files.entries[name].dtype) for name in move.sources}
        if not move.source_dtypes:
            yield from (_Layer(name, None, {"weight": to_torch(*raw)}) for name, raw in sources.items())
            continue
        assert format is not None
        for layer, tensors in by_layer(move, sources).items():
            parts = {part: to_torch(*raw) for part, raw in unpacked(format, tensors, "F32").items()}
            yield _Layer(f"{layer}.weight", format.target, parts, move.transform == "transpose")


def _forms(files: TensorFiles) -> Forms:
    return {name: (entry.dtype, entry.shape) for name, entry in files.entries.items()}


def _kv_cache(files: TensorFiles, spec: ModelSpec, device: str) -> KvCache:
    """By the scales that lie beside the projections; only FP8 has such."""
    before = ARCHITECTURES[spec.architecture].layer_prefix.partition("{layer}")[0]
    scales: dict[int, dict[str, torch.Tensor]] = {}
    for name, entry in files.entries.items():
        part = name.rpartition(".")[2]
        if part in ("k_scale", "v_scale"):
            layer = int(name.removeprefix(before).partition(".")[0])
            scales.setdefault(layer, {})[part] = to_torch(files.read(name), entry.dtype).float().reshape(1).to(device)
    return {layer: _cached("fp8", pair["k_scale"], pair["v_scale"]) for layer, pair in scales.items()}


def _kernel_input(quant: QuantFormat, stored: Mapping[str, torch.Tensor], device: str) -> Hook | None:
    """The hook that makes of a layer's input what its kernel multiplies by, or None where that is the input itself."""
    kernel_input = QUANTIZERS[quant.name].kernel_input
    if kernel_input is None:
        return None
    names = [tensor.name for tensor in quant.tensors if tensor.out_axis is None and tensor.name in stored]
    small = {name: stored[name].to(device) for name in names}
    return lambda module, arguments: (kernel_input(arguments[0], small),)


def model_from_weights(spec: ModelSpec, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """transformers' own class for `spec`, holding `weights` under their Hugging Face names."""
    arguments = hf_config(spec)
    with _transformers_errors(f"{spec.architecture} as its config.json has it"):
        config = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    model_class = getattr(transformers, spec.architecture)
    model: PreTrainedModel = model_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    return model.eval()


def _hugging_face_weights(move: Move, stored: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    if "bias" in stored:
        whole = stored["bias"]
    elif move.format is not None:
        if move.num_experts:
            whole = dequantize_experts(move.format, stored, move.num_experts)
        else:
            whole = QUANTIZERS[move.format.name].dequantize(stored)
    elif move.build_format is not None:
        whole = int8.rounded(stored["weight"])  # row by row, so experts need no care
    else:
        whole = stored["weight"]
    if move.transform == "add_one":
        whole = whole.float() - 1
    parts = [part.T if move.transform == "transpose" else part for part in whole.split(list(move.source_rows))]
    return dict(zip(move.sources, (part.to(dtype).contiguous() for part in parts), strict=True))
