"""A written checkpoint -> a transformers model that computes what its kernels would.

Reads `checkpoint/`, or `hf/` where an engine has only that, and nothing else: the model's shape comes from its config.json,
the weights are merged from the rank files and dequantized, inputs of FP8 layers are rounded with the stored static scale.
Memory: the whole model in `dtype`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from tkit.architectures.config import hf_config, parallel_from_trtllm, spec_from_hf, spec_from_trtllm
from tkit.architectures.moves import plan_moves
from tkit.checkpoints.merge import merge
from tkit.checkpoints.reader import open_ranks, open_source
from tkit.errors import InputError
from tkit.files import read_json
from tkit.quantize import fp8, int4, int8
from tkit.quantize.table import DEQUANTIZE
from tkit.runtime.bits import to_torch
from tkit.specs.model import ModelSpec
from tkit.specs.moves import Move
from tkit.specs.quantization import QUANT_FORMATS, QuantFormat

transformers.utils.logging.disable_progress_bar()  # a bar per loaded model says nothing that tkit's own progress does not


def pick_device(device: str = "auto") -> str:
    """`auto` is CUDA where torch sees a GPU."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU", hint="use --device cpu, or install torch's CUDA build")
    return device


def load_model(engine_dir: Path, device: str = "auto") -> tuple[PreTrainedModel, ModelSpec]:
    """The model in eval mode; float32 on the CPU (faster there than 16 bits, and batching does not change greedy text),
    the checkpoint's own dtype on CUDA."""
    device = pick_device(device)
    if (engine_dir / "checkpoint").is_dir():
        spec, weights, input_scales = _read_trtllm(engine_dir / "checkpoint", device)
    else:
        spec, weights, input_scales = _read_hf(engine_dir / "hf", device)
    if spec.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    model = model_from_weights(spec, weights, _dtype(spec, device))
    torch.nn.Module.to(model, device)
    for name, scale in input_scales.items():
        model.get_submodule(name).register_forward_pre_hook(_fp8_input(None if scale is None else scale.to(device)))
    return model, spec


Weights = dict[str, torch.Tensor]  # by Hugging Face name, dequantized
InputScales = dict[
    str, torch.Tensor | None
]  # of FP8 layers, by Hugging Face module; None = one per token, when it comes


def _dtype(spec: ModelSpec, device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else getattr(torch, spec.dtype)


def _read_trtllm(directory: Path, device: str) -> tuple[ModelSpec, Weights, InputScales]:
    config = read_json(directory / "config.json")
    spec, quant, parallel = spec_from_trtllm(config), quant_of(config), parallel_from_trtllm(config)
    weights: Weights = {}
    input_scales: InputScales = {}
    with open_ranks(directory, parallel.world_size) as files:
        for move, parts in merge(files, plan_moves(spec, quant, parallel)):
            stored = {part: to_torch(raw, code) for part, (raw, code) in parts.items()}
            weights.update(_hugging_face_weights(move, stored, quant, _dtype(spec, device)))
            if stored["weight" if "weight" in stored else "bias"].dtype == torch.float8_e4m3fn:
                for source in move.sources:
                    input_scales[source.removesuffix(".weight")] = stored.get("activation_scaling_factor")
    return spec, weights, input_scales


def _read_hf(directory: Path, device: str) -> tuple[ModelSpec, Weights, InputScales]:
    """A unified Hugging Face checkpoint. What sits beside a weight under its module's name says how it is stored."""
    config = {key: value for key, value in read_json(directory / "config.json").items() if key != "quantization_config"}
    spec = spec_from_hf(config, str(directory / "config.json"))
    dtype = _dtype(spec, device)
    weights: Weights = {}
    input_scales: InputScales = {}
    with open_source(directory) as files:

        def read(name: str) -> torch.Tensor:
            return to_torch(files.read(name), files.entries[name].dtype)

        for name, entry in files.entries.items():
            module, _, part = name.rpartition(".")
            if part in ("weight_scale", "pre_quant_scale"):
                continue
            if part == "input_scale":
                input_scales[module] = read(name).reshape(1)
            elif entry.dtype == "F8_E4M3":
                scale = read(f"{module}.weight_scale")
                if scale.numel() > 1:
                    weights[name] = fp8.dequantize_rows({"weight": read(name), "per_channel_scale": scale}).to(dtype)
                    input_scales[module] = None
                else:
                    weights[name] = fp8.dequantize({"weight": read(name), "weights_scaling_factor": scale}).to(dtype)
            elif entry.dtype == "U8":
                codes = int4.unpack(read(name).view(torch.int8))
                weight = int4.dequantize(codes, read(f"{module}.weight_scale"))
                if f"{module}.pre_quant_scale" in files.entries:
                    weight = weight * read(f"{module}.pre_quant_scale").float()
                weights[name] = weight.to(dtype)
            else:
                weights[name] = read(name).to(dtype)
    return spec, weights, input_scales


def quant_of(config: dict[str, Any]) -> QuantFormat:
    """The format that config.json names."""
    algo = config["quantization"]["quant_algo"]
    has_prequant_scale = config["quantization"]["pre_quant_scale"]
    return next(
        format
        for format in QUANT_FORMATS.values()
        if format.algo == algo and format.has_prequant_scale == has_prequant_scale
    )


def model_from_weights(spec: ModelSpec, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """transformers' own class for `spec`, holding `weights` under their Hugging Face names."""
    arguments = hf_config(spec)
    config = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    model_class = getattr(transformers, spec.architecture)
    model: PreTrainedModel = model_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    return model.eval()


def _hugging_face_weights(
    move: Move, stored: dict[str, torch.Tensor], quant: QuantFormat, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    if "bias" in stored:
        whole = stored["bias"]
    elif move.format is not None:
        whole = DEQUANTIZE[move.format.name](stored)
    elif quant.name == "int8" and move.input is not None:
        whole = int8.rounded(stored["weight"])
    else:
        whole = stored["weight"]
    if move.transform == "add_one":
        whole = whole.float() - 1
    parts = [part.T if move.transform == "transpose" else part for part in whole.split(list(move.source_rows))]
    return dict(zip(move.sources, (part.to(dtype).contiguous() for part in parts), strict=True))


def _fp8_input(scale: torch.Tensor | None) -> Any:
    def round_input(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        x = arguments[0]
        if scale is None:
            return (fp8.rounded_per_token(x),)
        return ((fp8.round_to_fp8(x.float(), scale).float() * scale).to(x.dtype),)

    return round_input
