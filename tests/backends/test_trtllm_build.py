"""Command lines for trtllm-build: golden, accepted by a stand-in that was written from the program's description."""

from __future__ import annotations

import json
import shlex
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import trtllm_build as stand_in
from nvidia_node import write_programs

from tkit.backends.trtllm_build import TABLE, build_arguments, build_facts, check_arguments
from tkit.errors import InputError
from tkit.planner.precision import KV_MIN_SM, precision
from tkit.specs.quantization import QUANT_FORMATS
from tkit.specs.recipe import EngineRecipe

GOLDEN = Path(__file__).with_name("golden") / "trtllm-build.txt"
GELU = {"hidden_act": "gelu_pytorch_tanh"}
# name -> (architecture, quant_algo, kv_cache_quant_algo, tp, pp, SM, goal, more of config.json)
CASES: dict[str, tuple[str, str | None, str | None, int, int, int, str, dict[str, Any]]] = {
    "llama bf16 tp1":            ("LlamaForCausalLM",   None,                        None,   1, 1, 90,  "throughput", {}),
    "llama bf16 tp4 ampere":     ("LlamaForCausalLM",   None,                        None,   4, 1, 80,  "latency",    {}),
    "llama fp8 tp2":             ("LlamaForCausalLM",   "FP8",                       "FP8",  2, 1, 90,  "throughput", {}),
    "llama fp8 tp2 latency":     ("LlamaForCausalLM",   "FP8",                       "FP8",  2, 1, 90,  "latency",    {}),
    "llama int4 awq int8 kv":    ("LlamaForCausalLM",   "W4A16_AWQ",                 "INT8", 1, 1, 80,  "throughput", {}),
    "qwen2 sq tp2":              ("Qwen2ForCausalLM",   "W8A8_SQ_PER_CHANNEL",       None,   2, 1, 80,  "throughput", {}),
    "qwen3 fp8 blackwell":       ("Qwen3ForCausalLM",   "FP8",                       None,   1, 1, 100, "latency",    {}),
    "qwen3 nvfp4 tp2 pp2":       ("Qwen3ForCausalLM",   "NVFP4",                     "FP8",  2, 2, 100, "throughput", {}),
    "mistral rowwise tp2":       ("MistralForCausalLM", "FP8_PER_CHANNEL_PER_TOKEN", None,   2, 1, 89,  "throughput", {}),
    "mixtral w4a8 tp4 pp2":      ("MixtralForCausalLM", "W4A8_AWQ",                  "FP8",  4, 2, 90,  "throughput", {}),
    "gemma2 fp8 tp2 latency":    ("Gemma2ForCausalLM",  "FP8",                       None,   2, 1, 90,  "latency",    GELU),
    "phi3 mixed":                ("Phi3ForCausalLM",    "MIXED_PRECISION",           "FP8",  1, 1, 90,  "latency",    {}),
}  # fmt: skip


def config_of(name: str) -> dict[str, Any]:
    architecture, algo, kv_algo, tp, pp, _, _, more = CASES[name]
    return {
        "architecture": architecture,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "mapping": {"world_size": tp * pp, "tp_size": tp, "pp_size": pp},
        "quantization": {"quant_algo": algo, "kv_cache_quant_algo": kv_algo},
        **more,
    }


def arguments_of(name: str, **recipe: Any):
    *_, sm, goal, _ = CASES[name]
    return build_arguments(
        config_of(name),
        EngineRecipe(goal=goal, **recipe),
        sm=sm,
        num_gpus=8,
        checkpoint_dir=Path("checkpoint"),
        output_dir=Path("trt"),
    )


def run(
    name: str, argv: list[str], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> subprocess.CompletedProcess[str]:
    """The stand-in on a checkpoint of empty rank files."""
    for variable, value in write_programs(directory / "node", sm=CASES[name][5]).items():
        monkeypatch.setenv(variable, value)
    config = config_of(name)
    checkpoint = directory / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "quant_cfg.json").write_text("{}")
    for rank in range(config["mapping"]["world_size"]):
        (checkpoint / f"rank{rank}.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    return subprocess.run(argv, cwd=directory, capture_output=True, text=True, check=False)


def test_golden_command_lines() -> None:
    lines = [f"# {name}\n{shlex.join(arguments_of(name).argv())}\n" for name in CASES]
    assert "\n".join(lines) == GOLDEN.read_text("utf-8")


@pytest.mark.parametrize("name", CASES)
def test_the_stand_in_accepts_every_golden_command(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(name, arguments_of(name).argv(), tmp_path, monkeypatch)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "trt").glob("rank*.engine"))) == config_of(name)["mapping"]["world_size"]


WRONG: tuple[tuple[str, Mapping[str, Any], str], ...] = (
    ("llama int4 awq int8 kv", {"use_paged_context_fmha": "enable"}, "needs kv_cache_quant_algo None or FP8 or NVFP4"),
    ("llama fp8 tp2", {"opt_num_tokens": 64}, "multiple_profiles enable needs opt_num_tokens None, not 64"),
    ("llama bf16 tp1", {"reduce_fusion": "enable"}, "reduce_fusion enable needs tp_size at least 2, not 1"),
    ("mistral rowwise tp2", {"reduce_fusion": "enable"}, "not MistralForCausalLM"),
    ("qwen3 nvfp4 tp2 pp2", {"reduce_fusion": "enable"}, "needs pp_size 1, not 2"),
    ("gemma2 fp8 tp2 latency", {"user_buffer": "enable"}, "user_buffer enable needs architecture LlamaForCausalLM"),
    ("gemma2 fp8 tp2 latency", {"gemm_swiglu_plugin": "fp8"}, "needs hidden_act silu or swiglu"),
    ("llama bf16 tp1", {"gemm_plugin": "fp8"}, "gemm_plugin fp8 needs quant_algo FP8, not None"),
    ("llama bf16 tp1", {"gemm_plugin": "enable"}, "--gemm_plugin enable: expected one of auto, float16"),
    ("llama bf16 tp1", {"context_fmha": "true"}, "--context_fmha true: expected one of enable, disable"),
    ("llama bf16 tp1", {"gather_logits": "enable"}, "--gather_logits: trtllm-build has no such argument"),
    ("qwen3 fp8 blackwell", {"gemm_swiglu_plugin": "fp8"}, "gemm_swiglu_plugin fp8 needs sm 90, not 100"),
    ("qwen3 fp8 blackwell", {"low_latency_gemm_plugin": "fp8"}, "needs sm 89 or 90, not 100"),
    ("mixtral w4a8 tp4 pp2", {"streamingllm": "enable"}, "streamingllm enable needs architecture nothing that exists"),
    ("llama bf16 tp1", {"pp_reduce_scatter": "enable"}, "needs architecture MixtralForCausalLM"),
)  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), WRONG)
def test_wrong_ones_are_refused_by_both(
    name: str, changes: Mapping[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {**arguments_of(name).values, **changes}
    with pytest.raises(InputError) as refused:
        check_arguments(values, build_facts(config_of(name), CASES[name][5]))
    assert any(message in problem for problem in refused.value.problems), refused.value
    argv = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    assert run(name, ["trtllm-build", *argv], tmp_path, monkeypatch).returncode != 0


@pytest.mark.parametrize(
    ("name", "sm", "message"),
    [
        ("llama fp8 tp2", 80, "quant_algo FP8 needs sm at least 89, not 80: FP8 begins with Ada"),
        ("mistral rowwise tp2", 100, "quant_algo FP8_PER_CHANNEL_PER_TOKEN needs sm 89 or 90, not 100"),
        ("qwen3 nvfp4 tp2 pp2", 90, "quant_algo NVFP4 needs sm at least 100, not 90"),
        ("llama bf16 tp1", 75, "dtype bfloat16 needs sm at least 80, not 75"),
    ],
)
def test_a_gpu_without_the_format_is_refused(name: str, sm: int, message: str) -> None:
    config = config_of(name)
    with pytest.raises(InputError) as refused:
        build_arguments(config, EngineRecipe(), sm=sm, num_gpus=1, checkpoint_dir=Path("c"), output_dir=Path("t"))
    assert any(message in problem for problem in refused.value.problems), refused.value


def test_limits_of_the_recipe_win_and_a_prompt_fits_one_step_without_chunks() -> None:
    arguments = arguments_of("llama int4 awq int8 kv", max_batch_size=7, max_num_tokens=4096, max_seq_len=16384)
    assert (arguments.max_batch_size, arguments.max_num_tokens, arguments.max_seq_len) == (7, 4096, 16384)
    assert arguments.max_input_len == 4096
    assert arguments_of("llama bf16 tp1", max_seq_len=16384).max_input_len == 16383
    with pytest.raises(InputError, match="max_seq_len is 99999, the model's limit is 32768"):
        arguments_of("llama bf16 tp1", max_seq_len=99999)


def test_fp8_attention_is_off_where_the_cache_is_int8() -> None:
    config = config_of("llama fp8 tp2")
    config["quantization"]["kv_cache_quant_algo"] = "INT8"
    paths = {"checkpoint_dir": Path("c"), "output_dir": Path("t")}
    arguments = build_arguments(config, EngineRecipe(), sm=90, num_gpus=2, **paths)
    assert (arguments.use_paged_context_fmha, arguments.use_fp8_context_fmha) == ("disable", "disable")


def test_the_table_and_the_stand_in_agree() -> None:
    """Two readings of the same program."""
    table = json.loads(TABLE.read_text())["arguments"]
    actions = {action.dest: action for action in stand_in.parser()._actions if action.dest != "help"}
    assert table.keys() == actions.keys()
    for name, row in table.items():
        assert row["default"] == actions[name].default, name
        assert set(row.get("values", ())) == set(actions[name].choices or ()), name
        assert (row["kind"] == "flag") == (actions[name].nargs == 0), name


def test_the_least_gpu_of_a_format_is_the_one_that_plans_and_builds_reckon_with() -> None:
    names = {format.algo: name for name, format in QUANT_FORMATS.items()}
    told = {}
    for rule in json.loads(TABLE.read_text())["rules"]:
        for fact, table in (("quant_algo", names), ("kv_cache_quant_algo", {"FP8": "KV fp8"})):
            if list(rule["if"]) == [fact] and list(rule["then"]) == ["sm"]:
                condition = rule["then"]["sm"]
                least = condition["min"] if isinstance(condition, dict) else min(condition)
                told |= {table[algo]: least for algo in rule["if"][fact]}
    reckoned = {f"KV {name}": sm for name, sm in KV_MIN_SM.items()} | {n: precision(n).min_sm for n in names.values()}
    assert {"fp8", "nvfp4", "KV fp8"} <= told.keys()
    assert told == {name: reckoned[name] for name in told}
