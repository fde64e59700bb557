"""Quantizes a Llama with NVIDIA ModelOpt and exports TensorRT-LLM checkpoints. Runs in ModelOpt's own environment, imports
nothing of tkit.

    python benchmarks/modelopt_export.py MODEL TOKENS.json OUT FORMAT...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_tensorrt_llm_checkpoint
from transformers import AutoModelForCausalLM

CONFIGS = {
    "int8": mtq.INT8_WEIGHT_ONLY_CFG,
    "fp8": mtq.FP8_DEFAULT_CFG,
    "fp8_rowwise": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    "int8_sq": mtq.INT8_SMOOTHQUANT_CFG,
    "int4": mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG,
    "int4_awq": mtq.INT4_AWQ_CFG,
    "w4a8_awq": mtq.W4A8_AWQ_BETA_CFG,
    "nvfp4": mtq.NVFP4_DEFAULT_CFG,
}


def main() -> None:
    model_dir, tokens_file, out, *formats = sys.argv[1:]
    tokens = torch.tensor(json.loads(Path(tokens_file).read_text()))  # (samples, length)
    for name in formats:
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
        with torch.inference_mode():
            mtq.quantize(model, CONFIGS[name], lambda model: [model(batch) for batch in tokens.split(4)])
            export_tensorrt_llm_checkpoint(model, "llama", torch.bfloat16, f"{out}/{name}", 1)


if __name__ == "__main__":
    main()
