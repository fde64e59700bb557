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

from tkit.architectures.table import ARCHITECTURES
from tkit.errors import InputError
from tkit.specs.model import ModelSpec
from tkit.specs.moves import Move, Output
from tkit.specs.quantization import QuantFormat, StoredTensor

MAX_SHARD_BYTES = 5_000_000_000  # the hub's convention
ITEM_BYTES = {"model": 2, "F32": 4, "F8_E4M3": 1, "I8": 1, "U8": 1}


def plan_hf_outputs(moves: Sequence[Move], spec: ModelSpec, quant: QuantFormat) -> list[Move]:
    """`moves` with the outputs of the Hugging Face checkpoint instead. Every source is written once.

    Raises InputError where the format has no unified form for this architecture.
    """
    _check(spec, quant)
    folded = {module.feeds for module in ARCHITECTURES[spec.architecture].layer if module.feeds}
    feeds = {module.name: module.feeds for module in ARCHITECTURES[spec.architecture].layer}
    planned, written = [], set()
    for move in moves:
        outputs = []
        for index, name in enumerate(move.sources):
            if name in written:  # a tied lm_head
                continue
            written.add(name)
            if move.format is None:
                fold = feeds.get(_local_name(move)) if quant.has_prequant_scale else None
                outputs.append(_plain(name, index, move, fold))
            else:
                outputs += _quantized(name, index, move, is_folded=move.input in folded)
        planned.append(dataclasses.replace(move, outputs=tuple(outputs)))
    return _with_shards(planned)


def hf_index(moves: Sequence[Move], directory: str) -> dict[str, Any] | None:
    """`model.safetensors.index.json` of the files in `directory`, or None for a single file."""
    outputs = [output for move in moves for output in move.outputs if output.rank is None]
    weight_map = {output.name: output.file.removeprefix(f"{directory}/") for output in outputs}
    if len(set(weight_map.values())) == 1:
        return None
    return {"metadata": {"total_size": sum(map(_num_bytes, outputs))}, "weight_map": weight_map}


def hf_quant_config(quant: QuantFormat, version: str) -> dict[str, Any] | None:
    """`hf_quant_config.json`, which TensorRT-LLM reads."""
    if quant.algo is None:
        return None
    quantization: dict[str, Any] = {
        "quant_algo": quant.algo,
        "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head"],
    }
    if quant.group_size is not None:
        quantization |= {
            "group_size": quant.group_size,
            "has_zero_point": False,
            "pre_quant_scale": quant.has_prequant_scale,
        }
    return {"producer": {"name": "tkit", "version": version}, "quantization": quantization}


def quantization_config(quant: QuantFormat, version: str) -> dict[str, Any] | None:
    """`quantization_config` inside config.json, which vLLM and SGLang read."""
    if quant.algo is None:
        return None
    weights: dict[str, Any] = {"dynamic": False, "num_bits": quant.weight_bits, "type": "int"}
    group: dict[str, Any] = {"weights": weights, "targets": ["Linear"]}
    if quant.group_size is not None:
        weights["group_size"] = quant.group_size
    if quant.name.startswith("fp8"):
        weights["type"] = "float"
        group["input_activations"] = weights | {"dynamic": quant.name == "fp8_rowwise"}
    return {
        "quant_method": "modelopt",
        "quant_algo": quant.algo,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "producer": {"name": "tkit", "version": version},
    }


def _check(spec: ModelSpec, quant: QuantFormat) -> None:
    row, problems = ARCHITECTURES[spec.architecture], []
    if quant.algo is not None and quant.is_stored_plain:
        problems.append(f"{quant.name} is quantized by trtllm-build itself; no reader of this format does that")
    if not quant.is_stored_plain:
        quantized = [module for module in row.layer if module.is_quantized]
        if any(module.transform == "transpose" for module in quantized):
            problems.append(f"{spec.architecture} stores its layers transposed, which no reader knows quantized")
        inputs = {module.input for module in quantized if module.in_ == "hidden"}
        unfed = inputs - {module.feeds for module in row.layer}
        if quant.has_prequant_scale and unfed:
            problems.append(
                f"no norm of {spec.architecture} can take the factor of {', '.join(sorted(map(str, unfed)))}"
            )
    if problems:
        raise InputError(
            f"{spec.architecture} as {quant.name} has no unified Hugging Face form",
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
