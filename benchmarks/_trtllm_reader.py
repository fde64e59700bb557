"""Reads a one-rank TensorRT-LLM checkpoint of a Llama into transformers' model, as the kernels of each algorithm would.

Written from the published format for the benchmarks alone; shares no code with tkit's own reader or quantizers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

Tensors = dict[str, torch.Tensor]
Rounding = Callable[[torch.Tensor], torch.Tensor]

# TensorRT-LLM module -> Hugging Face modules, stacked in this order
LINEARS = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}
NORMS = {"input_layernorm": "input_layernorm", "post_layernorm": "post_attention_layernorm"}
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def load(model: PreTrainedModel, checkpoint: Path) -> None:
    """Replaces the weights of `model`, float32, and hooks the rounding of activations and of the KV cache into it."""
    config = json.loads((checkpoint / "config.json").read_text())
    tensors = load_file(checkpoint / "rank0.safetensors")
    dtype = getattr(torch, config["dtype"])
    algorithm = ALGORITHMS[config["quantization"]["quant_algo"]]
    if config["quantization"]["kv_cache_quant_algo"] == "FP8":
        model.set_attn_implementation("fp8_cache")
    for index, layer in enumerate(model.model.layers):
        prefix = f"transformer.layers.{index}."
        layer.self_attn.kv_scale = tensors.get(f"{prefix}attention.kv_cache_scaling_factor")
        for ours, theirs in NORMS.items():
            _set(layer.get_submodule(theirs), tensors[f"{prefix}{ours}.weight"])
        for name, sources in LINEARS.items():
            start = f"{prefix}{name}."
            stored = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
            weight, rounding = algorithm(stored, dtype)
            modules = [layer.get_submodule(source) for source in sources]
            for module, part in zip(modules, weight.split([module.out_features for module in modules]), strict=True):
                _set(module, part)
                if rounding is not None:
                    module.register_forward_pre_hook(lambda _, arguments, rounding=rounding: (rounding(arguments[0]),))
    _set(model.model.norm, tensors["transformer.ln_f.weight"])
    _set(model.model.embed_tokens, tensors["transformer.vocab_embedding.weight"])


def _set(module: torch.nn.Module, weight: torch.Tensor) -> None:
    module.weight.data = weight.float()


def plain(stored: Tensors, dtype: torch.dtype) -> tuple[torch.Tensor, Rounding | None]:
    return stored["weight"], None


def int8_weights(stored: Tensors, dtype: torch.dtype) -> tuple[torch.Tensor, Rounding | None]:
    """Finished codes are taken as they are; plain weights are quantized by the build: halves away from zero."""
    weight = stored["weight"].float()
    if stored["weight"].dtype == torch.int8:
        return weight * stored["weights_scaling_factor"].float()[:, None], None
    scale = (weight.abs().amax(1, keepdim=True) / 128).to(dtype).float()
    return (torch.sign(weight) * torch.floor(weight.abs() / scale + 0.5)).clamp(-128, 127) * scale, None


def fp8(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def attend_to_fp8_cache(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: Any, **options: Any
) -> Any:
    """Attention over what an FP8 cache holds: keys behind the rotary embedding and values, with the layer's one scale."""
    keys, values = (fp8(x / module.kv_scale) * module.kv_scale for x in (key, value))
    return sdpa_attention_forward(module, query, keys, values, *arguments, **options)


AttentionInterface.register("fp8_cache", attend_to_fp8_cache)
AttentionMaskInterface.register("fp8_cache", sdpa_mask)


def fp8_static(stored: Tensors, dtype: torch.dtype) -> tuple[torch.Tensor, Rounding | None]:
    scale = stored["activation_scaling_factor"]
    return stored["weight"].float() * stored["weights_scaling_factor"], lambda x: fp8(x / scale) * scale


def fp8_per_token(stored: Tensors, dtype: torch.dtype) -> tuple[torch.Tensor, Rounding | None]:
    def rounding(x: torch.Tensor) -> torch.Tensor:
        scale = (x.abs().amax(-1, keepdim=True) / 448).clamp(min=1 / (448 * 512))
        return fp8(x / scale) * scale

    return stored["weight"].float() * stored["per_channel_scale"][:, None], rounding


def smooth_quant(stored: Tensors, dtype: torch.dtype) -> tuple[torch.Tensor, Rounding | None]:
    prequant, scale = stored["prequant_scaling_factor"].float(), stored["activation_scaling_factor"]
    weight = stored["weight"].float() * stored["weights_scaling_factor"].float()[:, None]
    return weight, lambda x: (x * prequant / scale).round().clamp(-128, 127) * scale


def int4_codes(packed: torch.Tensor) -> torch.Tensor:
    """(out/2, in) -> (out, in): the even row of a pair in the low nibble, two's complement."""
    bits = packed.to(torch.int64) & 255
    codes = torch.stack((bits & 15, bits >> 4), dim=1).reshape(-1, packed.shape[1])
    return torch.where(codes < 8, codes, codes - 16).float()


def int4_groups(stored: Tensors, dtype: torch.dtype) -> tuple[torch.Tensor, Rounding | None]:
    """Scales are cast to the model's dtype when they are loaded. ModelOpt leaves the factor out of INT4 without AWQ."""
    codes, scale = int4_codes(stored["weight"]), stored["weights_scaling_factor"].to(dtype).float()
    weight = codes * scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)
    if "prequant_scaling_factor" not in stored:
        return weight, None
    prequant = stored["prequant_scaling_factor"].float()
    return weight, lambda x: x * prequant


def int4_groups_fp8(stored: Tensors, dtype: torch.dtype) -> tuple[torch.Tensor, Rounding | None]:
    """y = a b sum fp8(x prequant / a) fp8(codes s / b), with s in the model's dtype and s / b in half precision."""
    a, b = stored["activation_scaling_factor"], stored["weights_scaling_factor_2"]
    codes, scale = int4_codes(stored["weight"]), (stored["weights_scaling_factor"].to(dtype).float() / b).half().float()
    weight = fp8(codes * scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)) * b
    prequant = stored["prequant_scaling_factor"].float()
    return weight, lambda x: fp8(x * prequant / a) * a


def e2m1(x: torch.Tensor) -> torch.Tensor:
    """Nearest of the eight magnitudes; on a tie the even code."""
    distance = (x.abs()[..., None] - E2M1).abs()
    distance[..., 1::2] *= 1 + 1e-6
    return torch.sign(x) * E2M1[distance.argmin(-1)]


def nvfp4(stored: Tensors, dtype: torch.dtype) -> tuple[torch.Tensor, Rounding | None]:
    packed = stored["weight"]
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).reshape(len(packed), -1).long()
    values = torch.where(codes < 8, 1.0, -1.0) * E2M1[codes & 7]
    scale = stored["weights_scaling_factor"].float().repeat_interleave(16, dim=1)
    global_scale = stored["activation_scaling_factor"].float()

    def rounding(x: torch.Tensor) -> torch.Tensor:
        blocks = x.reshape(-1, 16)
        block_scale = fp8(blocks.abs().amax(1, keepdim=True) / 6 / global_scale) * global_scale
        safe = torch.where(block_scale > 0, block_scale, 1.0)
        return (e2m1(blocks / safe) * block_scale).reshape(x.shape)

    return values * scale * stored["weights_scaling_factor_2"], rounding


ALGORITHMS: dict[str | None, Callable[[Tensors, torch.dtype], tuple[torch.Tensor, Rounding | None]]] = {
    None: plain,
    "W8A16": int8_weights,
    "FP8": fp8_static,
    "FP8_PER_CHANNEL_PER_TOKEN": fp8_per_token,
    "W8A8_SQ_PER_CHANNEL": smooth_quant,
    "W4A16_AWQ": int4_groups,
    "W4A8_AWQ": int4_groups_fp8,
    "NVFP4": nvfp4,
}
