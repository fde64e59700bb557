"""Quantized Hugging Face checkpoints, packed from the definition of each format.

A source is made of a 16-bit model: random codes, scales and zero points near its weights, the files that the format's own
tool would write, and beside them what it all means, as plain numbers. Shares no code with tkit.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3",
           "c_attn", "c_proj", "c_fc")  # fmt: skip
CONV1D = ("c_attn", "c_proj", "c_fc")  # stored (in, out); GPTQModel packs them as it packs linear layers
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of each nibble, lowest first


@dataclass
class Layer:
    """`u` (out, in) 0 to 15 and `z` (out, groups) for W = (u - z) s; FP8 has `codes` (out, in) and `s`."""

    s: torch.Tensor
    u: np.ndarray | None = None
    z: np.ndarray | None = None
    codes: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None

    @property
    def weight(self) -> torch.Tensor:
        """(out, in) float32, exactly what the source means."""
        if self.codes is not None:
            s = self.s.float()
            if s.dim() == 2:
                s = s.repeat_interleave(128, 0).repeat_interleave(128, 1)
            return self.codes.float() * (s[:, None] if s.dim() == 1 and s.numel() > 1 else s)
        group = self.u.shape[1] // self.z.shape[1]
        steps = self.u.astype(np.int64) - np.repeat(self.z, group, axis=1)
        return torch.from_numpy(steps).float() * self.s.float().repeat_interleave(group, dim=1)


@dataclass
class Source:
    directory: Path
    group: int | None
    layers: dict[str, Layer] = field(default_factory=dict)
    kv_scales: dict[str, torch.Tensor] = field(default_factory=dict)


def words_along_rows(u: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """(n, m) -> (n, m/8): each signed 32-bit word holds eight neighbours of one row, the first of the order lowest."""
    eights = u.reshape(len(u), -1, 8)[:, :, list(order)].astype(np.uint32)
    return torch.from_numpy((eights << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1, dtype=np.uint32).view(np.int32))


def awq(layer: Layer) -> dict[str, torch.Tensor]:
    return {
        "qweight": words_along_rows(layer.u.T, AWQ_ORDER),
        "qzeros": words_along_rows(layer.z.T, AWQ_ORDER),
        "scales": layer.s.T.contiguous(),
    }


def gptq(layer: Layer, offset: int = 1) -> dict[str, torch.Tensor]:
    num_inputs = layer.u.shape[1]
    return {
        "qweight": words_along_rows(layer.u).T.contiguous(),
        "qzeros": words_along_rows(layer.z.T) - offset * 0x11111111,  # GPTQModel takes it off whole words
        "scales": layer.s.T.contiguous(),
        "g_idx": torch.tensor([i // (num_inputs // layer.z.shape[1]) for i in range(num_inputs)], dtype=torch.int32),
    }


def gptq_v2(layer: Layer) -> dict[str, torch.Tensor]:
    return gptq(layer, offset=0)


def compressed(layer: Layer) -> dict[str, torch.Tensor]:
    return {
        "weight_packed": words_along_rows(layer.u),
        "weight_scale": layer.s,
        "weight_shape": torch.tensor(layer.u.shape),
    }


def compressed_asymmetric(layer: Layer) -> dict[str, torch.Tensor]:
    return compressed(layer) | {"weight_zero_point": words_along_rows(layer.z.T).T.contiguous()}


def modelopt_awq(layer: Layer) -> dict[str, torch.Tensor]:
    q = layer.u.astype(np.uint8) - 8  # negative codes as two's complement
    packed = (q[0::2] & 15) | (q[1::2] & 15) << 4
    return {"weight": torch.from_numpy(packed), "weight_scale": layer.s.float()}


def fp8_static(layer: Layer) -> dict[str, torch.Tensor]:
    return {"weight": layer.codes, "weight_scale": layer.s, "input_scale": layer.input_scale}


def compressed_fp8(layer: Layer) -> dict[str, torch.Tensor]:
    return {"weight": layer.codes, "weight_scale": layer.s.reshape(-1, 1)}


def fp8_blocks(layer: Layer) -> dict[str, torch.Tensor]:
    return {"weight": layer.codes, "weight_scale_inv": layer.s}


INT4_WEIGHTS = {
    "num_bits": 4,
    "type": "int",
    "strategy": "group",
    "group_size": 128,
    "actorder": None,
    "dynamic": False,
}
FP8_WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "channel"}
TOKENS_IN = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}
STATIC_IN = TOKENS_IN | {"dynamic": False, "strategy": "tensor"}


def compressed_config(weights: dict[str, Any], inputs: Any, format: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": format, "ignore": ["lm_head"], "kv_cache_scheme": None,
            "quantization_status": "compressed", "config_groups": {"group_0": group}}  # fmt: skip


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False}
# kind -> (quantization_config, how a layer is packed, are there zero points, group size)
INT4_KINDS: dict[str, tuple[dict[str, Any], Any, bool, int]] = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}, awq, True, 128),
    "gptq": (GPTQ | {"checkpoint_format": "gptq"}, gptq, False, 128),
    "gptq-64": (GPTQ | {"group_size": 64}, gptq, False, 64),
    "gptq-asymmetric": (GPTQ | {"sym": False}, gptq, True, 128),
    "gptq_v2-asymmetric": (GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}, gptq_v2, True, 128),
    "compressed": (
        compressed_config(INT4_WEIGHTS | {"symmetric": True}, None, "pack-quantized"), compressed, False, 128,
    ),
    "compressed-asymmetric": (
        compressed_config(INT4_WEIGHTS | {"symmetric": False}, None, "pack-quantized"), compressed_asymmetric, True, 128,
    ),
    "modelopt-awq": (
        {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 128, "has_zero_point": False,
         "pre_quant_scale": True},
        modelopt_awq, False, 128,
    ),
}  # fmt: skip
MODELOPT_FP8 = {
    "quant_method": "modelopt",
    "quant_algo": "FP8",
    "kv_cache_quant_algo": None,
    "exclude_modules": ["lm_head"],
}
# kind -> (quantization_config, how a layer is packed, what a scale is for)
FP8_KINDS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "modelopt-fp8": (MODELOPT_FP8, fp8_static, "input"),  # q, k and v share one scale
    "modelopt-fp8-apart": (MODELOPT_FP8, fp8_static, "layer"),
    "modelopt-fp8-kv": (MODELOPT_FP8 | {"kv_cache_quant_algo": "FP8"}, fp8_static, "input"),
    "compressed-fp8": (
        compressed_config(FP8_WEIGHTS | {"strategy": "tensor"}, STATIC_IN, "float-quantized"), fp8_static, "layer",
    ),
    "compressed-fp8-dynamic": (compressed_config(FP8_WEIGHTS, TOKENS_IN, "float-quantized"), compressed_fp8, "row"),
    "fp8-static": (
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}, fp8_static, "layer",
    ),
    "fp8-blocks": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, fp8_blocks, "block",
    ),
}  # fmt: skip


def make_source(kind: str, plain: Path, directory: Path) -> Source:
    """A checkpoint of that kind in `directory`, from the 16-bit model in `plain`."""
    config = json.loads((plain / "config.json").read_text())
    tensors = load_file(plain / "model.safetensors")
    quantization, pack = (INT4_KINDS | FP8_KINDS)[kind][:2]
    source = Source(directory, group=INT4_KINDS[kind][3] if kind in INT4_KINDS else None)
    random = np.random.default_rng(len(kind))
    for name in sorted(name for name in tensors if name.removesuffix(".weight").endswith(LINEARS)):
        weight = tensors.pop(name)
        layer = name.removesuffix(".weight")
        weight = weight.T if layer.endswith(CONV1D) else weight
        made = int4_layer(kind, weight, random) if kind in INT4_KINDS else fp8_layer(kind, layer, weight, random)
        source.layers[layer] = made
        tensors |= {f"{layer}.{part}": tensor.contiguous() for part, tensor in pack(made).items()}
    if kind.endswith("-kv"):
        for layer in source.layers:
            for part in "kv":
                if layer.endswith(f"{part}_proj"):
                    source.kv_scales[f"{layer}.{part}_scale"] = torch.tensor(0.01 + 0.02 * random.random())
    tensors |= source.kv_scales
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    for path in plain.glob("tokenizer*"):
        shutil.copyfile(path, directory / path.name)
    return source


def int4_layer(kind: str, weight: torch.Tensor, random: np.random.Generator) -> Layer:
    has_zero_points, group = INT4_KINDS[kind][2:]
    groups = weight.float().reshape(len(weight), -1, group)
    s = (groups.abs().amax(-1) / 7).to(weight.dtype)  # (out, groups)
    z = random.integers(0, 16, s.shape) if has_zero_points else np.full(s.shape, 8)
    u = (groups / s.float()[..., None]).round().numpy().astype(np.int64) + z[..., None]
    return Layer(s, u=u.clip(0, 15).reshape(weight.shape), z=z)


def fp8_layer(kind: str, name: str, weight: torch.Tensor, random: np.random.Generator) -> Layer:
    weight, by = weight.float(), FP8_KINDS[kind][2]
    if by == "input":
        s = torch.tensor(0.01 if name.endswith(("q_proj", "k_proj", "v_proj")) else 0.02)
    elif by == "layer":
        s = (weight.abs().amax() / 448).reshape(1)
        if kind == "compressed-fp8":
            s = s.to(torch.bfloat16)  # it writes scales in the model's dtype
    elif by == "row":
        s = (weight.abs().amax(1) / 448).to(torch.bfloat16)
    else:
        s = weight.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).abs().amax((1, 3)) / 448
    whole = s.float() if s.dim() < 2 else s.repeat_interleave(128, 0).repeat_interleave(128, 1)
    whole = whole[:, None] if by == "row" else whole
    shared = 0.05 if by == "input" else 0.04 + 0.02 * random.random()
    return Layer(s, codes=(weight / whole).clamp(-448, 448).to(torch.float8_e4m3fn), input_scale=torch.tensor(shared))
