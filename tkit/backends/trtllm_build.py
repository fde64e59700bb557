"""The command line of `trtllm-build` for a written checkpoint: its config.json, a GPU generation and a goal -> arguments.

What trtllm-build takes and refuses is data, `data/trtllm-build.json`; a command is checked against it before it runs, since
trtllm-build itself notices most conflicts only after minutes, or turns the feature off without a word.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tkit.errors import InputError
from tkit.specs.recipe import EngineRecipe

TABLE = Path(__file__).with_name("data") / "trtllm-build.json"
# goal -> (max_batch_size, max_num_tokens). Throughput: more sequences than a GPU's KV cache holds at usual lengths, and
# TensorRT-LLM's own default of tokens per step. Latency: few sequences, so that the kernels are tuned for small steps.
GOAL_LIMITS = {"throughput": (512, 8192), "latency": (16, 8192)}
# checkpoint's quant_algo -> --gemm_plugin. It concerns the layers that are not quantized; FP8 and NVFP4 have plugins of
# their own. FP8 without it, with several profiles, is the faster choice for large batches.
GEMM_PLUGIN = {"throughput": {"FP8": "disable", "NVFP4": "nvfp4"}, "latency": {"FP8": "fp8", "NVFP4": "nvfp4"}}
FP8_ALGOS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "MIXED_PRECISION")  # with FP8 attention
REDUCE_FUSION_MODELS = ("LlamaForCausalLM", "Gemma2ForCausalLM")


@dataclass(frozen=True, kw_only=True)
class TrtllmBuildArguments:
    """One field per argument that tkit sets, by trtllm-build's name; None = left to trtllm-build's default."""

    checkpoint_dir: str
    output_dir: str
    output_timing_cache: str
    input_timing_cache: str | None = None
    workers: int
    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    max_num_tokens: int
    gemm_plugin: str
    multiple_profiles: str | None = None
    low_latency_gemm_plugin: str | None = None
    gemm_swiglu_plugin: str | None = None
    use_paged_context_fmha: str | None = None
    use_fp8_context_fmha: str | None = None
    reduce_fusion: str | None = None
    user_buffer: str | None = None

    @property
    def values(self) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def argv(self, program: str = "trtllm-build") -> list[str]:
        words = [program]
        for name, value in self.values.items():
            words += [f"--{name}", str(value)]
        return words


def build_arguments(
    config: Mapping[str, Any],
    recipe: EngineRecipe,
    *,
    sm: int,
    num_gpus: int,
    checkpoint_dir: Path,
    output_dir: Path,
    input_timing_cache: Path | None = None,
) -> TrtllmBuildArguments:
    """`config` is the checkpoint's config.json. Raises InputError with everything that trtllm-build would refuse."""
    facts = build_facts(config, sm)
    algo, kv_algo, is_hopper = facts["quant_algo"], facts["kv_cache_quant_algo"], sm == 90
    is_latency_fp8 = recipe.goal == "latency" and algo == "FP8"
    has_fused_reduction = (
        facts["tp_size"] > 1 and facts["pp_size"] == 1 and facts["architecture"] in REDUCE_FUSION_MODELS
    )
    # INT8 has no paged context kernel. FP8 beside integer weights was refused up to 0.17, and nobody says it works since.
    has_paged_context = kv_algo is None or (kv_algo == "FP8" and algo in (*FP8_ALGOS, "NVFP4")) or kv_algo == "NVFP4"
    max_batch_size, max_num_tokens = GOAL_LIMITS[recipe.goal]
    max_num_tokens = recipe.max_num_tokens or max_num_tokens
    max_seq_len = recipe.max_seq_len or config["max_position_embeddings"]
    # A prompt is cut into chunks of max_num_tokens by the paged context kernel only, and leaves room for one token.
    max_input_len = max_seq_len - 1 if has_paged_context else min(max_seq_len - 1, max_num_tokens)
    arguments = TrtllmBuildArguments(
        checkpoint_dir=str(checkpoint_dir),
        output_dir=str(output_dir),
        output_timing_cache=str(output_dir / "model.cache"),
        input_timing_cache=str(input_timing_cache) if input_timing_cache else None,
        workers=min(facts["tp_size"] * facts["pp_size"], num_gpus),
        max_batch_size=recipe.max_batch_size or max_batch_size,
        max_input_len=max_input_len,
        max_seq_len=max_seq_len,
        max_num_tokens=max_num_tokens,
        gemm_plugin="disable" if is_latency_fp8 and is_hopper else GEMM_PLUGIN[recipe.goal].get(algo, "auto"),
        multiple_profiles="enable" if recipe.goal == "throughput" and algo == "FP8" else None,
        low_latency_gemm_plugin="fp8" if is_latency_fp8 and is_hopper else None,
        gemm_swiglu_plugin="fp8" if is_latency_fp8 and is_hopper and facts["hidden_act"] == "silu" else None,
        use_paged_context_fmha="enable" if has_paged_context else "disable",
        # On by default, and of use where weights and cache are FP8; it cannot read an INT8 cache.
        use_fp8_context_fmha={"FP8": "enable", "INT8": "disable"}.get(kv_algo) if algo == "FP8" else None,
        reduce_fusion="enable" if has_fused_reduction else None,
        user_buffer="enable"
        if is_latency_fp8 and has_fused_reduction and facts["architecture"] == "LlamaForCausalLM"
        else None,
    )
    if max_seq_len > config["max_position_embeddings"]:
        raise InputError(f"max_seq_len is {max_seq_len}, the model's limit is {config['max_position_embeddings']}")
    check_arguments(arguments.values, facts)
    return arguments


def build_facts(config: Mapping[str, Any], sm: int) -> dict[str, Any]:
    """What the rules of the table ask about a checkpoint and the GPU."""
    mapping, quantization = config.get("mapping", {}), config.get("quantization", {})
    return {
        "architecture": config["architecture"],
        "dtype": config["dtype"],
        "hidden_act": config.get("hidden_act"),
        "quant_algo": quantization.get("quant_algo"),
        "kv_cache_quant_algo": quantization.get("kv_cache_quant_algo"),
        "tp_size": mapping.get("tp_size", 1),
        "pp_size": mapping.get("pp_size", 1),
        "sm": sm,
    }


def check_arguments(values: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Raises InputError listing every argument that is unknown, has a wrong value, or contradicts another or the GPU."""
    problems = [problem for name, value in values.items() if (problem := _value_problem(name, value))]
    defaults = {name: row["default"] for name, row in _table()["arguments"].items()}
    known = {**defaults, **facts, **values}
    for rule in _table()["rules"]:
        if all(_meets(known[name], condition) for name, condition in rule["if"].items()):
            problems += [
                f"{_said(rule['if'], known)} needs {name} {_wanted(condition)}, not {known[name]}: {rule['why']}"
                for name, condition in rule["then"].items()
                if not _meets(known[name], condition)
            ]
    if problems:
        raise InputError(f"trtllm-build would refuse this engine for SM {facts['sm']}", problems=problems)


@functools.cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text("utf-8"))
    return table


def _value_problem(name: str, value: Any) -> str | None:
    row = _table()["arguments"].get(name)
    if row is None:
        return f"--{name}: trtllm-build has no such argument"
    if row["kind"] == "choice" and value not in row["values"]:
        return f"--{name} {value}: expected one of {', '.join(row['values'])}"
    if row["kind"] == "count" and not (isinstance(value, int) and value >= 1):
        return f"--{name} {value}: expected a number of at least 1"
    return None


def _meets(value: Any, condition: Any) -> bool:
    return value >= condition["min"] if isinstance(condition, dict) else value in condition


def _said(conditions: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {known[name]}" for name in conditions) or "an engine"


def _wanted(condition: Any) -> str:
    if isinstance(condition, dict):
        return f"at least {condition['min']}"
    return " or ".join(str(value) for value in condition) or "nothing that exists"
