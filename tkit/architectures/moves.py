"""The plan of a conversion: for every tensor of every rank file, which rows and columns of which source it holds.

Pure names and shapes. `checkpoints.convert` carries the moves out; `checkpoints.merge` carries them out backwards.
"""

from __future__ import annotations

from collections.abc import Iterator

from tkit.architectures.table import ARCHITECTURES, SHARDED_AXES, Module
from tkit.errors import InputError
from tkit.specs.model import ModelSpec
from tkit.specs.moves import Move, Output, Range
from tkit.specs.parallel import Parallel
from tkit.specs.quantization import QUANT_FORMATS, QuantFormat, StoredTensor

_PLAIN = QUANT_FORMATS["none"].tensors


def plan_moves(spec: ModelSpec, quant: QuantFormat, parallel: Parallel) -> list[Move]:
    """Every move, in the order in which rank files store their tensors: embedding, layers, final norm, lm_head.

    Raises InputError with the whole list of divisibility rules that `parallel` and `quant` break.
    """
    row = ARCHITECTURES[spec.architecture]
    problems = _rule_violations(spec, quant, parallel)
    if problems:
        raise InputError(
            f"{spec.architecture} cannot be split over tp {parallel.tp_size}, pp {parallel.pp_size} as {quant.name}",
            problems=problems,
            hint="choose a smaller --tp or another --quant",
        )
    first_stage, last_stage = 0, parallel.pp_size - 1
    moves = list(_module_moves(row.embedding, spec, None, parallel, first_stage))
    for pp_rank, layers in enumerate(parallel.stage_layers(spec.num_layers)):
        for local_layer, layer in enumerate(layers):
            for module in row.layer:
                moves += _module_moves(
                    module, spec, quant, parallel, pp_rank, layer, local_layer, row.layer_prefix.format(layer=layer)
                )
    moves += _module_moves(row.final_norm, spec, None, parallel, last_stage)
    # lm_head stands on its own even when tied: TensorRT-LLM re-shares it where that is possible
    lm_head = Module(row.lm_head.name, row.embedding.sources, row.lm_head.out, row.lm_head.in_)
    moves += _module_moves(lm_head if spec.tie_word_embeddings else row.lm_head, spec, None, parallel, last_stage)
    return moves


def axis_size(axis: str, spec: ModelSpec) -> int:
    """The unsharded number of features along a named axis."""
    return {
        "hidden": spec.hidden_size,
        "heads": spec.num_heads * spec.head_size,
        "kv_heads": spec.num_kv_heads * spec.head_size,
        "mlp": spec.intermediate_size,
        "vocab": spec.vocab_size,
        "vocab_tp": spec.vocab_size,
    }[axis]


def shard_range(axis: str, spec: ModelSpec, tp_size: int, tp_rank: int) -> Range:
    """The features of `axis` that `tp_rank` holds."""
    size = axis_size(axis, spec)
    if axis not in SHARDED_AXES:
        return (0, size)
    if axis == "kv_heads":
        heads_per_rank = max(spec.num_kv_heads // tp_size, 1)
        first_head = tp_rank * spec.num_kv_heads // tp_size  # ranks that share a head get the same one
        return (first_head * spec.head_size, (first_head + heads_per_rank) * spec.head_size)
    width = -(-size // tp_size)  # only the vocabulary does not divide: the last rank is padded
    return (tp_rank * width, (tp_rank + 1) * width)


def _rule_violations(spec: ModelSpec, quant: QuantFormat, parallel: Parallel) -> list[str]:
    tp, problems = parallel.tp_size, []
    if spec.num_heads % tp:
        problems.append(f"num_attention_heads {spec.num_heads} is not a multiple of tp {tp}")
    if spec.num_kv_heads % tp and tp % spec.num_kv_heads:
        problems.append(f"num_key_value_heads {spec.num_kv_heads} and tp {tp}: neither is a multiple of the other")
    if spec.intermediate_size % tp:
        problems.append(f"intermediate_size {spec.intermediate_size} is not a multiple of tp {tp}")
    if parallel.pp_size > spec.num_layers:
        problems.append(f"pp {parallel.pp_size} exceeds num_hidden_layers {spec.num_layers}")
    if quant.size_multiple > 1:
        multiple = quant.size_multiple * tp
        for module in ARCHITECTURES[spec.architecture].layer:
            if not module.is_quantized or module.in_ is None:
                continue
            sizes = {"out": sum(_module_size(axis, spec, tp) for axis in module.out), "in": axis_size(module.in_, spec)}
            problems += [
                f"{module.name}: {side} size {size} is not a multiple of {multiple}"
                f" ({quant.size_multiple} x tp {tp}), as {quant.name} kernels need"
                for side, size in sizes.items()
                if size % multiple
            ]
    return problems


def _module_size(axis: str, spec: ModelSpec, tp_size: int) -> int:
    """The size TensorRT-LLM gives a layer's axis before it splits it: repeated KV heads count."""
    if axis == "kv_heads":
        return max(spec.num_kv_heads, tp_size) * spec.head_size
    return axis_size(axis, spec)


def _module_moves(
    module: Module,
    spec: ModelSpec,
    quant: QuantFormat | None,
    parallel: Parallel,
    pp_rank: int,
    layer: int | None = None,
    local_layer: int | None = None,
    prefix: str = "",
) -> Iterator[Move]:
    name = module.name if layer is None else f"transformer.layers.{layer}.{module.name}"
    stored_name = module.name if layer is None else f"transformer.layers.{local_layer}.{module.name}"
    out_sizes = [axis_size(axis, spec) for axis in module.out]
    in_size = None if module.in_ is None else axis_size(module.in_, spec)
    is_quantized = quant is not None and module.is_quantized and not quant.is_stored_plain
    tensors = quant.tensors if quant is not None and is_quantized else _PLAIN
    outputs = [
        _output(tensor, stored_name, module, spec, parallel, pp_rank, tp_rank)
        for tensor in tensors
        for tp_rank in range(parallel.tp_size)
    ]
    yield Move(
        module=name,
        layer=layer,
        sources=tuple(f"{prefix}{source}.weight" for source in module.sources),
        source_shapes=tuple((size,) if in_size is None else (size, in_size) for size in out_sizes),
        outputs=tuple(outputs),
        format=quant if is_quantized else None,
        input=module.input,
    )
    if module.has_bias(spec):
        bias = StoredTensor(name="bias", dtype="model", out_axis=(0, 1))
        yield Move(
            module=f"{name}.bias",
            layer=layer,
            sources=tuple(f"{prefix}{source}.bias" for source in module.sources),
            source_shapes=tuple((size,) for size in out_sizes),
            outputs=tuple(
                _output(bias, stored_name, module, spec, parallel, pp_rank, tp_rank)
                for tp_rank in range(parallel.tp_size)
            ),
        )


def _output(
    tensor: StoredTensor,
    stored_name: str,
    module: Module,
    spec: ModelSpec,
    parallel: Parallel,
    pp_rank: int,
    tp_rank: int,
) -> Output:
    """Where the axes of `tensor` lie decides which of its two dimensions the rank's out and in features cut."""
    out_ranges, offset = [], 0
    for axis in module.out:
        start, stop = shard_range(axis, spec, parallel.tp_size, tp_rank)
        out_ranges.append((offset + start, offset + stop))
        offset += axis_size(axis, spec)
    cuts: dict[int, tuple[Range, ...]] = {}
    if tensor.out_axis is not None:
        position, unit = tensor.out_axis
        cuts[position] = _joined([(start // unit, stop // unit) for start, stop in out_ranges])
    if tensor.in_axis is not None and module.in_ is not None:
        position, unit = tensor.in_axis
        start, stop = shard_range(module.in_, spec, parallel.tp_size, tp_rank)
        cuts[position] = ((start // unit, stop // unit),)
    rows = cuts.get(0, ((0, 1),))
    columns = cuts[1][0] if 1 in cuts else None
    num_rows = sum(stop - start for start, stop in rows)
    return Output(
        rank=parallel.rank(pp_rank, tp_rank),
        name=f"{stored_name}.{tensor.name}",
        part=tensor.name,
        dtype=tensor.dtype,
        shape=(num_rows,) if columns is None else (num_rows, columns[1] - columns[0]),
        rows=rows,
        columns=columns,
    )


def _joined(ranges: list[Range]) -> tuple[Range, ...]:
    """Neighbouring ranges become one, so that an unsplit tensor is a single copy."""
    joined = [ranges[0]]
    for start, stop in ranges[1:]:
        if start == joined[-1][1]:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)
