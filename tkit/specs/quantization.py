"""Quantized formats: what each stores for one linear layer, by TensorRT-LLM's names. One row per `--quant` value.

Source: TensorRT-LLM 1.0-1.2 `modeling_utils.preprocess_weights`, `quantization/layers.py`; the layout-neutral forms only,
so that a checkpoint written on a laptop loads on every GPU generation. Knows shapes and names; computes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tkit.errors import InputError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a linear layer with weight (out, in), and where those two axes lie in it.

    An axis is (position, features per index): int4 packs two output rows per byte row, so `out_axis=(0, 2)`;
    a scale per 128 inputs has `in_axis=(1, 128)`. An absent axis means that every rank stores the same values.
    `dtype` is a safetensors name, or "model" for the model's own.
    """

    name: str
    dtype: str
    out_axis: tuple[int, int] | None = None
    in_axis: tuple[int, int] | None = None
    hf_name: str | None = None  # in the unified Hugging Face checkpoint
    hf_dtype: str | None = None  # None = the same
    is_transposed: bool = False  # stored the other way around than these axes say
    is_per_expert: bool = False  # in a layer of experts: one value each, where a dense layer has one

    def shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        sizes = {
            axis[0]: features // axis[1]
            for axis, features in ((self.out_axis, out_features), (self.in_axis, in_features))
            if axis is not None
        }
        shape = tuple(sizes[position] for position in sorted(sizes)) or (1,)
        return shape[::-1] if self.is_transposed else shape


@dataclass(frozen=True, kw_only=True)
class QuantFormat:
    """`tensors` replace the plain weight of every quantized linear layer."""

    name: str
    algo: str | None  # quantization.quant_algo in config.json
    weight_bits: int
    tensors: tuple[StoredTensor, ...]
    needs_calibration: bool = False
    group_size: int | None = None
    has_prequant_scale: bool = False
    no_experts: str | None = None  # why layers of experts cannot be quantized in it
    size_multiple: int = 1  # every sharded in and out size, times tp, must be a multiple: the kernels refuse padding

    @property
    def has_zero_point(self) -> bool:
        return any(tensor.name == "zero" for tensor in self.tensors)

    @property
    def is_stored_plain(self) -> bool:
        """The checkpoint holds the model's own weights (W8A16 is quantized by trtllm-build on the target GPU)."""
        return [tensor.dtype for tensor in self.tensors] == ["model"]

    @property
    def has_float_weights(self) -> bool:
        return self.tensors[0].dtype in ("F8_E4M3", "U8")

    @property
    def has_hf_form(self) -> bool:
        """The unified Hugging Face checkpoint has names for its tensors."""
        return all(tensor.hf_name is not None for tensor in self.tensors)


_PLAIN = (StoredTensor(name="weight", dtype="model", out_axis=(0, 1), in_axis=(1, 1)),)
_FP8 = (
    StoredTensor(name="weight", dtype="F8_E4M3", out_axis=(0, 1), in_axis=(1, 1), hf_name="weight"),
    StoredTensor(name="weights_scaling_factor", dtype="F32", hf_name="weight_scale", is_per_expert=True),
    StoredTensor(name="activation_scaling_factor", dtype="F32", hf_name="input_scale"),
)
_FP8_ROWWISE = (
    StoredTensor(name="weight", dtype="F8_E4M3", out_axis=(0, 1), in_axis=(1, 1), hf_name="weight"),
    StoredTensor(name="per_channel_scale", dtype="F32", out_axis=(0, 1), hf_name="weight_scale"),
)
_INT8_SQ = (  # the PyTorch backend has no reader for it
    StoredTensor(name="weight", dtype="I8", out_axis=(0, 1), in_axis=(1, 1)),
    StoredTensor(name="weights_scaling_factor", dtype="F32", out_axis=(0, 1)),
    StoredTensor(name="prequant_scaling_factor", dtype="model", in_axis=(0, 1)),
    StoredTensor(name="activation_scaling_factor", dtype="F32"),
)


def int4_format(
    name: str,
    group_size: int = 128,
    *,
    has_prequant_scale: bool = False,
    has_zero_point: bool = False,
    **options: Any,
) -> QuantFormat:
    """INT4 codes in groups along the input, in the form that every GPU's loader takes."""
    tensors = [
        StoredTensor(name="weight", dtype="I8", out_axis=(0, 2), in_axis=(1, 1), hf_name="weight", hf_dtype="U8"),
        StoredTensor(
            name="weights_scaling_factor",
            dtype="F32",
            out_axis=(0, 1),
            in_axis=(1, group_size),
            hf_name="weight_scale",
        ),
    ]
    if has_prequant_scale:
        tensors.append(
            StoredTensor(name="prequant_scaling_factor", dtype="model", in_axis=(0, 1), hf_name="pre_quant_scale")
        )
    if has_zero_point:  # added to code x scale; the unified Hugging Face form has none
        zero = StoredTensor(name="zero", dtype="model", out_axis=(0, 1), in_axis=(1, group_size), is_transposed=True)
        tensors.append(zero)
    return QuantFormat(
        name=name,
        algo="W4A16_AWQ",
        weight_bits=4,
        tensors=tuple(tensors),
        group_size=group_size,
        has_prequant_scale=has_prequant_scale,
        size_multiple=max(64, group_size),
        **options,
    )


_W4A8 = (
    *int4_format("", has_prequant_scale=True).tensors,
    StoredTensor(name="weights_scaling_factor_2", dtype="F32", hf_name="weight_scale_2"),
    StoredTensor(name="activation_scaling_factor", dtype="F32", hf_name="input_scale"),
)
_NVFP4 = (
    StoredTensor(name="weight", dtype="U8", out_axis=(0, 1), in_axis=(1, 2), hf_name="weight"),
    StoredTensor(
        name="weights_scaling_factor", dtype="F8_E4M3", out_axis=(0, 1), in_axis=(1, 16), hf_name="weight_scale"
    ),
    StoredTensor(name="weights_scaling_factor_2", dtype="F32", hf_name="weight_scale_2"),
    StoredTensor(name="activation_scaling_factor", dtype="F32", hf_name="input_scale"),
)

# fmt: off
QUANT_FORMATS: dict[str, QuantFormat] = {format.name: format for format in (
    QuantFormat(name="none",     algo=None,         weight_bits=16, tensors=_PLAIN),
    QuantFormat(name="int8",     algo="W8A16",      weight_bits=8,  tensors=_PLAIN, size_multiple=64),
    QuantFormat(name="fp8",      algo="FP8",        weight_bits=8,  tensors=_FP8, needs_calibration=True),
    QuantFormat(name="fp8_rowwise", algo="FP8_PER_CHANNEL_PER_TOKEN", weight_bits=8, tensors=_FP8_ROWWISE,
                no_experts="TensorRT-LLM's mixture of experts raises an error"),
    QuantFormat(name="int8_sq",  algo="W8A8_SQ_PER_CHANNEL", weight_bits=8, tensors=_INT8_SQ, needs_calibration=True,
                no_experts="TensorRT-LLM runs them in 16 bits"),
    int4_format("int4"),
    int4_format("int4_awq",  has_prequant_scale=True, needs_calibration=True),
    int4_format("int4_gptq", has_prequant_scale=True, needs_calibration=True),
    QuantFormat(name="w4a8_awq", algo="W4A8_AWQ",   weight_bits=4,  tensors=_W4A8,
                needs_calibration=True, group_size=128, has_prequant_scale=True, size_multiple=128,
                no_experts="TensorRT-LLM's loader makes one alpha of the scales, its experts need one each"),
    QuantFormat(name="nvfp4",    algo="NVFP4",      weight_bits=4,  tensors=_NVFP4,
                needs_calibration=True, group_size=16, size_multiple=16,
                no_experts="TensorRT-LLM's loader takes block scales of two dimensions, those of experts have three"),
)}
# fmt: on


# NVIDIA ModelOpt's INT8 without activations: codes in rows, which no loader of TensorRT-LLM's takes; read, never written
INT8_CODES = QuantFormat(
    name="int8_codes",
    algo="W8A16",
    weight_bits=8,
    tensors=(
        StoredTensor(name="weight", dtype="I8", out_axis=(0, 1), in_axis=(1, 1)),
        StoredTensor(name="weights_scaling_factor", dtype="F32", out_axis=(0, 1)),
    ),
)


def smaller_groups(format: QuantFormat) -> QuantFormat | None:
    """The same format in groups of 64, which the INT4 kernels for 16-bit activations have as well; None without such."""
    if format.algo != "W4A16_AWQ" or format.group_size != 128:
        return None
    return int4_format(
        format.name,
        64,
        has_prequant_scale=format.has_prequant_scale,
        needs_calibration=format.needs_calibration,
    )


def quant_format(name: str, where: str = "--quant") -> QuantFormat:
    if name not in QUANT_FORMATS:
        near = did_you_mean(name, QUANT_FORMATS) or f", expected one of {', '.join(QUANT_FORMATS)}"
        raise InputError(f'{where}: unknown quantization "{name}"{near}')
    return QUANT_FORMATS[name]
