"""Which quantized format a Hugging Face checkpoint is in: one reading per `quant_method`.

Knows the `quantization_config` of config.json (or ModelOpt's hf_quant_config.json) and the names of the tensors; reads no
file. Source of names, shapes and meanings: AutoAWQ `WQLinear_GEMM`, GPTQModel `QuantizeConfig`, compressed-tensors
`compressors/`, NVIDIA ModelOpt 0.47 `export/`, transformers `FineGrainedFP8Config`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from tkit.errors import InputError
from tkit.specs.moves import Move, Output
from tkit.specs.precision import UNQUANTIZED, Precision
from tkit.specs.quantization import QUANT_FORMATS, QuantFormat, int4_format
from tkit.specs.source_format import SourceFormat, SourceTensor

KNOWN = (
    "AutoAWQ (gemm), GPTQ (gptq and gptq_v2), compressed-tensors (W4A16 pack-quantized, FP8 float-quantized),"
    " ModelOpt (FP8, FP8_PER_CHANNEL_PER_TOKEN, W4A16_AWQ), FP8 with static, dynamic or [128, 128] block scales"
)
GROUP_SIZES = (64, 128)  # of TensorRT-LLM's INT4 kernels
_BLOCK = [128, 128]
_FLOATS = ("BF16", "F16", "F32")

_FP8_WEIGHT = SourceTensor(name="weight", dtypes=("F8_E4M3",), dimensions="out in")
_TENSOR_SCALE = SourceTensor(name="weight_scale", dtypes=_FLOATS, dimensions="1")
_ROW_SCALE = SourceTensor(name="weight_scale", dtypes=_FLOATS, dimensions="out 1")
_INPUT_SCALE = SourceTensor(name="input_scale", dtypes=_FLOATS, dimensions="1")
_GPTQ_ORDER = SourceTensor(name="g_idx", dtypes=("I32",), dimensions="in", is_optional=True)

Problems = list[str]
Forms = Mapping[str, tuple[str, tuple[int, ...]]]  # tensors of the checkpoint: {name: (dtype, shape)}


def source_format(config: Mapping[str, Any], names: Collection[str], where: str) -> SourceFormat | None:
    """The format of a checkpoint with that config and tensors of those names; None where nothing is quantized.

    `config` is config.json with what hf_quant_config.json holds as its `quantization_config` where it has none. Raises
    InputError listing what tkit cannot carry over.
    """
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    if not isinstance(quantization, Mapping):
        raise InputError(f"{where}: quantization_config is {quantization!r}, expected keys")
    method = quantization.get("quant_method")
    reader = _READERS.get(method) if isinstance(method, str) else None
    if reader is None:
        raise InputError(f'{where}: quantized already, by an unknown quant_method "{method}"', hint=f"known: {KNOWN}")
    problems: Problems = []
    format = reader(quantization, names, problems)
    if problems or format is None:
        raise InputError(f"{where}: quantized by {method} in a form that cannot be carried over", problems=problems,
                         hint=f"known: {KNOWN}")  # fmt: skip
    target = dataclasses.replace(format.target, needs_calibration=False)
    has_kv_scales = any(name.endswith(".k_scale") for name in names)
    return dataclasses.replace(format, target=target, kv_cache="fp8" if has_kv_scales else "auto")


def _awq(config: Mapping[str, Any], names: Collection[str], problems: Problems) -> SourceFormat:
    _expect(config, "version", ("gemm", "GEMM"), "gemm", problems)
    group_size = _int4_group(config.get("bits", 4), config.get("group_size"), problems)
    return SourceFormat(
        name="AutoAWQ",
        scheme=f"4 bit, group {group_size}, zero points",
        unpack="awq",
        target=int4_format("int4", group_size, has_zero_point=True),
        tensors=(
            SourceTensor(name="qweight", dtypes=("I32",), dimensions="in out/8"),
            SourceTensor(name="qzeros", dtypes=("I32",), dimensions="in/g out/8"),
            SourceTensor(name="scales", dtypes=_FLOATS, dimensions="in/g out"),
        ),
    )


def _gptq(config: Mapping[str, Any], names: Collection[str], problems: Problems) -> SourceFormat:
    _expect(config, "checkpoint_format", ("gptq", "gptq_v2"), "gptq", problems)
    _expect(config, "is_marlin_format", (False,), False, problems)
    group_size = _int4_group(config.get("bits"), config.get("group_size"), problems)
    is_symmetric = config.get("sym") is True
    is_v2 = config.get("checkpoint_format") == "gptq_v2"
    return SourceFormat(
        name="GPTQ",
        scheme=f"4 bit, group {group_size}{'' if is_symmetric else ', zero points'}",
        unpack="gptq",
        target=int4_format("int4", group_size, has_zero_point=not is_symmetric),
        zero_point_offset=0 if is_v2 else 1,
        tensors=(
            SourceTensor(name="qweight", dtypes=("I32",), dimensions="in/8 out"),
            SourceTensor(name="qzeros", dtypes=("I32",), dimensions="in/g out/8"),
            SourceTensor(name="scales", dtypes=_FLOATS, dimensions="in/g out"),
            dataclasses.replace(_GPTQ_ORDER, is_optional=not config.get("desc_act")),
        ),
    )


def _compressed_tensors(config: Mapping[str, Any], names: Collection[str], problems: Problems) -> SourceFormat | None:
    groups = config.get("config_groups")
    schemes = [
        (group["weights"], group.get("input_activations"), group.get("format") or config.get("format"))
        for group in (groups.values() if isinstance(groups, Mapping) else ())
        if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)
    ]
    if not schemes or any(scheme != schemes[0] for scheme in schemes):
        problems.append(f"config_groups has {len(schemes)} groups of weights, expected one scheme for all layers")
        return None
    weights, inputs, packing = schemes[0]
    if weights.get("type") == "int":
        return _compressed_int4(weights, inputs, packing, problems)
    return _compressed_fp8(weights, inputs, packing, problems)


def _compressed_int4(weights: Mapping[str, Any], inputs: Any, packing: Any, problems: Problems) -> SourceFormat:
    if packing != "pack-quantized" or inputs:
        problems.append(f"format is {packing!r} with input_activations {inputs!r}, expected pack-quantized without")
    _expect(weights, "strategy", ("group",), None, problems)
    group_size = _int4_group(weights.get("num_bits"), weights.get("group_size"), problems)
    is_symmetric = weights.get("symmetric", True)
    zero_point = SourceTensor(name="weight_zero_point", dtypes=("I32",), dimensions="out/8 in/g")
    return SourceFormat(
        name="compressed-tensors",
        scheme=f"4 bit, group {group_size}{'' if is_symmetric else ', zero points'}",
        unpack="compressed",
        target=int4_format("int4", group_size, has_zero_point=not is_symmetric),
        ignored=(".weight_shape",),
        tensors=(
            SourceTensor(name="weight_packed", dtypes=("I32",), dimensions="out in/8"),
            SourceTensor(name="weight_scale", dtypes=_FLOATS, dimensions="out in/g"),
            *(() if is_symmetric else (zero_point,)),
            dataclasses.replace(_GPTQ_ORDER, name="weight_g_idx", is_optional=weights.get("actorder") != "group"),
        ),
    )


def _compressed_fp8(weights: Mapping[str, Any], inputs: Any, packing: Any, problems: Problems) -> SourceFormat | None:
    if (weights.get("type"), weights.get("num_bits")) != ("float", 8):
        problems.append(
            f"weights are {weights.get('num_bits')} bit {weights.get('type')}, expected 4 bit int or 8 bit float"
        )
        return None
    if packing not in ("float-quantized", "naive-quantized"):
        problems.append(f"format is {packing!r}, expected float-quantized")
    inputs = inputs if isinstance(inputs, Mapping) else {}
    is_dynamic, by = bool(inputs.get("dynamic")), inputs.get("strategy")
    strategy = weights.get("strategy")
    if strategy == "block" and weights.get("block_structure") == _BLOCK:
        return _fp8_blocks("compressed-tensors", "weight_scale")
    if strategy == "tensor" and inputs and not is_dynamic and by == "tensor":
        return _fp8_static("compressed-tensors")
    if strategy in ("tensor", "channel") and is_dynamic and by == "token":
        return _fp8_dynamic("compressed-tensors", _ROW_SCALE if strategy == "channel" else _TENSOR_SCALE)
    problems.append(
        f"weights by {strategy} with {'dynamic' if is_dynamic else 'static'} inputs by {by}: expected both by tensor and"
        " static, weights by tensor or channel with dynamic inputs by token, or blocks of [128, 128]"
    )
    return None


def _fp8(config: Mapping[str, Any], names: Collection[str], problems: Problems) -> SourceFormat | None:
    block = config.get("weight_block_size")
    _expect(config, "activation_scheme", ("static", "dynamic"), None, problems)
    if block is not None and block != _BLOCK:
        problems.append(f"weight_block_size is {block!r}, expected {_BLOCK}")
    if block is not None:
        return _fp8_blocks("FP8", "weight_scale_inv")
    return _fp8_static("FP8") if config.get("activation_scheme") == "static" else _fp8_dynamic("FP8", _TENSOR_SCALE)


def _modelopt(config: Mapping[str, Any], names: Collection[str], problems: Problems) -> SourceFormat | None:
    algo = config.get("quant_algo")
    if algo == "FP8":
        return dataclasses.replace(_fp8_static("ModelOpt"), is_unified=True)
    if algo == "FP8_PER_CHANNEL_PER_TOKEN":
        return dataclasses.replace(_fp8_dynamic("ModelOpt", _ROW_SCALE), is_unified=True)
    if algo != "W4A16_AWQ":
        problems.append(f"quant_algo is {algo!r}, expected FP8, FP8_PER_CHANNEL_PER_TOKEN or W4A16_AWQ")
        return None
    _expect(config, "has_zero_point", (False,), False, problems)
    group_size = _int4_group(4, config.get("group_size", 128), problems)
    has_factor = any(name.endswith(".pre_quant_scale") for name in names)
    factor = SourceTensor(name="pre_quant_scale", dtypes=_FLOATS, dimensions="in", is_optional=True)
    return SourceFormat(
        name="ModelOpt AWQ",
        scheme=f"4 bit, group {group_size}",
        unpack="packed",
        is_unified=True,
        target=int4_format("int4_awq" if has_factor else "int4", group_size, has_prequant_scale=has_factor),
        tensors=(
            SourceTensor(name="weight", dtypes=("U8",), dimensions="out/2 in"),
            SourceTensor(name="weight_scale", dtypes=_FLOATS, dimensions="out in/g"),
            *((factor,) if has_factor else ()),
        ),
    )


_READERS: dict[str, Callable[[Mapping[str, Any], Collection[str], Problems], SourceFormat | None]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "fp8": _fp8,
}


def _fp8_static(name: str) -> SourceFormat:
    return SourceFormat(
        name=name,
        scheme="FP8 per tensor, static",
        unpack="fp8",
        target=QUANT_FORMATS["fp8"],
        tensors=(_FP8_WEIGHT, _TENSOR_SCALE, _INPUT_SCALE),
    )


def _fp8_dynamic(name: str, scale: SourceTensor) -> SourceFormat:
    by = "tensor" if scale is _TENSOR_SCALE else "channel"
    return SourceFormat(
        name=name,
        scheme=f"FP8 per {by}, dynamic inputs",
        unpack="fp8_rows",
        target=QUANT_FORMATS["fp8_rowwise"],
        tensors=(_FP8_WEIGHT, scale),
    )


def _fp8_blocks(name: str, scale: str) -> SourceFormat:
    block_scale = SourceTensor(name=scale, dtypes=_FLOATS, dimensions="out/128 in/128")
    return SourceFormat(
        name=name,
        scheme="FP8 in blocks of 128 x 128",
        unpack="fp8_blocks",
        is_unified=True,
        target=QuantFormat(name="fp8_block", algo="FP8_BLOCK_SCALES", weight_bits=8, tensors=()),
        tensors=(_FP8_WEIGHT, block_scale),
    )


def _int4_group(bits: Any, group_size: Any, problems: Problems) -> int:
    if bits != 4:
        problems.append(f"{bits} bits, expected 4")
    if type(group_size) is not int or group_size not in GROUP_SIZES:
        problems.append(
            f"group_size is {group_size!r}, TensorRT-LLM's kernels know {GROUP_SIZES[0]} and {GROUP_SIZES[1]}"
        )
        return GROUP_SIZES[-1]
    return group_size


def _expect(config: Mapping[str, Any], key: str, known: tuple[Any, ...], default: Any, problems: Problems) -> None:
    value = config.get(key, default)
    if value not in known:
        problems.append(f"{key} is {value!r}, expected {' or '.join(map(str, known))}")


def carried_precision(moves: Sequence[Move], format: SourceFormat, forms: Forms, where: str) -> Precision:
    """The format of every module of `moves`, which were planned without any; some layers may have stayed in 16 bits.

    Raises InputError listing the modules of which only a part is quantized.
    """
    plain, problems, num_carried = {}, [], 0
    for move in moves:
        if move.input is None:
            continue
        kept = [name for name in move.sources if _is_plain(name, forms)]
        num_carried += len(move.sources) - len(kept)
        if kept:
            plain[move.module] = UNQUANTIZED
        if len(kept) not in (0, len(move.sources)):
            problems.append(f"{move.module}: {', '.join(kept)} in 16 bits, its other layers are not")
    if not num_carried:
        problems.append("every layer is in 16 bits")
    if problems:
        raise InputError(f"{where}: {format}, says quantization_config, but the tensors differ", problems=problems)
    default = format.target if format.has_trtllm_form else UNQUANTIZED
    return Precision(default=default, modules=plain, kv_cache=format.kv_cache)


def _is_plain(name: str, forms: Forms) -> bool:
    return name in forms and forms[name][0] in _FLOATS


def carried_moves(moves: Sequence[Move], format: SourceFormat, forms: Forms) -> list[Move]:
    """`moves` with the tensors of `format` as the sources of every layer that the checkpoint does not hold in 16 bits.

    Each layer is unpacked by itself. TensorRT-LLM's tensors are cut from all of a module's layers stacked, those of the
    Hugging Face checkpoint are one layer's parts, or the source's own tensors where that is unified already.
    """
    qkv = {move.layer: move.sources for move in moves if move.module.endswith(".attention.qkv")}
    carried: list[Move] = []
    if format.unpack != "gptq":
        check_transposed(moves, forms, str(format))
    for move in moves:
        if move.kv_cache is not None:
            carried.append(_kv_scales(move, qkv[move.layer]))
        elif move.input is not None and not _is_plain(move.sources[0], forms):
            carried.append(_carried_move(move, format, forms))
        else:
            unfolded = tuple(dataclasses.replace(output, fold=None) for output in move.outputs)
            carried.append(dataclasses.replace(move, outputs=unfolded))
    return carried


def check_transposed(moves: Sequence[Move], forms: Forms, what: str) -> None:
    """Raises InputError naming quantized layers that transformers stores transposed."""
    transposed = {
        name.removesuffix(".weight").rpartition(".")[2]: None
        for move in moves
        if move.transform == "transpose"
        for name in move.sources
        if not _is_plain(name, forms)
    }
    if transposed:
        raise InputError(
            f"{what}: {', '.join(transposed)} are Conv1D layers, of which only GPTQ says how they lie",
            hint="name the model it was made from",
        )


def _kv_scales(move: Move, qkv: Sequence[str]) -> Move:
    """The scales of a layer's KV cache, which lie beside the projections that make keys and values."""
    keys, values = (name.removesuffix(".weight") for name in (qkv[-2:] if len(qkv) == 3 else (qkv[0], qkv[0])))
    return dataclasses.replace(
        move,
        sources=(f"{keys}.k_scale", f"{values}.v_scale"),
        source_shapes=((1,), (1,)),
        source_dtypes=(_FLOATS, _FLOATS),
    )


def _carried_move(move: Move, format: SourceFormat, forms: Forms) -> Move:
    layers = [name.removesuffix(".weight") for name in move.sources]
    sources, shapes, dtypes = [], [], []
    for layer, shape in zip(layers, move.source_shapes, strict=True):
        out_features, in_features = reversed(shape) if move.transform == "transpose" else shape
        for tensor in format.tensors:
            name = f"{layer}.{tensor.name}"
            if not tensor.is_optional or name in forms:
                sources.append(name)
                shapes.append(tensor.shape(out_features, in_features, format.target.group_size))
                dtypes.append(tensor.dtypes)
    outputs: list[Output] = []
    for output in move.outputs:
        if output.rank is not None:
            outputs.append(output)
        elif not format.is_unified:
            outputs.append(_part_of_layer(output, layers))
        elif output.name.endswith(".weight"):
            layer = output.name.removesuffix("weight")
            outputs += [
                _as_it_is(output, index, name, *forms.get(name, (dtypes[index][0], shapes[index])))
                for index, name in enumerate(sources)
                if name.startswith(layer)
            ]
    return dataclasses.replace(
        move,
        sources=tuple(sources),
        source_shapes=tuple(shapes),
        source_dtypes=tuple(dtypes),
        outputs=tuple(outputs),
    )


def _part_of_layer(output: Output, layers: Sequence[str]) -> Output:
    """`output` cut from its own layer's part instead of from all layers of the module stacked."""
    index = next(index for index, layer in enumerate(layers) if output.name.startswith(f"{layer}."))
    num_rows = sum(stop - start for start, stop in output.rows)
    return dataclasses.replace(output, part=f"{output.part}[{index}]", rows=((0, num_rows),))


def _as_it_is(output: Output, index: int, name: str, dtype: str, shape: tuple[int, ...]) -> Output:
    return dataclasses.replace(output, name=name, dtype=dtype, shape=shape, rows=(), source=index, fold=None)
