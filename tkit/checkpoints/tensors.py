"""Tensors as bits. A move never computes, so it needs neither torch nor a bfloat16 type: two bytes are two bytes.

Raw arrays are numpy unsigned integers of the item's width, with the safetensors dtype name carried beside them.
"""

from __future__ import annotations

import numpy as np

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOAT_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # safetensors name -> config.json name
SAFETENSORS_DTYPE = {name: code for code, name in FLOAT_DTYPES.items()}
RAW_DTYPES: dict[int, type[np.unsignedinteger]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def raw_dtype(dtype: str) -> type[np.unsignedinteger]:
    return RAW_DTYPES[ITEM_BYTES[dtype]]


def raw_bytes(contiguous: np.ndarray) -> memoryview:
    """The array's memory, not a copy."""
    return contiguous.reshape(-1).view(np.uint8).data


def to_float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    """The values of BF16, F16 or F32 bits. BF16 is the upper half of a float32."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return raw.view(np.float16).astype(np.float32)
    return raw.view(np.float32)


def cast(raw: np.ndarray, dtype: str, target: str) -> np.ndarray:
    """Bits of `dtype` as bits of `target`, rounded to nearest even; a no-op when they are the same."""
    if dtype == target:
        return raw
    values = to_float32(raw, dtype)
    if target == "F32":
        return values.view(np.uint32)
    if target == "F16":
        with np.errstate(over="ignore"):  # values beyond 65504 become inf and are caught by the finite check
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def transformed(raw: np.ndarray, dtype: str, transform: str | None) -> tuple[np.ndarray, str]:
    """A source tensor as its move stacks it, and its dtype then. Elementwise results are rounded once, from float32."""
    if transform is None:
        return raw, dtype
    if transform == "transpose":
        return raw.T, dtype
    if transform == "float32":
        return cast(raw, dtype, "F32"), "F32"
    assert transform == "add_one", transform
    return cast((to_float32(raw, dtype) + np.float32(1)).view(np.uint32), "F32", dtype), dtype


# bits of +infinity: everything from there up to the sign bit, and from its negative up to all ones, is infinite or NaN
# (F8_E4M3 has no infinity, and one NaN of each sign: all other bits set)
INFINITY_BITS = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F8_E4M3": 0x7F}


def count_nonfinite(raw: np.ndarray, dtype: str) -> int:
    """How many values are NaN or infinite. Two reductions over the bits and no temporary where all are finite."""
    infinity = INFINITY_BITS.get(dtype)
    if infinity is None or raw.size == 0:
        return 0
    sign = 1 << (8 * raw.itemsize - 1)
    largest_positive = int(raw.view(f"i{raw.itemsize}").max())
    if largest_positive < infinity and int(raw.max()) < sign + infinity:
        return 0
    return int(np.count_nonzero((raw & raw.dtype.type(infinity)) == infinity))


def is_zero(raw: np.ndarray) -> bool:
    """Whether every bit is zero; looks at the first row first, which is nearly always the answer."""
    return not raw[:1].any() and not raw.any()
