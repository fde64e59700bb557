"""Already quantized layers -> what TensorRT-LLM stores, code by code; nothing is rounded to another grid.

Four bits: every source keeps unsigned codes u = q + 8, and W = (u - z) s. TensorRT-LLM wants two's complement q and, where
z is not always 8, `zero` = (8 - z) s beside them: W = q s + zero.

    AutoAWQ             word = 8 columns of one input:  nibbles hold columns 0 2 4 6 1 3 5 7;  zero points likewise
    GPTQ                word = 8 inputs of one column;  zero points: 8 columns in order, each 1 too small before gptq_v2
    compressed-tensors  word = 8 inputs of one row;     zero points: 8 rows in order
    ModelOpt            TensorRT-LLM's own bytes

Eight bits are carried as they are. Layers that are fused have one scale where FP8 is per tensor: those with a smaller one are
rounded once more, to the largest. Of q, k, v that is how they are stored; fc and gate would be stored apart, but trtllm-build
fuses them, and rounds as here. Loads no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import ml_dtypes
import numpy as np

from tkit.architectures.moves import fused_modules, has_fused_gate
from tkit.checkpoints.reader import TensorFiles
from tkit.checkpoints.tensors import SAFETENSORS_DTYPE, cast, to_float32
from tkit.errors import InputError
from tkit.quantize.data_free import fp8_bits
from tkit.specs.model import ModelSpec
from tkit.specs.moves import Move
from tkit.specs.source_format import SourceFormat

Raw = tuple[np.ndarray, str]  # bits and their safetensors dtype
Layer = Mapping[str, Raw]  # the source's tensors of one layer, without its name
Parts = dict[str, Raw]  # TensorRT-LLM's
T = TypeVar("T")

AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # where columns 0 to 7 lie
SIGN = np.uint8(0x88)  # u ^ 8 is q in two's complement, two codes at a time


class CarriedQuantizer:
    """The `LayerQuantizer` of sources that are quantized already. Memory: one layer's codes, twice.

    Beside the parts of a whole module it gives those of each of its layers, as `weight[0]`, `weight[1]`, ...
    """

    def __init__(self, format: SourceFormat, spec: ModelSpec):
        self.format, self.spec = format, spec

    def begin(self, sources: Mapping[str, Raw]) -> None:
        pass

    def skip(self, index: int, sources: Mapping[str, Raw]) -> None:
        pass

    def notes(self) -> list[str]:
        return []

    def layer(self, index: int, sources: Mapping[str, Raw], moves: Sequence[Move]) -> dict[str, Parts]:
        dtype = SAFETENSORS_DTYPE[self.spec.dtype]
        carried = {
            move.module: _kv_cache(*(sources[name] for name in move.sources))
            for move in moves
            if move.kv_cache is not None
        }
        for group in fused_modules([move for move in moves if move.kv_cache is None], has_fused_gate(self.spec)):
            own = [
                [unpacked(self.format, layer, dtype) for layer in by_layer(move, sources).values()] for move in group
            ]
            stored = _with_one_scale(own, group[0].num_experts) if self.format.unpack == "fp8" else own
            for move, layers, fused in zip(group, own, stored, strict=True):
                carried[move.module] = _stacked(fused, move) | {
                    f"{part}[{index}]": raw for index, layer in enumerate(layers) for part, raw in layer.items()
                }
        return carried


def _kv_cache(keys: Raw, values: Raw) -> Parts:
    """The scales of a layer's KV cache: one each, and TensorRT-LLM's one for both, the larger."""
    k_scale, v_scale = (to_float32(*raw).reshape(1) for raw in (keys, values))
    parts = {"k_scale": k_scale, "v_scale": v_scale, "kv_cache_scaling_factor": np.maximum(k_scale, v_scale)}
    return {part: (scale.view(np.uint32), "F32") for part, scale in parts.items()}


def unpacked(format: SourceFormat, layer: Layer, dtype: str) -> Parts:
    """The tensors of one layer as TensorRT-LLM stores them, `zero` as (out, in/group); `dtype` is the model's."""
    return UNPACK[format.unpack](format, layer, dtype)


def check_carried(source: TensorFiles, moves: Sequence[Move], format: SourceFormat, spec: ModelSpec) -> list[str]:
    """Reads the small tensors that decide whether codes can be carried over; returns notes for the card.

    Raises InputError listing inputs that are stored in another order than they come in, zero points that a symmetric format
    does not have, and factors that the layers of a module do not share.
    """
    carried = [move for move in moves if move.source_dtypes and move.kv_cache is None]
    read = {"g_idx", "weight_g_idx"}
    if not format.target.has_zero_point:
        read.add("qzeros")
    if format.target.has_prequant_scale:
        read.add("pre_quant_scale")
    if format.unpack == "fp8":
        read.add("weight_scale")
    problems = []
    scales: dict[str, list[np.float32]] = {}
    for move in carried:
        small = {
            name: (source.read(name), source.entries[name].dtype) for name in move.sources if _ending(name) in read
        }
        layers = by_layer(move, small)
        problems += [
            f"{name}.{problem}" for name, layer in layers.items() for problem in _layer_problems(layer, format)
        ]
        factors = [layer["pre_quant_scale"][0].tobytes() for layer in layers.values() if "pre_quant_scale" in layer]
        if len(set(factors)) > 1 or len(factors) not in (0, len(layers)):
            problems.append(f"{', '.join(layers)} share one input, but have a pre_quant_scale of their own")
        if format.unpack == "fp8" and any(output.rank is not None for output in move.outputs):
            scales[move.module] = [_scale(layer, "weight_scale")[0] for layer in layers.values()]
    if problems:
        raise InputError(f"{source.directory}: {format}, but not in a form that can be carried over", problems=problems)
    notes = [f"carried over from {format}"]
    num_rescaled = 0
    for group in fused_modules([move for move in carried if move.module in scales], has_fused_gate(spec)):
        for fused in _per_expert([scale for move in group for scale in scales[move.module]], group[0].num_experts):
            num_rescaled += sum(scale != max(fused) for scale in fused)
    if num_rescaled:
        notes.append(
            f"{num_rescaled} of {sum(map(len, scales.values()))} layers have a smaller scale than others that they are fused "
            "with; TensorRT-LLM has one for them, the largest, and their codes were rounded to it"
        )
    if format.kv_cache != "auto":
        notes.append(f"the scales of the KV cache, {format.kv_cache}, were carried over too")
    return notes


def zero_biases(source: TensorFiles, moves: Sequence[Move]) -> list[str]:
    """Biases of nothing but zeros in layers that have none: AutoGPTQ wrote them for every layer."""
    planned = {name for move in moves for name in move.sources}
    layers = {name.rpartition(".")[0] for move in moves if move.source_dtypes for name in move.sources}
    surplus = [name for name in source.entries if name not in planned and name.removesuffix(".bias") in layers]
    return [name for name in surplus if not source.read(name).any()]


def _layer_problems(layer: Layer, format: SourceFormat) -> list[str]:
    problems = []
    for name in ("g_idx", "weight_g_idx"):
        if name in layer:
            order = layer[name][0].view(np.int32)
            group_size = format.target.group_size
            if not np.array_equal(order, np.arange(len(order)) // (group_size or len(order))):
                problems.append(f"{name} is in the order of activations (desc_act); only inputs in their own order fit")
    if "qzeros" in layer:
        symmetric = (8 - format.zero_point_offset) * 0x11111111
        if (layer["qzeros"][0] != np.uint32(symmetric)).any():
            problems.append("qzeros are not all 8, though the format says sym")
    return problems


def _ending(name: str) -> str:
    return name.rpartition(".")[2]


def by_layer(move: Move, sources: Mapping[str, Raw]) -> dict[str, dict[str, Raw]]:
    """{layer: its tensors without its name}, in the order in which the module stacks them."""
    layers: dict[str, dict[str, Raw]] = {}
    for name in move.sources:
        layer, _, ending = name.rpartition(".")
        tensors = layers.setdefault(layer, {})
        if name in sources:
            tensors[ending] = sources[name]
    return layers


def _stacked(layers: Sequence[Parts], move: Move) -> Parts:
    """The parts of a module whose rows are those of all its layers, one below the other."""
    assert move.format is not None
    if len(layers) == 1:
        return dict(layers[0])
    per_expert = len(layers) // max(move.num_experts, 1)
    stacked = {}
    for tensor in move.format.tensors:
        raws = [layer[tensor.name] for layer in layers]
        if tensor.is_per_expert and move.num_experts:
            raws = raws[::per_expert]
        elif tensor.out_axis is None:
            raws = raws[:1]
        stacked[tensor.name] = np.concatenate([raw for raw, _ in raws]), raws[0][1]
    return stacked


def _with_one_scale(modules: Sequence[Sequence[Parts]], num_experts: int) -> list[list[Parts]]:
    """The layers of modules that are fused, under the largest of their FP8 scales, those of each expert under its own;
    layers that have it keep every bit. The inputs of all have one scale."""
    layers = [layer for module in modules for layer in module]
    inputs = max(layer["activation_scaling_factor"][0].view(np.float32)[0] for layer in layers)
    common: list[Parts] = []
    for fused in _per_expert(layers, num_experts):
        scales = [layer["weights_scaling_factor"][0].view(np.float32)[0] for layer in fused]
        for layer, scale in zip(fused, scales, strict=True):
            codes = layer["weight"][0]
            if scale != max(scales):
                codes = fp8_bits(FP8_VALUES * scale / max(scales))[codes]
            common.append(
                {
                    "weight": (codes, "F8_E4M3"),
                    "weights_scaling_factor": (np.array([max(scales)]).view(np.uint32), "F32"),
                    "activation_scaling_factor": (np.array([inputs]).view(np.uint32), "F32"),
                }
            )
    in_order = iter(common)
    return [list(itertools.islice(in_order, len(module))) for module in modules]


def _per_expert(layers: list[T], num_experts: int) -> list[list[T]]:
    """Those of each expert, which are fused; all where there are no experts."""
    size = len(layers) // max(num_experts, 1)
    return [layers[start : start + size] for start in range(0, len(layers), size)]


# the value of each of the 256 codes of float8_e4m3fn; 0 for the two NaNs, which no checkpoint may hold
FP8_VALUES = np.nan_to_num(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32))


# --- one layer -------------------------------------------------------------------------------------------------------


def _awq(format: SourceFormat, layer: Layer, dtype: str) -> Parts:
    words = layer["qweight"][0]  # (in, out/8)
    packed = np.empty((*words.shape, 4), np.uint8)
    for pair in range(4):  # nibbles j and j + 4 are neighbouring columns
        packed[..., pair] = _nibble(words, pair) | _nibble(words, pair + 4) << 4
    codes = packed.reshape(len(words), -1).T ^ SIGN
    zeros = np.stack([_nibble(layer["qzeros"][0], nibble) for nibble in AWQ_NIBBLES], axis=-1)  # (groups, out/8, 8)
    return _int4(codes, _transposed(layer["scales"]), zeros.reshape(len(zeros), -1).T, dtype)


def _gptq(format: SourceFormat, layer: Layer, dtype: str) -> Parts:
    words = layer["qweight"][0]  # (in/8, out)
    codes = _paired(words[:, 0::2].T, words[:, 1::2].T)
    zeros = None
    if format.target.has_zero_point:
        # whole words, as GPTQModel took 1 off: the nibble of a zero point of 0 has borrowed from its neighbour
        stored = layer["qzeros"][0] + np.uint32(format.zero_point_offset * 0x11111111)  # (groups, out/8)
        zeros = np.stack([_nibble(stored, nibble) for nibble in range(8)], axis=-1).reshape(len(stored), -1).T
    return _int4(codes, _transposed(layer["scales"]), zeros, dtype)


def _compressed(format: SourceFormat, layer: Layer, dtype: str) -> Parts:
    words = layer["weight_packed"][0]  # (out, in/8)
    codes = _paired(words[0::2], words[1::2])
    zeros = None
    if format.target.has_zero_point:
        packed = layer["weight_zero_point"][0]  # (out/8, groups)
        zeros = np.stack([_nibble(packed, nibble) for nibble in range(8)], axis=1).reshape(-1, packed.shape[1])
    return _int4(codes, layer["weight_scale"], zeros, dtype)


def _packed(format: SourceFormat, layer: Layer, dtype: str) -> Parts:
    scale = layer["weight_scale"]
    parts: Parts = {
        "weight": (layer["weight"][0], "I8"),
        "weights_scaling_factor": (cast(*scale, "F32"), "F32"),
    }
    if format.target.has_prequant_scale:
        ones = (
            np.ones(layer["weight"][0].shape[1], np.float32).view(np.uint32),
            "F32",
        )  # folded into the norm in front
        parts["prequant_scaling_factor"] = (cast(*layer.get("pre_quant_scale", ones), dtype), dtype)
    return parts


def _fp8(format: SourceFormat, layer: Layer, dtype: str) -> Parts:
    return {
        "weight": layer["weight"],
        "weights_scaling_factor": (_scale(layer, "weight_scale").view(np.uint32), "F32"),
        "activation_scaling_factor": (_scale(layer, "input_scale").view(np.uint32), "F32"),
    }


def _fp8_rows(format: SourceFormat, layer: Layer, dtype: str) -> Parts:
    """One scale for all rows is the same scale for each."""
    scale = np.empty(len(layer["weight"][0]), np.float32)
    scale[:] = _scale(layer, "weight_scale")
    return {"weight": layer["weight"], "per_channel_scale": (scale.view(np.uint32), "F32")}


def _fp8_blocks(format: SourceFormat, layer: Layer, dtype: str) -> Parts:
    scale = layer["weight_scale_inv" if "weight_scale_inv" in layer else "weight_scale"]
    return {"weight": layer["weight"], "weights_scaling_factor": (cast(*scale, "F32"), "F32")}


UNPACK: dict[str, Callable[[SourceFormat, Layer, str], Parts]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed": _compressed,
    "packed": _packed,
    "fp8": _fp8,
    "fp8_rows": _fp8_rows,
    "fp8_blocks": _fp8_blocks,
}


def _int4(codes: np.ndarray, scale: Raw, zeros: np.ndarray | None, dtype: str) -> Parts:
    """`codes` (out/2, in) bytes, `scale` and `zeros` (out, groups); zero = (8 - z) s, with s as the loader casts it."""
    parts: Parts = {
        "weight": (np.ascontiguousarray(codes), "I8"),
        "weights_scaling_factor": (cast(*scale, "F32"), "F32"),
    }
    if zeros is not None:
        kernel_scale = to_float32(cast(*scale, dtype), dtype)
        with np.errstate(invalid="ignore"):  # an infinite scale is refused where it was read
            zero = (np.float32(8) - zeros.astype(np.float32)) * kernel_scale
        parts["zero"] = (cast(zero.view(np.uint32), "F32", dtype), dtype)
    return parts


def _paired(even: np.ndarray, odd: np.ndarray) -> np.ndarray:
    """Words of 8 inputs of the even and of the odd rows, (out/2, in/8), as bytes of one input of both, (out/2, in)."""
    packed = np.empty((*even.shape, 8), np.uint8)
    for nibble in range(8):
        packed[..., nibble] = _nibble(even, nibble) | _nibble(odd, nibble) << 4
    return packed.reshape(len(even), -1) ^ SIGN


def _nibble(words: np.ndarray, index: int) -> np.ndarray:
    return (words >> np.uint32(4 * index)).astype(np.uint8) & np.uint8(15)


def _transposed(raw: Raw) -> Raw:
    return np.ascontiguousarray(raw[0].T), raw[1]


def _scale(layer: Layer, name: str) -> np.ndarray:
    """(n,) float32, however many axes of one the source gives it."""
    return to_float32(*layer[name]).reshape(-1).copy()
