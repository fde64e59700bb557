"""What the loader says to the ranks' files: the headers against the modules that the build makes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tkit.checkpoints.load_simulation.algorithms import (
    ALGORITHMS,
    MIXED,
    layer_entry,
    module_quantization,
    stored_parameters,
)
from tkit.checkpoints.load_simulation.config import LAYER_CONFIG_FILE, config_problems, with_layer_config
from tkit.checkpoints.load_simulation.families import FAMILIES, Family
from tkit.checkpoints.load_simulation.modules import Form, Linear, Sizes, Weight
from tkit.checkpoints.reader import read_header
from tkit.checkpoints.tensors import SAFETENSORS_DTYPE
from tkit.errors import InputError, TkitError
from tkit.files import read_json

CONFIG_FILE = "config.json"

Loaded = dict[str, tuple[Form, str]]  # parameter of the engine -> (form, the tensor of the file it comes from)


def check_load(directory: Path) -> None:
    """Raises TkitError with everything that would keep `trtllm-build` from loading the checkpoint in `directory`."""
    problems = simulate_load(directory)
    if problems:
        raise TkitError(
            f"{directory}: TensorRT-LLM would not load this checkpoint",
            problems=problems,
            hint="what was written contradicts TensorRT-LLM's format: a mistake in tkit, please report it with this list",
        )


def simulate_load(directory: Path) -> list[str]:
    """Everything that `trtllm-build` would refuse, or silently read as another model; empty when it would load."""
    try:
        config = read_json(directory / CONFIG_FILE)
        layer_config = directory / LAYER_CONFIG_FILE
        config = with_layer_config(config, read_json(layer_config) if layer_config.exists() else None)
    except InputError as error:
        return [str(error)]
    problems = config_problems(config)
    if problems:
        return [f"{CONFIG_FILE}: {problem}" for problem in problems]
    num_ranks = config["mapping"]["tp_size"] * config["mapping"]["pp_size"]
    expected = [directory / f"rank{rank}.safetensors" for rank in range(num_ranks)]
    problems = [
        f"{path.name}: no place among the {num_ranks} ranks of {CONFIG_FILE}"
        for path in sorted(directory.glob("rank*.safetensors"))
        if path not in expected
    ]
    for rank, path in enumerate(expected):
        if not path.is_file():
            problems.append(f"rank {rank}: {path.name} is missing")
            continue
        try:
            found = {name: Form(entry.dtype, entry.shape) for name, entry in read_header(path).items()}
        except InputError as error:
            problems.append(f"rank {rank}: {error}")
            continue
        problems += [f"rank {rank}, {path.name}: {line}" for line in rank_problems(config, rank, found)]
    return problems


def rank_problems(config: Mapping[str, Any], rank: int, found: Mapping[str, Form]) -> list[str]:
    """Missing, misshapen and superfluous tensors of one rank's file, in the file's own terms."""
    expected = required_tensors(config, rank)
    engine, loaded = engine_parameters(config, rank), preprocess(found, config)
    if "lm_head.weight" not in found and _may_omit_lm_head(config, expected):
        del engine["lm_head.weight"]
    lines: dict[str, None] = {}  # one tensor of the file may become several parameters: each line once
    for name, (parameter, origin) in engine.items():
        if name not in loaded:
            lines[f"{origin} is missing, expected {expected[origin]}"] = None
        elif not _fits(loaded[name][0], parameter):
            made, source = loaded[name]
            if found[source] == expected[origin]:
                lines[f"{source} {found[source]} is loaded as {made}, its module has {parameter}"] = None
            else:
                lines[f"{source} is {found[source]}, expected {expected[origin]}"] = None
    for name, (_, origin) in loaded.items():
        if name not in engine and origin not in engine:
            lines[f"{origin} {found[origin]} is in no module of {config['architecture']}"] = None
    return list(lines)


def _fits(found: Form, parameter: Form) -> bool:
    """Shapes must be equal; a scalar also fills a parameter of one value. A wrong dtype is only a warning to the loader,
    but the network is strongly typed: it fails later."""
    is_scalar = found.shape == () and math.prod(parameter.shape) == 1
    return found.dtype == parameter.dtype and (found.shape == parameter.shape or is_scalar)


def _may_omit_lm_head(config: Mapping[str, Any], expected: Mapping[str, Form]) -> bool:
    """Without lm_head the loader takes the embedding of the same rank for it, whether the model ties them or not."""
    embedding = expected.get("transformer.vocab_embedding.weight")
    return bool(config.get("tie_word_embeddings")) and embedding == expected.get("lm_head.weight") is not None


def required_tensors(config: Mapping[str, Any], rank: int) -> dict[str, Form]:
    """{name: form} of everything that must lie in the file of `rank`, in the layout in which it is shipped."""
    return {name: form for name, form, _ in _required(config, rank)}


def engine_parameters(config: Mapping[str, Any], rank: int) -> Loaded:
    """The parameters of the modules that the build makes for `rank`."""
    model = SAFETENSORS_DTYPE[config["dtype"]]
    return {
        parameter: (made, name)
        for name, form, algo in _required(config, rank)
        for parameter, made in ALGORITHMS[algo].preprocess(name, form, model)
    }


def _required(config: Mapping[str, Any], rank: int) -> Iterator[tuple[str, Form, str | None]]:
    """(name, form, algorithm of its module) of every tensor."""
    s, family = Sizes(config), FAMILIES[config["architecture"]]
    pp_rank, pp = rank // s.tp, config["mapping"]["pp_size"]
    parts: list[Weight | Linear] = []
    if pp_rank == 0:
        parts.append(Weight("transformer.vocab_embedding.weight", _embedding_shape(s, family)))
        if family.has_position_embedding:
            shape = (config["max_position_embeddings"], s.hidden)
            parts.append(Weight("transformer.position_embedding.weight", shape))
    for local_layer, layer in enumerate(_stage_layers(config["num_hidden_layers"], pp, pp_rank)):
        prefix = f"transformer.layers.{local_layer}."
        parts += [_renamed(part, prefix) for part in family.layer(s, layer)]
        if config["quantization"].get("kv_cache_quant_algo"):
            parts.append(Weight(f"{prefix}attention.kv_cache_scaling_factor", (1,), "F32"))
    if pp_rank == pp - 1:
        parts += family.norm("transformer.ln_f", s.hidden)
        parts.append(Weight("lm_head.weight", (s.vocab, s.hidden)))
        if family.has_lm_head_bias:
            parts.append(Weight("lm_head.bias", (s.vocab,)))
    model_dtype = SAFETENSORS_DTYPE[config["dtype"]]
    for part in parts:
        algo = module_quantization(part, config).get("quant_algo") if isinstance(part, Linear) else None
        for weight in stored_parameters(part, config) if isinstance(part, Linear) else (part,):
            yield weight.name, Form(model_dtype if weight.dtype == "model" else weight.dtype, weight.shape), algo


def _embedding_shape(s: Sizes, family: Family) -> tuple[int, int]:
    if s.tp > 1 and (family.shards_embedding or s.config.get("use_parallel_embedding")):
        if s.config.get("embedding_sharding_dim", 0) == 0:
            return s.vocab, s.hidden
        return s.config["vocab_size"], s.hidden // s.tp
    return s.config["vocab_size"], s.hidden


def _stage_layers(num_layers: int, pp: int, pp_rank: int) -> range:
    """As `torch.tensor_split` divides them: the first `num_layers % pp` stages have one more."""
    sizes = [num_layers // pp + (stage < num_layers % pp) for stage in range(pp)]
    return range(sum(sizes[:pp_rank]), sum(sizes[: pp_rank + 1]))


def _renamed(part: Weight | Linear, prefix: str) -> Weight | Linear:
    name = prefix + part.name
    if isinstance(part, Weight):
        return Weight(name, part.shape, part.dtype)
    return Linear(name, part.out, part.in_, part.cut, part.bias, part.experts)


def preprocess(tensors: Mapping[str, Form], config: Mapping[str, Any]) -> Loaded:
    """What `preprocess_weights` makes of a file's tensors, as far as names, dtypes and shapes go."""
    quantization = config["quantization"]
    model = SAFETENSORS_DTYPE[config["dtype"]]
    is_lm_head_plain = tensors.get("lm_head.weight", Form(model, ())).dtype != "F8_E4M3"
    loaded: Loaded = {}
    for name, form in tensors.items():
        algo = quantization.get("quant_algo")
        if algo == MIXED:
            algo = layer_entry(quantization, _base_name(name)).get("quant_algo")
        if algo == "FP8" and is_lm_head_plain and name.startswith("lm_head.") and name.endswith("scaling_factor"):
            continue  # dropped there
        if name.endswith((".k_cache_scaling_factor", ".v_cache_scaling_factor")):  # the larger of the two counts
            loaded[name.replace(".k_cache", ".kv_cache").replace(".v_cache", ".kv_cache")] = (form, name)
            continue
        if algo in ("W8A16", "W4A16") and _is_left_plain(name, quantization):
            algo = None
        loaded.update({ours: (made, name) for ours, made in ALGORITHMS[algo].preprocess(name, form, model)})
    return loaded


def _base_name(name: str) -> str:
    """The module that the loader takes a tensor for: what stands before and in the first of these words, in this order."""
    for word in ("fc", "gate", "proj", "qkv", "dense"):
        if word in name:
            return name[: name.index(word) + len(word)]
    return name.rpartition(".")[0]


def _is_left_plain(tensor: str, quantization: Mapping[str, Any]) -> bool:
    """Weight-only quantization at load time matches its exclusions against the tensor's own name."""
    patterns = quantization.get("exclude_modules") or ("*shared_expert_gate.weight",)
    return any(fnmatchcase(tensor, pattern) for pattern in patterns)
