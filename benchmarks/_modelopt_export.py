"""Quantizes a Llama with NVIDIA ModelOpt and exports TensorRT-LLM checkpoints. Runs in ModelOpt's own environment, imports
nothing of tkit.

    python benchmarks/_modelopt_export.py [--tp 1] MODEL TOKENS.json OUT FORMAT...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_tensorrt_llm_checkpoint
from transformers import AutoModelForCausalLM

CONFIGS = {
    "int8": mtq.INT8_WEIGHT_ONLY_CFG,
    "fp8": mtq.FP8_DEFAULT_CFG,
    "fp8+kv": mtq.update_quant_cfg_with_kv_cache_quant(mtq.FP8_DEFAULT_CFG, mtq.FP8_KV_CFG["quant_cfg"]),
    "fp8_rowwise": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    "int8_sq": mtq.INT8_SMOOTHQUANT_CFG,
    "int4": mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG,
    "int4_awq": mtq.INT4_AWQ_CFG,
    "w4a8_awq": mtq.W4A8_AWQ_BETA_CFG,
    "nvfp4": mtq.NVFP4_DEFAULT_CFG,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("model")
    parser.add_argument("tokens", type=Path)  # (samples, length)
    parser.add_argument("out")
    parser.add_argument("formats", nargs="+", choices=CONFIGS)
    arguments = parser.parse_args()
    tokens = torch.tensor(json.loads(arguments.tokens.read_text()))
    for name in arguments.formats:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).eval()
        with torch.inference_mode():
            mtq.quantize(model, CONFIGS[name], lambda model: [model(batch) for batch in tokens.split(4)])
            export_tensorrt_llm_checkpoint(model, "llama", torch.bfloat16, f"{arguments.out}/{name}", arguments.tp)


if __name__ == "__main__":
    main()
