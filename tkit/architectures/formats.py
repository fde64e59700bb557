"""Which module has which format, and how TensorRT-LLM's config files say so.

One format is `quant_algo`; with unquantized exceptions, `exclude_modules` names them; several formats are MIXED_PRECISION,
and `quant_cfg.json` lists every quantized module. TensorRT-LLM matches these names on every pipeline stage, whose layers
begin at 0 each: what differs from layer to layer must be the same on all stages.

Source: TensorRT-LLM 1.0-1.2 `models/modeling_utils.py` (`QuantConfig`, `LayerQuantConfig`), `quantization/quantize.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

from tkit.architectures.table import ARCHITECTURES, Module
from tkit.errors import InputError
from tkit.specs.model import ModelSpec
from tkit.specs.parallel import Parallel
from tkit.specs.precision import KV_CACHES, UNQUANTIZED, Precision, matches
from tkit.specs.quantization import INT8_CODES, QUANT_FORMATS, QuantFormat, int4_format

MIXED = "MIXED_PRECISION"
# a list of one's own replaces TensorRT-LLM's defaults, so it repeats them
DEFAULT_EXCLUDED = (
    "*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding", "*shared_expert_gate",
    "*fused_a",
)  # fmt: skip
# W8A16 is quantized tensor by tensor, and its list is matched against their names as well
DEFAULT_EXCLUDED_TENSORS = ("*shared_expert_gate.weight",)
DEFAULT_EXCLUDED_ROWWISE = ("*ln_f", "*ln_embed")


def module_formats(spec: ModelSpec, precision: Precision) -> dict[str, QuantFormat]:
    """{module, with its global layer: format} of every layer that has one.

    Raises InputError listing every pattern that matches nothing, matches a part of a fused layer, or tears apart modules
    that the kernels fuse.
    """
    formats: dict[str, QuantFormat] = {}
    torn: dict[str, list[int]] = {}  # what is wrong: in which layers
    used: set[int] = set()
    for layer in range(spec.num_layers):
        modules = [module for module in ARCHITECTURES[spec.architecture].layer if module.when(spec, layer)]
        for module in modules:
            name = f"transformer.layers.{layer}.{module.name}"
            if name in precision.modules:
                formats[name] = precision.modules[name]
                continue
            sources = _source_names(spec, module, layer)
            index = precision.override([name, *sources])
            if index is None:
                format = precision.default
            else:
                pattern, format = precision.overrides[index]
                if problem := _part_of_module(pattern, module, name, sources):
                    torn.setdefault(problem, []).append(layer)
                if module.is_quantized or format == UNQUANTIZED:
                    used.add(index)
            if module.is_quantized:
                formats[name] = format
        for problem in _torn(formats, modules, layer):
            torn.setdefault(problem, []).append(layer)
    problems = [f"{_named(layers)}: {problem}" for problem, layers in torn.items()]
    problems += [
        f'"{pattern}" matches no layer that can be quantized'
        for index, (pattern, format) in enumerate(precision.overrides)
        if index not in used and not (format == UNQUANTIZED and _is_outside(spec, pattern))
    ]
    if problems:
        raise InputError(
            f"{spec.architecture}: the formats of its modules do not fit together",
            problems=problems,
            hint="tkit build --dry-run --json, without the patterns, lists every module under both names",
        )
    return formats


def _source_names(spec: ModelSpec, module: Module, layer: int) -> list[str]:
    prefix = ARCHITECTURES[spec.architecture].layer_prefix.format(layer=layer)
    names = [prefix + source.name for source in module.sources]
    if not module.has_experts:
        return names
    return [name.format(expert=expert) for expert in range(spec.num_experts) for name in names]


def _is_outside(spec: ModelSpec, pattern: str) -> bool:
    """It names the embedding, the final norm or lm_head, which are never quantized."""
    row = ARCHITECTURES[spec.architecture]
    outside = (*row.first, row.final_norm, row.lm_head)
    return any(matches(pattern, name) for module in outside for name in (module.name, module.sources[0].name))


def _named(layers: list[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers, {layers[0]} to {layers[-1]}"


def _part_of_module(pattern: str, module: Module, name: str, sources: list[str]) -> str | None:
    num_found = sum(matches(pattern, source) for source in sources)
    if num_found in (0, len(sources)) or matches(pattern, name):
        return None
    return f'"{pattern}" matches {num_found} of the {len(sources)} layers in {module.name}, which has one format'


def _torn(formats: Mapping[str, QuantFormat], modules: Iterable[Module], layer: int) -> Iterator[str]:
    """Modules that TensorRT-LLM fuses when it builds: those with one input, and all of a mixture of experts."""
    groups: dict[str | None, list[Module]] = {}
    quantized = [module for module in modules if module.is_quantized]
    is_sparse = any(module.has_experts for module in quantized)
    for module in quantized:
        in_mixture = is_sparse and module.name.startswith("mlp.")
        groups.setdefault("mlp" if in_mixture else module.input, []).append(module)
    for group in groups.values():
        found = {module.name: formats[f"transformer.layers.{layer}.{module.name}"] for module in group}
        if len({format.name for format in found.values()}) > 1:
            named = ", ".join(f"{name} {format.name}" for name, format in found.items())
            yield f"{named}: they are fused, and have one format"


def trtllm_quantization(spec: ModelSpec, precision: Precision, parallel: Parallel) -> dict[str, Any]:
    """`quantization` of config.json: only the keys that every version knows, because unknown ones are refused."""
    formats = _stage_formats(spec, precision, parallel)
    quantized = _distinct(formats)
    format = quantized[0] if quantized else UNQUANTIZED
    excluded = [name for name, its_format in formats.items() if its_format == UNQUANTIZED]
    patterns = None
    if len(quantized) == 1 and excluded:
        patterns = [*DEFAULT_EXCLUDED, *excluded]
        if format.is_stored_plain:
            patterns += [*DEFAULT_EXCLUDED_TENSORS, *(f"{name}.weight" for name in excluded)]
        if format.name == "fp8_rowwise":
            patterns += [*DEFAULT_EXCLUDED_ROWWISE, *_excluded_blocks(spec, formats)]
    return {
        "quant_algo": format.algo if len(quantized) < 2 else MIXED,
        "kv_cache_quant_algo": precision.kv_cache_algo,
        "group_size": format.group_size or 128,
        "smoothquant_val": 0.5,
        "clamp_val": None,
        "use_meta_recipe": False,
        "has_zero_point": format.has_zero_point if len(quantized) < 2 else False,
        "pre_quant_scale": format.has_prequant_scale if len(quantized) < 2 else False,
        "exclude_modules": patterns,
    }


def _excluded_blocks(spec: ModelSpec, formats: Mapping[str, QuantFormat]) -> list[str]:
    """FP8 rowwise replaces attention and MLP as a whole, and the norms in front of them."""
    norms = {module.feeds: module.name for module in ARCHITECTURES[spec.architecture].layer if module.feeds}
    blocks: dict[str, set[str]] = {}
    for name, format in formats.items():
        blocks.setdefault(name.rpartition(".")[0], set()).add(format.name)
    torn = [block for block, names in blocks.items() if len(names) > 1]
    if torn:
        raise InputError(
            "fp8_rowwise is for attention and MLP as a whole: TensorRT-LLM replaces the modules, not their layers",
            problems=[f"{block}: some of its layers are excluded" for block in torn],
            hint='exclude "*.attention.*" or "*.mlp.*", of all layers or of some',
        )
    excluded = [block for block, names in blocks.items() if names == {UNQUANTIZED.name}]
    fed = [block.rpartition(".") for block in excluded]
    return [*excluded, *(f"{layer}.{norms[block]}" for layer, _, block in fed if block in norms)]


def trtllm_quant_cfg(spec: ModelSpec, precision: Precision, parallel: Parallel) -> dict[str, Any] | None:
    """`quant_cfg.json`, which MIXED_PRECISION needs beside config.json; None for all else."""
    formats = _stage_formats(spec, precision, parallel)
    if len(_distinct(formats)) < 2:
        return None
    layers: dict[str, Any] = {}
    for name, format in formats.items():
        if format == UNQUANTIZED:
            continue
        entry: dict[str, Any] = {"quant_algo": format.algo}
        if format.group_size is not None:
            entry |= {
                "group_size": format.group_size,
                "has_zero_point": format.has_zero_point,
                "pre_quant_scale": format.has_prequant_scale,
            }
        layers[name] = entry
    return {"quant_algo": MIXED, "kv_cache_quant_algo": precision.kv_cache_algo, "quantized_layers": layers}


def _distinct(formats: Mapping[str, QuantFormat]) -> list[QuantFormat]:
    """The formats in use, without `none`."""
    by_name = {format.name: format for format in formats.values() if format != UNQUANTIZED}
    return list(by_name.values())


def _stage_formats(spec: ModelSpec, precision: Precision, parallel: Parallel) -> dict[str, QuantFormat]:
    """The formats under the names that the modules have on their stage. The module that holds all experts, and under whose
    name they are quantized, is one more."""
    formats = module_formats(spec, precision)
    for module in (module for module in ARCHITECTURES[spec.architecture].layer if module.has_experts):
        for layer in (layer for layer in range(spec.num_layers) if module.when(spec, layer)):
            name = f"transformer.layers.{layer}.{module.name}"
            formats[name.rpartition(".")[0]] = formats[name]
    local: dict[str, QuantFormat] = {}
    problems = []
    for name, local_name in _stage_names(formats, spec, parallel).items():
        first = local.setdefault(local_name, formats[name])
        if first.name != formats[name].name:
            problems.append(f"{name} is {formats[name].name}, {local_name} of another stage is {first.name}")
    if problems:
        raise InputError(
            f"TensorRT-LLM numbers the layers of each of the {parallel.pp_size} pipeline stages from 0,"
            " so these have the same name in its config",
            problems=problems,
            hint="choose --pp 1, or formats that repeat from stage to stage",
        )
    return local


def precision_from_trtllm(
    config: Mapping[str, Any],
    quant_cfg: Mapping[str, Any] | None,
    spec: ModelSpec,
    parallel: Parallel,
    tensors: Iterable[str],
) -> Precision:
    """The way back, from what `trtllm_quantization` and `trtllm_quant_cfg`, or NVIDIA ModelOpt, wrote. `tensors` are the
    names in the rank files, `{rank}/{name}`."""
    quantization = config["quantization"]
    kv_cache = stored_kv_cache(quantization)
    modules = module_formats(spec, Precision(default=UNQUANTIZED))
    names = _stage_names(modules, spec, parallel)
    parts: dict[str, set[str]] = {}  # by module
    for tensor in tensors:
        module, _, part = tensor.rpartition("/")[2].rpartition(".")
        parts.setdefault(module, set()).add(part)
    if quantization["quant_algo"] == MIXED:
        assert quant_cfg is not None
        layers = quant_cfg["quantized_layers"]
        found = {
            name: _as_stored(stored_format(layers[local]), parts.get(local, set()))
            for name, local in names.items()
            if local in layers
        }
        return Precision(default=UNQUANTIZED, modules=found, kv_cache=kv_cache)
    excluded = set(quantization.get("exclude_modules") or ())
    out = (name for name, local in names.items() if excluded & {local, local.rpartition(".")[0]})
    modules = dict.fromkeys(out, UNQUANTIZED)
    default = _as_stored(stored_format(quantization), set().union(*parts.values()))
    return Precision(default=default, modules=modules, kv_cache=kv_cache)


def _as_stored(format: QuantFormat, parts: Set[str]) -> QuantFormat:
    """What the files hold where NVIDIA ModelOpt's config says something else: INT4 without AWQ is said to have factors, and
    INT8 is finished codes."""
    if format.algo == "W4A16_AWQ" and format.has_prequant_scale and "prequant_scaling_factor" not in parts:
        return int4_format("int4", format.group_size or 128)
    if format.algo == INT8_CODES.algo and "weights_scaling_factor" in parts:
        return INT8_CODES
    return format


def stored_kv_cache(quantization: Mapping[str, Any]) -> str:
    algo = quantization.get("kv_cache_quant_algo")
    return next(name for name, its_algo in KV_CACHES.items() if its_algo == algo)


def stored_format(entry: Mapping[str, Any]) -> QuantFormat:
    """The format that `quant_algo` and what stands beside it name."""
    if entry["quant_algo"] == "W4A16_AWQ":
        has_prequant_scale = entry.get("pre_quant_scale", False)
        return int4_format(
            "int4_awq" if has_prequant_scale else "int4",
            entry.get("group_size", 128),
            has_prequant_scale=has_prequant_scale,
            has_zero_point=entry.get("has_zero_point", False),
        )
    formats = {format.algo: format for format in QUANT_FORMATS.values()}
    if entry["quant_algo"] not in formats:
        known = ", ".join(sorted(filter(None, formats)))
        raise InputError(f"quant_algo is {entry['quant_algo']!r}, tkit reads {known}")
    return formats[entry["quant_algo"]]


def _stage_names(modules: Iterable[str], spec: ModelSpec, parallel: Parallel) -> dict[str, str]:
    """{module with its global layer: the name it has on its stage}."""
    local_layers = [local for layers in parallel.stage_layers(spec.num_layers) for local in range(len(layers))]
    names = {}
    for name in modules:
        transformer, layers, layer, module = name.split(".", 3)
        names[name] = f"{transformer}.{layers}.{local_layers[int(layer)]}.{module}"
    return names
