"""FP8: per tensor with static activations, and per row with dynamic ones.

    scale = amax(|w|) / 448        q = e4m3(w / scale), nearest even, saturating        w ~ q * scale
    activation scale = amax(|x|) / 448 over the calibration tokens (static)

Per row, which looks at weights only, is in data_free.py; its activations are scaled per token when they come.

Layout: TensorRT-LLM `FP8`: weight (out, in) float8_e4m3fn, both scales (1,) float32. Weights with one input have one scale,
that of the largest: trtllm-build fuses fc and gate and would round the codes under the smaller scale a second time; so do
the PyTorch backend and vLLM. `FP8_PER_CHANNEL_PER_TOKEN`: weight and
per_channel_scale (out,) float32. Follows NVIDIA ModelOpt 0.47.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from tkit.quantize.blocks import row_blocks
from tkit.quantize.data_free import FP8_MAX, MIN_ROW_SCALE
from tkit.quantize.statistics import InputStatistics


def fp8_scale(amax: torch.Tensor) -> torch.Tensor:
    """(1,) float32. All-zero tensors get 1.0: any scale is exact, and 0 would divide."""
    scale = amax.float().reshape(1) / FP8_MAX
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def round_to_fp8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (values / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def quantize(weights: Mapping[str, torch.Tensor], inputs: InputStatistics) -> dict[str, dict[str, torch.Tensor]]:
    """{module: {stored tensor: values}} for weights (out, in) that read the same activations."""
    scale = fp8_scale(torch.stack([torch.stack(weight.aminmax()).abs().amax() for weight in weights.values()]).amax())
    stored = {}
    for module, weight in weights.items():
        codes = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
        for block, rows in row_blocks(weight, codes):
            rows.copy_(round_to_fp8(block.float(), scale))
        stored[module] = {
            "weight": codes,
            "weights_scaling_factor": scale,
            "activation_scaling_factor": fp8_scale(inputs.abs_max.amax()),
        }
    return stored


def quantize_experts(weights: Sequence[torch.Tensor], inputs: InputStatistics) -> dict[str, torch.Tensor]:
    """The experts below one another, a weight scale each, and one activation scale for all of them."""
    experts = [quantize({"expert": weight}, inputs)["expert"] for weight in weights]
    return {
        "weight": torch.cat([expert["weight"].view(torch.int8) for expert in experts]).view(torch.float8_e4m3fn),
        "weights_scaling_factor": torch.cat([expert["weights_scaling_factor"] for expert in experts]),
        "activation_scaling_factor": experts[0]["activation_scaling_factor"],
    }


def dequantize_rows(stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(out, in) float32."""
    return stored["weight"].float() * stored["per_channel_scale"][:, None]


def rounded_per_tensor(x: torch.Tensor, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the kernel multiplies by: x (..., in) with the static scale."""
    scale = stored["activation_scaling_factor"]
    return (round_to_fp8(x.float(), scale).float() * scale).to(x.dtype)


def rounded_per_token(x: torch.Tensor) -> torch.Tensor:
    """What the kernel multiplies by: x (..., in) with one dynamic scale per token."""
    scale = (x.float().abs().amax(dim=-1, keepdim=True) / FP8_MAX).clamp(min=MIN_ROW_SCALE)
    return (round_to_fp8(x.float(), scale).float() * scale).to(x.dtype)


def dequantize(stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(out, in) float32."""
    return stored["weight"].float() * stored["weights_scaling_factor"]


def under_scales(
    stored: Mapping[str, torch.Tensor], scale: torch.Tensor, input_scale: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What becomes of a layer that is fused with others under larger scales: its codes are rounded once more. Under its own
    scale every code stays."""
    return {
        "weight": round_to_fp8(dequantize(stored), scale),
        "weights_scaling_factor": scale,
        "activation_scaling_factor": input_scale,
    }


BLOCK = 128  # rows and columns of a weight, columns of an input, that share a scale


def dequantize_blocks(stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(out, in) float32 of a weight with a scale per block, (out/128, in/128) rounded up."""
    weight, scale = stored["weight"].float(), stored["weights_scaling_factor"].float()
    scale = scale.repeat_interleave(BLOCK, dim=0).repeat_interleave(BLOCK, dim=1)
    return weight * scale[: weight.shape[0], : weight.shape[1]]


def rounded_per_block(x: torch.Tensor) -> torch.Tensor:
    """What the kernel multiplies by: x (..., in) with one dynamic scale per token and 128 columns."""
    return torch.cat([rounded_per_token(part) for part in x.split(BLOCK, dim=-1)], dim=-1)
