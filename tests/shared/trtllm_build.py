#!/usr/bin/env python3
"""Stands in for `trtllm-build` 1.2: takes its arguments, refuses what it refuses, reads the checkpoint, writes an engine
directory whose engines are empty shells. Written from the description of the program, not from tkit's table.

$STAND_IN_SM is the GPU, $STAND_IN_SECONDS what a rank takes; $STAND_IN_FAILURE makes it crash, hang, or end as if all were
well, after the first rank.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import time
from importlib.metadata import version
from pathlib import Path

ON_OFF = ("enable", "disable")
DTYPES = ("auto", "float16", "float32", "bfloat16", "int32", "disable")
INTEGER_FORMATS = ("W8A16", "W4A16", "W4A16_AWQ", "W4A8_AWQ", "W8A8_SQ_PER_CHANNEL", "W4A16_GPTQ", "W8A16_GPTQ")


def parser() -> argparse.ArgumentParser:
    """allow_abbrev stays on as in the original; tkit never abbreviates."""
    parser = argparse.ArgumentParser("trtllm-build")
    for name in ("checkpoint_dir", "model_config", "build_config", "model_cls_file", "model_cls_name",
                 "input_timing_cache", "visualize_network"):  # fmt: skip
        parser.add_argument(f"--{name}")
    parser.add_argument("--output_dir", default="engine_outputs")
    parser.add_argument("--output_timing_cache", default="model.cache")
    for name, default in (
        ("max_batch_size", 2048), ("max_input_len", 1024), ("max_beam_width", 1), ("max_num_tokens", 8192),
        ("opt_num_tokens", None), ("max_encoder_input_len", 1024), ("workers", 1), ("max_lora_rank", 64),
        ("max_draft_len", 0), ("tokens_per_block", 32),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--max_seq_len", "--max_decoder_seq_len", dest="max_seq_len", type=int)
    parser.add_argument("--max_prompt_embedding_table_size", "--max_multimodal_len", type=int, default=0)
    parser.add_argument("--kv_cache_type", choices=("continuous", "paged", "disabled"), default="paged")
    parser.add_argument(
        "--profiling_verbosity", choices=("layer_names_only", "detailed", "none"), default="layer_names_only"
    )
    levels = ("internal_error", "error", "warning", "info", "verbose", "debug", "trace")
    parser.add_argument("--log_level", choices=levels, default="info")
    parser.add_argument("--logits_dtype", choices=("float16", "float32"))
    parser.add_argument("--lora_ckpt_source", choices=("hf", "nemo"), default="hf")
    modes = ("draft_tokens_external", "lookahead_decoding", "medusa", "explicit_draft_tokens", "eagle")
    parser.add_argument("--speculative_decoding_mode", choices=modes)
    for name in ("strip_plan", "weight_sparsity", "weight_streaming", "fast_build", "enable_debug_output", "dry_run",
                 "monitor_memory", "gather_context_logits", "gather_generation_logits",
                 "gather_all_token_logits"):  # fmt: skip
        parser.add_argument(f"--{name}", action="store_true")
    for name in ("bert_attention_plugin", "gpt_attention_plugin", "moe_plugin", "mamba_conv1d_plugin", "nccl_plugin"):
        parser.add_argument(f"--{name}", choices=DTYPES, default="auto")
    for name in ("fp8_rowwise_gemm_plugin", "lora_plugin"):
        parser.add_argument(f"--{name}", choices=DTYPES, default="disable")
    parser.add_argument("--gemm_plugin", choices=(*DTYPES, "fp8", "nvfp4"), default="disable")
    for name in ("gemm_swiglu_plugin", "low_latency_gemm_plugin", "low_latency_gemm_swiglu_plugin"):
        parser.add_argument(f"--{name}", choices=("fp8", "disable"), default="disable")
    parser.add_argument("--gemm_allreduce_plugin", choices=("float16", "bfloat16", "disable"), default="disable")
    for name in ("context_fmha", "remove_input_padding", "use_paged_context_fmha", "use_fp8_context_fmha",
                 "paged_state", "use_fused_mlp"):  # fmt: skip
        parser.add_argument(f"--{name}", choices=ON_OFF, default="enable")
    for name in ("dora_plugin", "bert_context_fmha_fp32_acc", "fuse_fp4_quant", "multiple_profiles", "streamingllm",
                 "norm_quant_fusion", "reduce_fusion", "user_buffer", "pp_reduce_scatter"):  # fmt: skip
        parser.add_argument(f"--{name}", choices=ON_OFF, default="disable")
    return parser


def refusals(args: argparse.Namespace, config: dict, sm: int) -> list[str]:
    """What the program, its plugins or its kernels would stop at, and what it would turn off silently."""
    mapping, quantization = config["mapping"], config["quantization"]
    algo, kv_algo = quantization["quant_algo"], quantization["kv_cache_quant_algo"]
    is_gated = config["hidden_act"] in ("silu", "swiglu")
    checks = {
        "multiple_profiles and opt_num_tokens": args.multiple_profiles == "enable" and args.opt_num_tokens is not None,
        "context logits with draft tokens": args.gather_context_logits and args.max_draft_len > 0,
        "streamingllm is gone": args.streamingllm == "enable",
        "INT8 KV cache with paged context FMHA": kv_algo == "INT8" and args.use_paged_context_fmha == "enable",
        "paged context FMHA without paged KV": args.use_paged_context_fmha == "enable" and args.kv_cache_type != "paged",
        "reduce_fusion would be turned off": args.reduce_fusion == "enable"
        and not (
            mapping["tp_size"] > 1
            and mapping["pp_size"] == 1
            and config["architecture"] in ("LlamaForCausalLM", "Gemma2ForCausalLM")
        ),
        "user_buffer": args.user_buffer == "enable"
        and not (args.reduce_fusion == "enable" and algo == "FP8" and config["architecture"] == "LlamaForCausalLM"),
        "pp_reduce_scatter": args.pp_reduce_scatter == "enable" and config["architecture"] != "MixtralForCausalLM",
        "gemm_plugin fp8": args.gemm_plugin == "fp8" and algo != "FP8",
        "gemm_plugin nvfp4": args.gemm_plugin == "nvfp4" and algo != "NVFP4",
        "gemm_swiglu_plugin": args.gemm_swiglu_plugin == "fp8" and not (algo == "FP8" and sm == 90 and is_gated),
        "low_latency_gemm_plugin": args.low_latency_gemm_plugin == "fp8" and not (algo == "FP8" and sm in (89, 90)),
        "low_latency_gemm_swiglu_plugin": args.low_latency_gemm_swiglu_plugin == "fp8"
        and not (algo == "FP8" and sm == 90 and is_gated),
        "fp8_rowwise_gemm_plugin": args.fp8_rowwise_gemm_plugin != "disable"
        and not (algo == "FP8_PER_CHANNEL_PER_TOKEN" and sm in (89, 90)),
        "fast_build with integers": args.fast_build and algo in INTEGER_FORMATS,
        "rowwise FP8 needs Ada or Hopper": algo == "FP8_PER_CHANNEL_PER_TOKEN" and sm not in (89, 90),
        "FP8 needs SM 89": (algo in ("FP8", "W4A8_AWQ") or kv_algo == "FP8") and sm < 89,
        "NVFP4 needs SM 100": algo == "NVFP4" and sm < 100,
        "bfloat16 needs SM 80": config["dtype"] == "bfloat16" and sm < 80,
        "unknown format": algo in ("W4A16_MXFP4", "FP8_BLOCK_SCALES", "W4A8_MXFP4_FP8"),
        "longer than the model": args.max_seq_len is not None
        and args.max_seq_len > config["max_position_embeddings"],
    }  # fmt: skip
    return [name for name, is_refused in checks.items() if is_refused]


def check_rank(path: Path) -> None:
    """A readable safetensors header, and as many bytes as it promises."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        if file.seek(0, os.SEEK_END) != 8 + size + end:
            sys.exit(f"{path}: incomplete")


def main() -> None:
    args = parser().parse_args()
    checkpoint, output = Path(args.checkpoint_dir), Path(args.output_dir)
    config = json.loads((checkpoint / "config.json").read_text())
    print(f"[TensorRT-LLM] TensorRT-LLM version: {version('tensorrt_llm')}", flush=True)
    if found := refusals(args, config, int(os.environ["STAND_IN_SM"])):
        sys.exit(f"[TRT-LLM] [E] refused: {'; '.join(found)}")
    if config["quantization"]["quant_algo"] == "MIXED_PRECISION" and not (checkpoint / "quant_cfg.json").is_file():
        sys.exit("[TRT-LLM] [E] quant_cfg.json is missing")
    output.mkdir(parents=True, exist_ok=True)
    for rank in range(config["mapping"]["world_size"]):
        check_rank(checkpoint / f"rank{rank}.safetensors")
        print(f"[TRT-LLM] [I] Build TensorRT engine {rank}", flush=True)
        (output / f"rank{rank}.engine").write_bytes(b"engine of rank %d" % rank)
        time.sleep(float(os.environ.get("STAND_IN_SECONDS", "0")))
        failure = os.environ.get("STAND_IN_FAILURE")
        if failure == "crash":
            sys.exit("[TRT-LLM] [E] Error Code 1: Cuda Runtime (out of memory)")
        if failure == "hang":
            time.sleep(3600)
        if failure == "incomplete":
            return
    build_config = {name: value for name, value in vars(args).items() if not name.endswith(("_dir", "_config"))}
    plugins = {name: build_config.pop(name) for name in list(build_config) if build_config[name] in (*ON_OFF, *DTYPES)}
    build_config["plugin_config"] = {
        name: value == "enable" if value in ON_OFF else value for name, value in plugins.items()
    }
    pretrained = {**config, "mapping": {**config["mapping"], "rank": 0}}
    engine_config = {"version": version("tensorrt_llm"), "pretrained_config": pretrained, "build_config": build_config}
    (output / "config.json").write_text(json.dumps(engine_config, indent=4))
    Path(args.output_timing_cache).write_bytes(b"timings")
    print("[TRT-LLM] [I] Total time of building all engines: 00:00:00", flush=True)


if __name__ == "__main__":
    main()
