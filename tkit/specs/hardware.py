"""GPUs as a planner sees them: bytes, bytes per second, operations per second, and how they are wired together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Dense rates (no sparsity), per second. A rate of 0 = the tensor cores do not know that type.

    `usable_bytes` is what the driver leaves for programs, not the number on the box. Link rates are per direction.
    """

    name: str
    arch: str
    sm: int
    memory_bytes: int  # the number on the box, decimal
    usable_bytes: int
    bandwidth: float
    fp16_flops: float
    fp8_flops: float
    int8_ops: float
    fp4_flops: float
    nvlink_bandwidth: float  # 0 = none
    nvlink_domain: int  # GPUs that reach each other over NVLink; 1 = none
    pcie_bandwidth: float
    tdp_w: float
    fp16_measured: float = 0.0  # the best matrix product that anybody measured; 0 = nobody published one
    fp8_measured: float = 0.0

    def flops(self, math: str) -> float:
        """Dense operations per second of "fp16", "fp8", "int8" or "fp4" matrix products."""
        return {"fp16": self.fp16_flops, "fp8": self.fp8_flops, "int8": self.int8_ops, "fp4": self.fp4_flops}[math]

    def has_nvlink_across(self, num_gpus: int) -> bool:
        return self.nvlink_domain >= num_gpus and self.nvlink_bandwidth > 0

    def link_bandwidth(self, num_gpus: int) -> float:
        """Of the slowest link that `num_gpus` neighbours have to cross."""
        return self.nvlink_bandwidth if self.has_nvlink_across(num_gpus) else self.pcie_bandwidth
