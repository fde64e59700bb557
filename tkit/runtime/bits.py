"""Raw checkpoint bits <-> torch tensors, without a copy."""

from __future__ import annotations

import numpy as np
import torch

TORCH_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn,
    "F64": torch.float64, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
SAFETENSORS_DTYPES = {dtype: code for code, dtype in TORCH_DTYPES.items()}
_SIGNED = {
    1: np.int8,
    2: np.int16,
    4: np.int32,
    8: np.int64,
}  # torch knows no uint16 arithmetic; the bits are what matters
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def to_torch(raw: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(raw.view(_SIGNED[raw.itemsize])).view(TORCH_DTYPES[dtype])


def to_raw(tensor: torch.Tensor) -> tuple[np.ndarray, str]:
    tensor = tensor.detach().cpu().contiguous()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    return tensor.view(integers).numpy().view(_UNSIGNED[tensor.itemsize]), SAFETENSORS_DTYPES[tensor.dtype]
