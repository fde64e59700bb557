"""Turns the architecture table into moves: for every tensor of every rank file, the rows and columns of its sources.

Pure names and shapes. A weight is planned in *source rows*: all sources of a module stacked as they come. Splitting over
ranks, repeating KV heads, swapping fused halves and undoing interleaved q/k/v are then nothing but lists of row ranges.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tkit.architectures.formats import module_formats
from tkit.architectures.table import ARCHITECTURES, SHARDED_AXES, Architecture, Module, Source
from tkit.errors import InputError
from tkit.specs.model import ModelSpec
from tkit.specs.moves import Move, Output, Range
from tkit.specs.parallel import Parallel
from tkit.specs.precision import UNQUANTIZED, Precision
from tkit.specs.quantization import QUANT_FORMATS, QuantFormat, StoredTensor, smaller_groups

_BIAS = (StoredTensor(name="bias", dtype="model", out_axis=(0, 1)),)


def plan_moves(spec: ModelSpec, precision: Precision, parallel: Parallel) -> list[Move]:
    """Every move, in the order in which rank files store their tensors: embedding, layers, final norm, lm_head.

    Raises InputError with the whole list of divisibility rules that `parallel` and the formats break.
    """
    row = ARCHITECTURES[spec.architecture]
    formats = module_formats(spec, precision)
    problems = _rule_violations(row, spec, formats, parallel)
    if problems:
        names = " and ".join(sorted({format.name for format in formats.values()}))
        raise InputError(
            f"{spec.architecture} cannot be split over tp {parallel.tp_size}, pp {parallel.pp_size} as {names}",
            problems=problems,
            hint="choose a smaller --tp or --pp, or another --quant",
        )
    planner = _Planner(row, spec, formats, parallel, precision.kv_cache)
    moves = [move for module in row.first for move in planner.outside(module, pp_rank=0)]
    for pp_rank, layers in enumerate(parallel.stage_layers(spec.num_layers)):
        for local_layer, layer in enumerate(layers):
            moves += planner.layer(layer, local_layer, pp_rank)
    last = parallel.pp_size - 1
    moves += planner.outside(row.final_norm, last)
    # lm_head stands on its own even when tied: TensorRT-LLM re-shares it where that is possible
    lm_head = row.lm_head
    if spec.tie_word_embeddings:
        tied = Source(row.first[0].sources[0].name, row.lm_head.sources[0].axes)
        lm_head = Module(row.lm_head.name, (tied,), row.lm_head.in_)
    moves += planner.outside(lm_head, last)
    return moves


def fitted_precision(spec: ModelSpec, precision: Precision, parallel: Parallel) -> tuple[Precision, list[str]]:
    """`precision` with groups of 64 where a rank's share of some layer does not divide into its groups of 128, and a line
    for each format that this happens to. All layers of a format change together: config.json has one group size."""
    row = ARCHITECTURES[spec.architecture]
    formats = module_formats(spec, precision)
    smaller: dict[str, QuantFormat] = {}
    notes = []
    for format in {format.name: format for format in formats.values()}.values():
        its_own = {name: its for name, its in formats.items() if its.name == format.name}
        violations = list(_module_violations(row, spec, its_own, parallel))
        candidate = smaller_groups(format)
        if violations and candidate is not None:
            changed = dict.fromkeys(its_own, candidate)
            if not list(_module_violations(row, spec, changed, parallel)):
                smaller[format.name] = candidate
                notes.append(f"{format.name} in groups of {candidate.group_size}: {violations[0]}")
    changed_overrides = tuple((pattern, smaller.get(its.name, its)) for pattern, its in precision.overrides)
    default = smaller.get(precision.default.name, precision.default)
    return dataclasses.replace(precision, default=default, overrides=changed_overrides), notes


def axis_size(axis: str, spec: ModelSpec) -> int:
    """The unsharded number of features along a named axis."""
    return {
        "hidden": spec.hidden_size,
        "heads": spec.num_heads * spec.head_size,
        "kv_heads": spec.num_kv_heads * spec.head_size,
        "head": spec.head_size,
        "mlp": spec.intermediate_size,
        "expert": spec.expert_size,
        "shared": spec.shared_expert_size,
        "experts": spec.num_experts,
        "one": 1,
        "positions": spec.max_position_embeddings,
        "vocab": spec.vocab_size,
        "vocab_tp": spec.vocab_size,
    }[axis]


def shard_range(axis: str, spec: ModelSpec, parallel: Parallel, tp_rank: int) -> Range:
    """The features of `axis` that `tp_rank` holds."""
    size = axis_size(axis, spec)
    if axis not in SHARDED_AXES:
        return (0, size)
    if axis == "kv_heads":
        heads_per_rank = max(spec.num_kv_heads // parallel.tp_size, 1)
        first_head = tp_rank * spec.num_kv_heads // parallel.tp_size  # ranks that share a head get the same one
        return (first_head * spec.head_size, (first_head + heads_per_rank) * spec.head_size)
    num_shards, shard = parallel.tp_size, tp_rank
    if axis == "expert":
        num_shards, shard = parallel.moe_tp_size, tp_rank // parallel.moe_ep_size
    width = -(-size // num_shards)  # only the vocabulary does not divide: the last rank is padded
    return (shard * width, (shard + 1) * width)


def _rule_violations(
    row: Architecture, spec: ModelSpec, formats: Mapping[str, QuantFormat], parallel: Parallel
) -> list[str]:
    tp, problems = parallel.tp_size, []
    if spec.num_heads % tp:
        problems.append(f"num_attention_heads {spec.num_heads} is not a multiple of tp {tp}")
    if spec.num_kv_heads % tp and tp % spec.num_kv_heads:
        problems.append(f"num_key_value_heads {spec.num_kv_heads} and tp {tp}: neither is a multiple of the other")
    modules = [module for module in row.layer if any(module.when(spec, layer) for layer in range(spec.num_layers))]
    used = {axis for module in modules for source in module.sources for axis in source.axes}
    for axis, name in (("mlp", "intermediate_size"), ("shared", "shared_expert_intermediate_size")):
        if axis in used and axis_size(axis, spec) % tp:
            problems.append(f"{name} {axis_size(axis, spec)} is not a multiple of tp {tp}")
    if "expert" in used and spec.expert_size % parallel.moe_tp_size:
        problems.append(f"moe_intermediate_size {spec.expert_size} is not a multiple of MoE tp {parallel.moe_tp_size}")
    if spec.num_experts % parallel.moe_ep_size:
        problems.append(f"num_experts {spec.num_experts} is not a multiple of moe_ep_size {parallel.moe_ep_size}")
    if parallel.moe_ep_size > 1 and not spec.num_experts:
        problems.append(f"moe_ep_size is {parallel.moe_ep_size}, but the model has no experts")
    if row.shards_embedding and spec.vocab_size % tp:
        problems.append(
            f"vocab_size {spec.vocab_size} is not a multiple of tp {tp}, and {row.trtllm} splits its embedding"
        )
    if parallel.pp_size > spec.num_layers:
        problems.append(f"pp {parallel.pp_size} exceeds num_hidden_layers {spec.num_layers}")
    if parallel.pp_size > 1 and not row.has_pipeline:
        problems.append(f"pp is {parallel.pp_size}, but {row.trtllm} has no pipeline parallelism in TensorRT-LLM")
    return problems + list(dict.fromkeys(_module_violations(row, spec, formats, parallel)))


def count_params(moves: Iterable[Move]) -> int:
    """Distinct source values: a tied lm_head counts once."""
    shapes = {name: shape for move in moves for name, shape in zip(move.sources, move.source_shapes, strict=True)}
    return sum(map(math.prod, shapes.values()))


def has_fused_gate(spec: ModelSpec) -> bool:
    """trtllm-build makes one layer of fc and gate (`fuse_gate_mlp`), but not behind Gemma's gelu_pytorch_tanh."""
    return spec.hidden_act in ("silu", "gelu")


def fused_modules(moves: Sequence[Move], is_gate_fused: bool) -> list[list[Move]]:
    """`moves` in the groups that run as one layer: fc and gate together where `is_gate_fused`, all others alone."""
    groups: dict[tuple[int | None, str | None], list[Move]] = {}
    for move in moves:
        groups.setdefault((move.layer, move.input if is_gate_fused else move.module), []).append(move)
    return list(groups.values())


def _module_violations(
    row: Architecture, spec: ModelSpec, formats: Mapping[str, QuantFormat], parallel: Parallel
) -> Iterator[str]:
    """What the kernels of a module's format do not have; a module of many layers gives the same line for each."""
    for layer in range(spec.num_layers):
        for module in (module for module in row.layer if module.is_quantized and module.when(spec, layer)):
            format = formats.get(f"transformer.layers.{layer}.{module.name}", UNQUANTIZED)
            if module.has_experts and format.no_experts is not None:
                able = ", ".join(name for name, other in QUANT_FORMATS.items() if other.no_experts is None)
                yield f"{format.name} has no experts: {format.no_experts}; give them one of {able}"
            yield from _size_violations(module, spec, format, parallel)


def _size_violations(module: Module, spec: ModelSpec, quant: QuantFormat, parallel: Parallel) -> Iterator[str]:
    """The kernels' rule on both sides of a quantized layer."""
    if quant.size_multiple == 1 or module.in_ is None:
        return
    tp = parallel.moe_tp_size if module.has_experts else parallel.tp_size
    out = sum(
        # the size TensorRT-LLM gives the layer before it splits it: repeated KV heads count
        max(spec.num_kv_heads, parallel.tp_size) * spec.head_size if axis == "kv_heads" else axis_size(axis, spec)
        for source in module.sources
        for axis in source.axes
    )
    for side, size, axis in (("out", out, module.sources[0].axes[0]), ("in", axis_size(module.in_, spec), module.in_)):
        shards = tp if axis == "expert" or not module.has_experts else 1  # experts are not padded like other layers
        if size % (quant.size_multiple * shards):
            yield (
                f"{module.name}: {side} size {size} is not a multiple of {quant.size_multiple * shards}"
                f" ({quant.size_multiple} x tp {shards}), as {quant.name} kernels need"
            )


class _Planner:
    """What stays the same over all modules of one plan."""

    def __init__(
        self,
        row: Architecture,
        spec: ModelSpec,
        formats: Mapping[str, QuantFormat],
        parallel: Parallel,
        kv_cache: str,
    ):
        self.row, self.spec, self.formats, self.parallel, self.kv_cache = row, spec, formats, parallel, kv_cache

    def outside(self, module: Module, pp_rank: int) -> list[Move]:
        """The moves of a module before or after the layers."""
        return list(self._moves(module, pp_rank, None, module.name, module.name, ""))

    def layer(self, layer: int, local_layer: int, pp_rank: int) -> list[Move]:
        prefix = self.row.layer_prefix.format(layer=layer)
        moves: list[Move] = []
        for module in self.row.layer:
            if module.when(self.spec, layer):
                name = f"transformer.layers.{layer}.{module.name}"
                stored_name = f"transformer.layers.{local_layer}.{module.name}"
                moves += self._moves(module, pp_rank, layer, name, stored_name, prefix)
        if self.kv_cache != "auto":
            moves.append(self._kv_cache(layer, local_layer, pp_rank))
        return moves

    def _kv_cache(self, layer: int, local_layer: int, pp_rank: int) -> Move:
        """The scale of a layer's KV cache, the same on every rank of its stage."""
        ranks = [self.parallel.rank(pp_rank, tp_rank) for tp_rank in range(self.parallel.tp_size)]
        return Move(
            module=f"transformer.layers.{layer}.attention.kv_cache",
            layer=layer,
            sources=(),
            source_shapes=(),
            source_rows=(),
            outputs=tuple(
                Output(
                    rank=rank,
                    file=f"rank{rank}.safetensors",
                    name=f"transformer.layers.{local_layer}.attention.kv_cache_scaling_factor",
                    part="kv_cache_scaling_factor",
                    dtype="F32",
                    shape=(1,),
                    rows=((0, 1),),
                )
                for rank in ranks
            ),
            kv_cache=self.kv_cache,
        )

    def _moves(
        self, module: Module, pp_rank: int, layer: int | None, name: str, stored_name: str, prefix: str
    ) -> Iterator[Move]:
        sources = self._sources(module)
        rows = [sum(axis_size(axis, self.spec) for axis in source.axes) for source in sources]
        columns = () if module.in_ is None else (axis_size(module.in_, self.spec),)
        kernel = self.formats.get(name, UNQUANTIZED)
        format = None if kernel.is_stored_plain else kernel
        yield Move(
            module=name,
            layer=layer,
            sources=tuple(f"{prefix}{source.name}.weight" for source in sources),
            source_shapes=tuple(
                (*columns, count) if module.transform == "transpose" else (count, *columns) for count in rows
            ),
            source_rows=tuple(rows),
            outputs=self._outputs(module, stored_name, kernel.tensors, pp_rank),
            transform=module.transform,
            format=format,
            build_format=kernel if format is None and kernel is not UNQUANTIZED else None,
            num_experts=self.spec.num_experts if module.has_experts else 0,
            input=module.input,
        )
        if module.bias(self.spec):
            yield Move(
                module=f"{name}.bias",
                layer=layer,
                sources=tuple(f"{prefix}{source.name}.bias" for source in sources),
                source_shapes=tuple((count,) for count in rows),
                source_rows=tuple(rows),
                outputs=self._outputs(module, stored_name, _BIAS, pp_rank),
            )

    def _sources(self, module: Module) -> list[Source]:
        """The module's sources; those of experts once per expert."""
        if not module.has_experts:
            return list(module.sources)
        return [
            Source(source.name.format(expert=expert), source.axes)
            for expert in range(self.spec.num_experts)
            for source in module.sources
        ]

    def _outputs(
        self, module: Module, stored_name: str, tensors: tuple[StoredTensor, ...], pp_rank: int
    ) -> tuple[Output, ...]:
        return tuple(
            self._output(module, stored_name, tensor, pp_rank, tp_rank)
            for tensor in tensors
            for tp_rank in range(self.parallel.tp_size)
        )

    def _output(self, module: Module, stored_name: str, tensor: StoredTensor, pp_rank: int, tp_rank: int) -> Output:
        """Where the axes of `tensor` lie decides which of its two dimensions the rank's out and in features cut."""
        cuts: dict[int, tuple[Range, ...]] = {}
        leading: tuple[int, ...] = ()
        if tensor.out_axis is not None:
            position, unit = tensor.out_axis
            ranges = self._row_ranges(module, tp_rank)
            cuts[position] = _joined([(start // unit, stop // unit) for start, stop in ranges])
            if module.has_experts:
                leading = (self.spec.num_experts // self.parallel.moe_ep_size,)
        if tensor.in_axis is not None and module.in_ is not None:
            position, unit = tensor.in_axis
            start, stop = shard_range(module.in_, self.spec, self.parallel, tp_rank)
            cuts[position] = ((start // unit, stop // unit),)
        rank = self.parallel.rank(pp_rank, tp_rank)
        rows = cuts.get(0, ((0, 1),))
        if tensor.is_per_expert and module.has_experts:
            experts = self._experts(module, tp_rank)
            rows, leading = ((experts.start, experts.stop),), (len(experts),)
        columns = cuts[1][0] if 1 in cuts else None
        num_rows = sum(stop - start for start, stop in rows)
        cut = (num_rows // math.prod(leading), *(() if columns is None else (columns[1] - columns[0],)))
        return Output(
            rank=rank,
            file=f"rank{rank}.safetensors",
            name=f"{stored_name}.{tensor.name}",
            part=tensor.name,
            dtype="F32" if module.transform == "float32" else tensor.dtype,
            shape=(*leading, *(reversed(cut) if tensor.is_transposed else cut)),
            rows=rows,
            columns=columns,
            is_transposed=tensor.is_transposed,
            is_zero=tensor.name == "bias" and module.is_bias_on_first_rank_only and tp_rank > 0,
        )

    def _row_ranges(self, module: Module, tp_rank: int) -> list[Range]:
        """The source rows that `tp_rank` stores, in the order in which it stores them."""
        if module.is_interleaved:
            return self._interleaved_ranges(tp_rank)
        axes = [axis for source in module.sources for axis in source.axes]
        starts = [sum(axis_size(axis, self.spec) for axis in axes[:index]) for index in range(len(axes))]
        per_expert = sum(axis_size(axis, self.spec) for axis in axes)
        ranges = []
        for expert in self._experts(module, tp_rank):
            for index in module.order or range(len(axes)):
                start, stop = shard_range(self._sharding(axes[index]), self.spec, self.parallel, tp_rank)
                offset = expert * per_expert + starts[index]
                ranges.append((offset + start, offset + stop))
        return ranges

    def _sharding(self, axis: str) -> str:
        return "vocab_tp" if axis == "vocab" and (self.row.shards_embedding or self.parallel.shards_embedding) else axis

    def _experts(self, module: Module, tp_rank: int) -> range:
        """The experts of this rank; one pseudo-expert for modules without."""
        if not module.has_experts:
            return range(1)
        per_rank = self.spec.num_experts // self.parallel.moe_ep_size
        ep_rank = tp_rank % self.parallel.moe_ep_size
        return range(ep_rank * per_rank, (ep_rank + 1) * per_rank)

    def _interleaved_ranges(self, tp_rank: int) -> list[Range]:
        """From rows grouped per KV head (its queries, its key, its value) to all queries, all keys, all values."""
        size, per_group = self.spec.head_size, self.spec.num_heads // self.spec.num_kv_heads
        group_rows = (per_group + 2) * size

        def heads(axis: str) -> range:
            start, stop = shard_range(axis, self.spec, self.parallel, tp_rank)
            return range(start // size, stop // size)

        starts = [head // per_group * group_rows + head % per_group * size for head in heads("heads")]
        starts += [head * group_rows + per_group * size for head in heads("kv_heads")]
        starts += [head * group_rows + (per_group + 1) * size for head in heads("kv_heads")]
        return [(start, start + size) for start in starts]


def _joined(ranges: list[Range]) -> tuple[Range, ...]:
    """Neighbouring ranges become one, so that an unsplit tensor is a single copy."""
    joined = [ranges[0]]
    for start, stop in ranges[1:]:
        if start == joined[-1][1]:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)
