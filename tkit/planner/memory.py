"""Bytes: weights as stored and as resident, KV cache, activations, overhead; per GPU, for the fullest rank.

    weights     every module's tensors, split by TP, the layers divided over PP stages (the first stages take the extras)
    KV cache    sum over layers of (2 x KV heads per rank x head size) x bytes, at most `window` tokens in a sliding layer,
                rounded up to blocks; MLA keeps kv_lora + qk_rope values, on every rank
    activations max_num_tokens x (residual in and out, q/k/v, MLP halves) x 2 B, and 4-byte logits of every running request
    overhead    CUDA context and libraries, captured graphs, NCCL buffers

Exact: weights and KV. Estimates, rounded up: activations and overhead.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from tkit.planner.precision import DTYPE_BYTES, KV_DTYPES, Precision
from tkit.planner.shapes import Layer, ModelShape, Module, kv_values_per_token_layer, layer_modules, outside_modules
from tkit.specs.hardware import Gpu
from tkit.specs.parallel import Parallel
from tkit.specs.quantization import StoredTensor

TOKENS_PER_BLOCK = 32  # TensorRT-LLM's default; vLLM's is 16
GIB = 2**30
CONTEXT_BYTES = GIB  # CUDA context, cuBLAS and kernel images: 0.5-1.5 GB from engine to engine
GRAPH_BYTES = 8 * GIB // 10  # captured decode graphs: 0.5-1.3 GB
NCCL_BYTES = 35 * GIB // 100  # per rank that takes part in a collective
_PLAIN = (StoredTensor(name="weight", dtype="model", out_axis=(0, 1), in_axis=(1, 1)),)
WEIGHT_KINDS = ("embedding", "attention", "mlp", "experts", "shared expert", "router", "norms", "lm_head")
# what an engine may give to the KV cache: (of what, fraction)
KV_RULES = {
    "tensorrt-llm": ("free after weights and activations", 0.90),
    "vllm": ("total", 0.90),
    "sglang": ("total", 0.88),
}


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """One GPU, the fullest rank. `sum(weights) + activations + overhead + kv_pool + unused == usable`."""

    gpu: str
    num_gpus: int
    usable: int
    weights: dict[str, int]  # kind -> bytes
    weights_by_dtype: dict[str, int]
    activations: int
    overhead: int
    kv_pool: int  # what the engine's rule leaves for the cache
    kv_rule: str
    kv_bytes_per_token: int  # of one sequence, all layers of one rank, as if no window capped it
    kv_bytes_per_sequence: int  # at the asked context, windows and blocks included
    unused: int  # kept free by the rule; negative = does not fit

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())

    @property
    def max_sequences(self) -> int:
        return max(self.kv_pool, 0) // self.kv_bytes_per_sequence if self.kv_bytes_per_sequence else 2**31


def stored_bytes(shape: ModelShape, precision: Precision, parallel: Parallel, *, has_kv_scales: bool = False) -> int:
    """Bytes of all tensors of all rank files, as `tkit build` writes them; with `--kv-cache` also a scale per layer."""
    kv_scales = 4 * shape.num_layers * parallel.tp_size if has_kv_scales else 0
    return kv_scales + sum(
        parallel.tp_size * sum(_module_bytes(module, its_own, parallel, is_stored=True).values())
        for pp_rank in range(parallel.pp_size)
        for module, its_own in _rank_modules(shape, precision, parallel, pp_rank, is_stored=True)
    )


def resident_bytes(
    shape: ModelShape, precision: Precision, parallel: Parallel
) -> tuple[dict[str, int], dict[str, int]]:
    """(by kind, by dtype) of the fullest rank's weights on the GPU."""
    best: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for pp_rank in sorted({0, parallel.pp_size // 2, parallel.pp_size - 1}):
        kinds: dict[str, int] = {}
        dtypes: dict[str, int] = {}
        for module, its_own in _rank_modules(shape, precision, parallel, pp_rank, is_stored=False):
            for dtype, size in _module_bytes(module, its_own, parallel, is_stored=False).items():
                kinds[module.kind] = kinds.get(module.kind, 0) + size
                dtypes[dtype] = dtypes.get(dtype, 0) + size
        if sum(kinds.values()) > sum(best[0].values()):
            best = (kinds, dtypes)
    return {kind: best[0][kind] for kind in WEIGHT_KINDS if kind in best[0]}, best[1]


def kv_bytes_per_token(shape: ModelShape, kv_dtype: str, tp_size: int = 1) -> int:
    """Of all layers on one TP rank, before any window is full."""
    num_layers = sum(layer.has_attention for layer in shape.layers)
    return math.ceil(num_layers * kv_values_per_token_layer(shape, tp_size) * KV_DTYPES[kv_dtype])


def kv_bytes_per_sequence(
    shape: ModelShape, kv_dtype: str, num_tokens: int, parallel: Parallel, block: int = TOKENS_PER_BLOCK
) -> int:
    """One sequence of `num_tokens` on the rank with the most attention layers."""
    return max(
        _kv_of_layers(tuple(shape.layers[i] for i in stage), shape, kv_dtype, num_tokens, parallel.tp_size, block)
        for stage in parallel.stage_layers(shape.num_layers)
    )


def _kv_of_layers(
    layers: tuple[Layer, ...], shape: ModelShape, kv_dtype: str, num_tokens: int, tp_size: int, block: int
) -> int:
    tokens = 0
    for layer in layers:
        if layer.has_attention:
            held = num_tokens if layer.window is None else min(num_tokens, layer.window)
            tokens += -(-held // block) * block
    return math.ceil(tokens * kv_values_per_token_layer(shape, tp_size) * KV_DTYPES[kv_dtype])


def activation_bytes(shape: ModelShape, tp_size: int, max_num_tokens: int, max_batch: int) -> int:
    """The widest layer's inputs and outputs in 16 bits, and 4-byte logits for every running request."""
    inner = max((layer.intermediate_size for layer in shape.layers), default=0)
    if shape.num_experts:
        inner = max(inner, shape.experts_per_token * shape.expert_size + shape.shared_expert_size)
    q = shape.num_heads * shape.head_size
    per_token = 2 * shape.hidden_size + (q + kv_values_per_token_layer(shape) + 2 * inner) // tp_size
    return 2 * max_num_tokens * per_token + 4 * max_batch * shape.vocab_size


def overhead_bytes(parallel: Parallel) -> int:
    return CONTEXT_BYTES + GRAPH_BYTES + (NCCL_BYTES if parallel.world_size > 1 else 0)


def ledger(
    shape: ModelShape,
    precision: Precision,
    kv_dtype: str,
    gpu: Gpu,
    parallel: Parallel,
    *,
    context: int,
    engine: str = "tensorrt-llm",
    max_num_tokens: int = 8192,
    max_batch: int = 256,
    reserved_bytes: int = 0,
) -> Ledger:
    """The card, line by line. Nothing is refused here: a plan that does not fit shows by how much. `reserved_bytes` is what
    the engine was seen to hold besides."""
    kinds, dtypes = _resident(shape, precision, parallel)
    weights = sum(kinds.values())
    activations = activation_bytes(shape, parallel.tp_size, max_num_tokens, max_batch)
    overhead = overhead_bytes(parallel) + reserved_bytes
    rest = gpu.usable_bytes - weights - activations - overhead
    rule, fraction = KV_RULES[engine]
    if rule == "total":
        pool = min(int(fraction * gpu.usable_bytes) - weights - activations - overhead, rest)
    else:
        pool = int(fraction * rest)
    pool = max(pool, 0)
    stages = parallel.stage_layers(shape.num_layers)
    most = max(sum(shape.layers[i].has_attention for i in stage) for stage in stages)
    values = kv_values_per_token_layer(shape, parallel.tp_size)
    return Ledger(
        gpu=gpu.name,
        num_gpus=parallel.world_size,
        usable=gpu.usable_bytes,
        weights=kinds,
        weights_by_dtype=dtypes,
        activations=activations,
        overhead=overhead,
        kv_pool=pool,
        kv_rule=f"{fraction:.0%} of {'the card' if rule == 'total' else 'what is ' + rule}",
        kv_bytes_per_token=math.ceil(most * values * KV_DTYPES[kv_dtype]),
        kv_bytes_per_sequence=kv_bytes_per_sequence(shape, kv_dtype, context, parallel),
        unused=rest - pool,
    )


@functools.lru_cache(maxsize=4096)
def _resident(shape: ModelShape, precision: Precision, parallel: Parallel) -> tuple[dict[str, int], dict[str, int]]:
    return resident_bytes(shape, precision, parallel)


def _rank_modules(
    shape: ModelShape, precision: Precision, parallel: Parallel, pp_rank: int, *, is_stored: bool
) -> list[tuple[Module, Precision]]:
    """Of one pipeline stage, each with its format. lm_head shares the embedding's memory when it is tied, lies on the same
    stage and is split the same way; on disk it is always written."""
    precision = _fitted(shape, precision, parallel)
    default, its_own = replace(precision, modules=()), dict(precision.modules)
    first, last = outside_modules(shape)
    is_shared = shape.is_tied and parallel.pp_size == 1 and (parallel.tp_size == 1 or shape.traits.shards_embedding)
    modules = [(module, default) for module in first] if pp_rank == 0 else []
    known: dict[Layer, list[Module]] = {}
    for index in parallel.stage_layers(shape.num_layers)[pp_rank]:
        layer = shape.layers[index]
        if layer not in known:
            known[layer] = layer_modules(shape, layer)
        modules += [
            (module, its_own.get(f"layers.{index}.{module.name}", default) if its_own else default)
            for module in known[layer]
        ]
    if pp_rank == parallel.pp_size - 1:
        modules += [(module, default) for module in (last if is_stored or not is_shared else last[:1])]
    return modules


@functools.lru_cache(maxsize=4096)
def _fitted(shape: ModelShape, precision: Precision, parallel: Parallel) -> Precision:
    """As `tkit build` does: all layers of a format in smaller groups where a rank's share of one does not divide."""
    default, its_own = replace(precision, modules=()), dict(precision.modules)
    if all(own.smaller_tensors is None for own in (default, *its_own.values())):
        return precision
    smaller: dict[Precision, Precision] = {}
    for own in {default, *its_own.values()}:
        modules = {
            module
            for index, layer in enumerate(shape.layers)
            for module in layer_modules(shape, layer)
            if module.is_quantized and its_own.get(f"layers.{index}.{module.name}", default) == own
        }
        halved = replace(
            own, tensors=own.smaller_tensors or (), size_multiple=own.size_multiple // 2, smaller_tensors=None
        )
        is_whole = all(_divides(module, own, parallel) for module in modules)
        if own.smaller_tensors and not is_whole and all(_divides(module, halved, parallel) for module in modules):
            smaller[own] = halved
    modules_smaller = tuple((name, smaller.get(own, own)) for name, own in precision.modules)
    return replace(smaller.get(default, default), modules=modules_smaller)


def _divides(module: Module, precision: Precision, parallel: Parallel) -> bool:
    """The kernels' rule on both sides of a layer. KV heads count as often as they are repeated; experts are not padded."""
    has_experts = module.kind == "experts"
    tp = parallel.moe_tp_size if has_experts else parallel.tp_size
    out = sum(
        max(block.features // block.unit, parallel.tp_size) * block.unit if block.axis == "kv_heads" else block.features
        for block in module.out
    )
    sides = [(out, module.out[0].axis)] + ([(module.in_.features, module.in_.axis)] if module.in_ else [])
    return all(
        size % (precision.size_multiple * (tp if axis == "expert" or not has_experts else 1)) == 0
        for size, axis in sides
    )


@functools.lru_cache(maxsize=65536)
def _module_bytes(module: Module, precision: Precision, parallel: Parallel, *, is_stored: bool) -> dict[str, int]:
    """{dtype: bytes} of one rank's share; every rank's is the same size."""
    is_quantized = module.is_quantized and not (precision.only_experts and module.kind != "experts")
    tensors = (precision.resident if not is_stored else None) or precision.tensors
    tensors = tensors if is_quantized else _PLAIN
    out = sum(block.per_rank(parallel.tp_size, parallel.moe_tp_size) for block in module.out)
    in_ = module.in_.per_rank(parallel.tp_size, parallel.moe_tp_size) if module.in_ else 1
    sizes: dict[str, int] = {}
    for tensor in tensors:
        dtype = module.dtype if tensor.dtype == "model" else tensor.dtype
        is_each = tensor.out_axis is not None or tensor.is_per_expert
        per_expert = module.count // parallel.moe_ep_size if is_each else 1
        size = math.prod(tensor.shape(out, in_)) * max(per_expert, 1) * DTYPE_BYTES[dtype]
        sizes[dtype] = sizes.get(dtype, 0) + math.ceil(size)
    if module.has_bias:
        dtype = "model"
        sizes[dtype] = sizes.get(dtype, 0) + 2 * out * max(module.count // parallel.moe_ep_size, 1)
    return sizes
