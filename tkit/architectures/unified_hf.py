"""The unified Hugging Face checkpoint: the source's own names and files, quantized in place. Read by TensorRT-LLM's PyTorch
backend (1.0 and later), vLLM and SGLang.

Works on the moves of the TensorRT-LLM checkpoint: the same quantized parts, cut by source instead of by rank, so both
checkpoints come from one pass and hold the same codes. Where AWQ's factor has a norm in front, it is folded into that norm;
o_proj and down_proj keep it as `pre_quant_scale`, which the loader expects there.

Source of names: NVIDIA ModelOpt 0.47 `export/unified_export_hf.py`, TensorRT-LLM `_torch/modules/linear.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tkit.architectures.formats import MIXED, stored_format
from tkit.architectures.table import ARCHITECTURES
from tkit.errors import InputError
from tkit.specs.model import ModelSpec
from tkit.specs.moves import Move, Output
from tkit.specs.precision import KV_CACHES, UNQUANTIZED
from tkit.specs.quantization import INT8_CODES, QuantFormat, StoredTensor

# what NVIDIA ModelOpt calls the tensors of formats that no reader of this form knows, and tkit does not write
UNREAD_NAMES = {
    "weight": "weight",
    "weights_scaling_factor": "weight_scale",
    "prequant_scaling_factor": "pre_quant_scale",
    "activation_scaling_factor": "input_scale",
}
MAX_SHARD_BYTES = 5_000_000_000  # the hub's convention
ITEM_BYTES = {"model": 2, "F32": 4, "F8_E4M3": 1, "I8": 1, "U8": 1}


def plan_hf_outputs(moves: Sequence[Move], spec: ModelSpec) -> list[Move]:
    """`moves` with the outputs of the Hugging Face checkpoint instead. Every source is written once.

    Raises InputError where a format has no unified form for this architecture.
    """
    _check(moves, spec)
    feeds = {module.name: module.feeds for module in ARCHITECTURES[spec.architecture].layer if module.feeds}
    folded = {
        (move.layer, move.input) for move in moves if move.format is not None and move.format.has_prequant_scale
        and move.input in feeds.values()
    }  # fmt: skip
    planned, written = [], set()
    for move in moves:
        outputs = []
        for index, name in enumerate(move.sources):
            if name in written:  # a tied lm_head
                continue
            written.add(name)
            if not move.is_computed:
                fed = feeds.get(_local_name(move))
                outputs.append(_plain(name, index, move, fold=fed if (move.layer, fed) in folded else None))
            else:
                outputs += _quantized(name, index, move, is_folded=(move.layer, move.input) in folded)
        if move.kv_cache is not None:
            outputs += _kv_scales(move, spec)
        planned.append(dataclasses.replace(move, outputs=tuple(outputs)))
    return _with_shards(planned)


def _kv_scales(move: Move, spec: ModelSpec) -> list[Output]:
    """One scale each for keys and values, beside the projections that make them."""
    row = ARCHITECTURES[spec.architecture]
    (qkv,) = (module for module in row.layer if module.name == "attention.qkv")
    keys, values = qkv.sources[-2:] if len(qkv.sources) == 3 else (qkv.sources[0], qkv.sources[0])
    prefix = row.layer_prefix.format(layer=move.layer)
    names = {"k_scale": f"{prefix}{keys.name}.k_scale", "v_scale": f"{prefix}{values.name}.v_scale"}
    return [
        Output(rank=None, file="", name=name, part=part, dtype="F32", shape=(), rows=((0, 1),))
        for part, name in names.items()
    ]


def hf_index(moves: Sequence[Move], directory: str) -> dict[str, Any] | None:
    """`model.safetensors.index.json` of the files in `directory`, or None for a single file."""
    outputs = [output for move in moves for output in move.outputs if output.rank is None]
    weight_map = {output.name: output.file.removeprefix(f"{directory}/") for output in outputs}
    if len(set(weight_map.values())) == 1:
        return None
    return {"metadata": {"total_size": sum(map(_num_bytes, outputs))}, "weight_map": weight_map}


def hf_quant_config(moves: Sequence[Move], version: str) -> dict[str, Any] | None:
    """`hf_quant_config.json`, which TensorRT-LLM reads."""
    layers, excluded = _layer_formats(moves)
    formats = {format.name: format for format in layers.values()}
    kv_cache = _kv_cache_algo(moves)
    if not formats and kv_cache is None:
        return None
    quantization: dict[str, Any] = {"kv_cache_quant_algo": kv_cache, "exclude_modules": ["lm_head", *excluded]}
    if len(formats) < 2:
        quantization |= _algorithm(next(iter(formats.values()), UNQUANTIZED))
    else:
        quantization |= {
            "quant_algo": MIXED,
            "quantized_layers": {name: _algorithm(format) for name, format in layers.items()},
        }
    return {"producer": {"name": "tkit", "version": version}, "quantization": quantization}


def hf_layer_format(quantization: Mapping[str, Any], module: str) -> QuantFormat:
    """The way back: what `quantization` of hf_quant_config.json says about a quantized layer."""
    format = stored_format(quantization.get("quantized_layers", {}).get(module, quantization))
    return INT8_CODES if format.algo == INT8_CODES.algo else format


def quantization_config(moves: Sequence[Move], version: str) -> dict[str, Any] | None:
    """`quantization_config` inside config.json, which vLLM and SGLang read."""
    layers, excluded = _layer_formats(moves)
    formats = {format.name: format for format in layers.values()}
    kv_cache = _kv_cache_algo(moves)
    if not formats and kv_cache is None:
        return None
    config: dict[str, Any] = {
        "quant_method": "modelopt",
        "quant_algo": next(iter(formats.values()), UNQUANTIZED).algo,
        "config_groups": {
            f"group_{index}": _group(format, ["Linear"]) for index, format in enumerate(formats.values())
        },
        "ignore": ["lm_head", *excluded],
        "producer": {"name": "tkit", "version": version},
    }
    if len(formats) > 1:
        config |= {
            "quant_algo": MIXED,
            "quantized_layers": {name: _algorithm(format) for name, format in layers.items()},
            "config_groups": {
                f"group_{index}": _group(format, [name for name, its in layers.items() if its.name == format.name])
                for index, format in enumerate(formats.values())
            },
        }
    if kv_cache is not None:
        config["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return config


def _kv_cache_algo(moves: Sequence[Move]) -> str | None:
    return next((KV_CACHES[move.kv_cache] for move in moves if move.kv_cache is not None), None)


def _layer_formats(moves: Sequence[Move]) -> tuple[dict[str, QuantFormat], list[str]]:
    """{Hugging Face module: format}, and the modules of layers that were left out. Norms and routers are neither."""
    layers, excluded = {}, []
    for move in moves:
        names = [name.removesuffix(".weight") for name in move.sources]
        if move.format is not None:
            layers.update(dict.fromkeys(names, move.format))
        elif move.layer is not None and any(len(shape) == 2 for shape in move.source_shapes):
            excluded += names  # a router too: it is a linear layer to the reader
    return layers, excluded if layers else []


def _algorithm(format: QuantFormat) -> dict[str, Any]:
    entry: dict[str, Any] = {"quant_algo": format.algo}
    if format.group_size is not None:
        entry["group_size"] = format.group_size
        if not format.has_float_weights:
            entry |= {"has_zero_point": False, "pre_quant_scale": format.has_prequant_scale}
    return entry


def _group(format: QuantFormat, targets: list[str]) -> dict[str, Any]:
    kind = "float" if format.has_float_weights else "int"
    weights: dict[str, Any] = {"dynamic": False, "num_bits": format.weight_bits, "type": kind}
    group: dict[str, Any] = {"weights": weights, "targets": targets}
    if format.group_size is not None:
        weights["group_size"] = format.group_size
    if format.has_float_weights:
        group["input_activations"] = weights | {"dynamic": format.name == "fp8_rowwise"}
    elif format.name == "w4a8_awq":
        group["input_activations"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return group


def _check(moves: Sequence[Move], spec: ModelSpec) -> None:
    row, problems = ARCHITECTURES[spec.architecture], []
    quantized = [move for move in moves if move.format is not None]
    problems += sorted(
        f"{name} is quantized by trtllm-build itself; no reader of this format does that"
        for name in {move.build_format.name for move in moves if move.build_format is not None}
    )
    problems += sorted(
        f"no reader of this format knows {name}"
        for name in {move.format.name for move in moves if move.format is not None and not move.format.has_hf_form}
    )
    if any(move.kv_cache == "int8" for move in moves):
        problems.append("int8 is no KV cache of the readers of this format; they know fp8")
    if any(move.kv_cache is not None for move in moves) and not row.layer_prefix.startswith("model.layers."):
        problems.append(f"no reader of this format looks for the KV cache's scales in {spec.architecture}")
    if any(move.format.has_zero_point for move in quantized if move.format is not None):
        problems.append("the unified form has no zero points; vLLM and SGLang read the source as it is")
    for name in sorted(
        {move.format.name for move in quantized if move.num_experts and move.format and move.format.group_size}
    ):
        problems.append(f"no reader of this format has experts in {name}")
    if any(move.transform == "transpose" for move in quantized):
        problems.append(f"{spec.architecture} stores its layers transposed, which no reader knows quantized")
    hidden_inputs = {module.input for module in row.layer if module.in_ == "hidden"}
    unfed = hidden_inputs - {module.feeds for module in row.layer}
    unfed &= {move.input for move in quantized if move.format is not None and move.format.has_prequant_scale}
    if unfed:
        problems.append(f"no norm of {spec.architecture} can take the factor of {', '.join(sorted(map(str, unfed)))}")
    if problems:
        names = sorted({format.name for move in moves for format in (move.format, move.build_format) if format})
        raise InputError(
            f"{spec.architecture} as {' and '.join(names)} has no unified Hugging Face form",
            problems=problems,
            hint="use --format trtllm, or another --quant",
        )


def _local_name(move: Move) -> str:
    return move.module.removeprefix(f"transformer.layers.{move.layer}.")


def _plain(name: str, index: int, move: Move, fold: str | None) -> Output:
    return Output(
        rank=None,
        file="",
        name=name,
        part="weight",
        dtype="model",
        shape=move.source_shapes[index],
        rows=(),
        source=index,
        fold=fold,
    )


def _quantized(name: str, index: int, move: Move, *, is_folded: bool) -> list[Output]:
    """The stored tensors of one projection, cut out of the fused layer's."""
    assert move.format is not None
    start, in_features = sum(move.source_rows[:index]), move.source_shapes[index][1]
    stop = start + move.source_rows[index]
    outputs = []
    for tensor in move.format.tensors:
        if tensor.hf_name is None or (tensor.name == "prequant_scaling_factor" and is_folded):
            continue
        shape, rows = _cut(tensor, start, stop, in_features)
        if tensor.is_per_expert and move.num_experts:
            expert = index * move.num_experts // len(move.sources)
            rows = ((expert, expert + 1),)
        outputs.append(
            Output(
                rank=None,
                file="",
                name=f"{name.removesuffix('.weight')}.{tensor.hf_name}",
                part=tensor.name,
                dtype=tensor.hf_dtype or tensor.dtype,
                shape=shape,
                rows=rows,
            )
        )
    return outputs


def _cut(
    tensor: StoredTensor, start: int, stop: int, in_features: int
) -> tuple[tuple[int, ...], tuple[tuple[int, int]]]:
    if tensor.out_axis is None and tensor.in_axis is None:
        return (), ((0, 1),)  # one number for the whole layer, a scalar here
    if tensor.out_axis is None:
        return (in_features,), ((0, in_features),)
    unit = tensor.out_axis[1]
    return tensor.shape(stop - start, in_features), ((start // unit, stop // unit),)


def _with_shards(moves: Sequence[Move]) -> list[Move]:
    """Distributes the tensors over files of at most MAX_SHARD_BYTES, in order."""
    shards, size = [0], 0
    for output in (output for move in moves for output in move.outputs):
        if size and size + _num_bytes(output) > MAX_SHARD_BYTES:
            shards.append(shards[-1] + 1)
            size = 0
        else:
            shards.append(shards[-1])
        size += _num_bytes(output)
    numbers, total = iter(shards[1:]), shards[-1] + 1

    def name(number: int) -> str:
        return "model.safetensors" if total == 1 else f"model-{number + 1:05d}-of-{total:05d}.safetensors"

    return [
        dataclasses.replace(
            move, outputs=tuple(dataclasses.replace(output, file=name(next(numbers))) for output in move.outputs)
        )
        for move in moves
    ]


def _num_bytes(output: Output) -> int:
    return math.prod(output.shape) * ITEM_BYTES[output.dtype]


def combined(plans: Mapping[str, Sequence[Move]]) -> list[Move]:
    """One list of moves that writes every plan into its directory: {"checkpoint": moves, "hf": moves}."""
    return [
        dataclasses.replace(
            moves[0],
            outputs=tuple(
                dataclasses.replace(output, file=f"{directory}/{output.file}")
                for directory, move in zip(plans, moves, strict=True)
                for output in move.outputs
            ),
        )
        for moves in zip(*plans.values(), strict=True)
    ]
