"""What `--quant` and `--kv-cache` mean for memory and for the tensor cores.

Stored tensors come from `tkit.specs.quantization.QUANT_FORMATS`; a format that tkit does not write yet is described here by
the same kind of row, from the layout its engine stores. Knows bytes and operation types; no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tkit.errors import InputError, did_you_mean
from tkit.specs.hardware import Gpu
from tkit.specs.quantization import QUANT_FORMATS, StoredTensor, smaller_groups

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "model": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1,
    "F8_E5M2": 1, "F8_E8M0": 1, "F4": 0.5,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Precision:
    """`math` is the type of the matrix products (activations included), `native_sm` the first GPU whose tensor cores have
    it. Between `min_sm` and `native_sm` engines unpack to 16 bits: the bytes shrink, the products do not get faster.
    """

    name: str
    weight_bits: int
    math: str  # fp16 | fp8 | int8 | fp4
    min_sm: int
    native_sm: int
    tensors: tuple[StoredTensor, ...]  # of one quantized linear layer, as on disk
    resident: tuple[StoredTensor, ...] | None = None  # on the GPU, where that differs
    only_experts: bool = False
    is_written: bool = True  # by `tkit build`
    modules: tuple[tuple[str, Precision], ...] = ()  # `layers.0.attention.qkv` -> its own, where it differs
    size_multiple: int = 1  # of every rank's share of a layer, both ways
    smaller_tensors: tuple[StoredTensor, ...] | None = None  # in groups of half the size, where kernels have them


def _tensors(*rows: tuple[str, str, tuple[int, int] | None, tuple[int, int] | None]) -> tuple[StoredTensor, ...]:
    return tuple(StoredTensor(name=name, dtype=dtype, out_axis=out, in_axis=in_) for name, dtype, out, in_ in rows)


_SCALE = "weights_scaling_factor"
_INT8_CHANNEL = _tensors(("weight", "I8", (0, 1), (1, 1)), (_SCALE, "model", (0, 1), None))
_FP4_GROUP32 = _tensors(("weight", "U8", (0, 1), (1, 2)), (_SCALE, "F8_E8M0", (0, 1), (1, 32)))
_FP8_BLOCK = _tensors(("weight", "F8_E4M3", (0, 1), (1, 1)), (_SCALE, "F32", (0, 128), (1, 128)))

# fmt: off
# name -> (weight bits, math, min_sm, native_sm, tensors where QUANT_FORMATS has no row)
_ROWS: dict[str, tuple[int, str, int, int, tuple[StoredTensor, ...]]] = {
    "none":        (16, "fp16", 70, 70,  ()),
    "fp8":         (8,  "fp8",  89, 89,  ()),
    "fp8_rowwise": (8,  "fp8",  89, 89,  ()),
    "fp8_block":   (8,  "fp8",  89, 89,  _FP8_BLOCK),
    "int8":        (8,  "fp16", 70, 70,  ()),
    "int8_sq":     (8,  "int8", 75, 75,  ()),
    "int4":        (4,  "fp16", 75, 75,  ()),
    "int4_awq":    (4,  "fp16", 75, 75,  ()),
    "int4_gptq":   (4,  "fp16", 75, 75,  ()),
    "w4a8_awq":    (4,  "fp8",  89, 89,  ()),
    "nvfp4":       (4,  "fp4",  100, 100, ()),
    "mxfp4":       (4,  "fp4",  80, 100, _FP4_GROUP32),
}
KV_DTYPES = {"fp16": 2.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0, "nvfp4": 0.5625}  # bytes per value
KV_MIN_SM = {"fp16": 70, "bf16": 80, "fp8": 89, "int8": 70, "nvfp4": 100}
# fmt: on


def mixed(default: str, modules: Mapping[str, str]) -> Precision:
    """One format throughout, except for some modules (`layers.0.attention.qkv`)."""
    others = {name: precision(quant) for name, quant in modules.items() if quant != default}
    return replace(precision(default), modules=tuple(others.items()))


def precision(name: str) -> Precision:
    """The row of `--quant`. Formats known to QUANT_FORMATS alone compute in 16 bits, until a row here says otherwise."""
    if name not in _ROWS and name not in QUANT_FORMATS:
        known = list(dict.fromkeys([*_ROWS, *QUANT_FORMATS]))
        raise InputError(
            f'--quant: unknown quantization "{name}"{did_you_mean(name, known)}', hint=f"known: {', '.join(known)}"
        )
    stored = QUANT_FORMATS.get(name)
    bits, math, min_sm, native_sm, tensors = _ROWS.get(name, (stored.weight_bits if stored else 16, "fp16", 70, 70, ()))
    smaller = smaller_groups(stored) if stored else None
    is_plain = stored is not None and stored.is_stored_plain
    return Precision(
        name=name,
        weight_bits=bits,
        math=math,
        min_sm=min_sm,
        native_sm=native_sm,
        tensors=stored.tensors if stored else tensors,
        resident=_INT8_CHANNEL if is_plain and bits == 8 else None,
        only_experts=name == "mxfp4",
        is_written=stored is not None,
        size_multiple=stored.size_multiple if stored else 1,
        smaller_tensors=smaller.tensors if smaller else None,
    )


def kv_dtype(name: str, weights: Precision, gpu: Gpu | None = None) -> str:
    """`auto`: 8 bits beside 8- or 4-bit floating point weights where the GPU has them, as engines are usually run."""
    if name == "auto":
        has_fp8 = gpu is None or gpu.sm >= KV_MIN_SM["fp8"]
        return "fp8" if weights.math in ("fp8", "fp4") and not weights.only_experts and has_fp8 else "fp16"
    if name not in KV_DTYPES:
        raise InputError(
            f'--kv-cache: unknown type "{name}"{did_you_mean(name, KV_DTYPES)}',
            hint=f"known: auto, {', '.join(KV_DTYPES)}",
        )
    return name
