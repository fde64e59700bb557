"""The GPU table: `data/gpus.csv`, one row per card, each with the page its numbers come from."""

from __future__ import annotations

import csv
import functools
import re
from pathlib import Path

from tkit.errors import InputError, did_you_mean
from tkit.specs.hardware import Gpu

TABLE = Path(__file__).with_name("data") / "gpus.csv"
GPUS_PER_NODE = 8
# what people type -> the card they most likely mean
ALIASES = {
    "a100": "A100-SXM-80", "a100-40": "A100-SXM-40", "a100-80": "A100-SXM-80", "a100-pcie": "A100-PCIe-80",
    "h100": "H100-SXM", "h100-80": "H100-SXM", "h200": "H200-SXM", "gh200": "GH200-96", "v100": "V100-SXM2-32",
    "4090": "RTX-4090", "5090": "RTX-5090", "rtx4090": "RTX-4090", "rtx5090": "RTX-5090",
    "rtx-pro-6000": "RTX-PRO-6000-SE",
}  # fmt: skip

# as the driver names the cards of the table
DEVICE_NAMES = {
    "Tesla T4": "T4", "Tesla V100-SXM2-32GB": "V100-SXM2-32", "Tesla V100-PCIE-32GB": "V100-PCIe-32",
    "NVIDIA A10": "A10", "NVIDIA A30": "A30", "NVIDIA A100-SXM4-40GB": "A100-SXM-40",
    "NVIDIA A100-SXM4-80GB": "A100-SXM-80", "NVIDIA A100-PCIE-40GB": "A100-PCIe-40",
    "NVIDIA A100 80GB PCIe": "A100-PCIe-80", "NVIDIA L4": "L4", "NVIDIA L40S": "L40S",
    "NVIDIA H100 80GB HBM3": "H100-SXM", "NVIDIA H100 PCIe": "H100-PCIe", "NVIDIA H100 NVL": "H100-NVL",
    "NVIDIA H200": "H200-SXM", "NVIDIA H200 NVL": "H200-NVL", "NVIDIA GH200 480GB": "GH200-96",
    "NVIDIA GH200 144G HBM3e": "GH200-144", "NVIDIA B200": "B200", "NVIDIA GB200": "GB200",
    "NVIDIA B300 SXM6 AC": "B300", "NVIDIA GB300": "GB300", "NVIDIA GeForce RTX 4090": "RTX-4090",
    "NVIDIA GeForce RTX 5090": "RTX-5090", "NVIDIA RTX PRO 6000 Blackwell Server Edition": "RTX-PRO-6000-SE",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "RTX-PRO-6000-WS",
}  # fmt: skip


def gpu_of_device(name: str) -> Gpu | None:
    """The row of a card that calls itself so; None for one that has none."""
    return gpu_table().get(DEVICE_NAMES.get(name, name))


@functools.cache
def find_gpu(name: str, where: str = "--gpu") -> Gpu:
    """By the table's name or a usual short one, in any case. Raises InputError with the near name."""
    gpus = gpu_table()
    by_key = {_key(known): known for known in gpus} | {_key(alias): known for alias, known in ALIASES.items()}
    key = _key(name)
    if key not in by_key:
        near = did_you_mean(name.lower(), [*(known.lower() for known in gpus), *ALIASES])
        raise InputError(f'{where}: unknown GPU "{name}"{near}', hint=f"known: {', '.join(gpus)}")
    return gpus[by_key[key]]


@functools.cache
def gpu_table() -> dict[str, Gpu]:
    with open(TABLE, encoding="utf-8", newline="") as file:
        return {row["gpu"]: _gpu(row) for row in csv.DictReader(file)}


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _gpu(row: dict[str, str]) -> Gpu:
    nvlink = float(row["nvlink_per_dir_gbs"] or 0) * 1e9
    return Gpu(
        name=row["gpu"],
        arch=row["arch"],
        sm=int(row["sm"]),
        memory_bytes=int(float(row["memory_gb"]) * 1e9),
        usable_bytes=int(row["usable_bytes"]),
        bandwidth=float(row["mem_bw_gbs"]) * 1e9,
        fp16_flops=float(row["tflops_fp16_bf16_dense"]) * 1e12,
        fp8_flops=float(row["tflops_fp8_dense"] or 0) * 1e12,
        int8_ops=float(row["tops_int8_dense"] or 0) * 1e12,
        fp4_flops=float(row["tflops_fp4_dense"] or 0) * 1e12,
        nvlink_bandwidth=nvlink,
        nvlink_domain=_domain(row["nvlink_domain"]) if nvlink else 1,
        pcie_bandwidth=float(row["pcie_per_dir_gbs"]) * 1e9,
        tdp_w=float(row["tdp_w"]),
        fp16_measured=float(row["mamf_bf16_tflops"] or 0) * 1e12,
        fp8_measured=float(row["mamf_fp8_tflops"] or 0) * 1e12,
    )


def _domain(text: str) -> int:
    """The larger of `8 (NVSwitch)`, `2 (bridge)`, `8-16`; an unstated size (V100) counts as 8. A bridge that is an option is
    planned without: published results of such cards show PCIe."""
    numbers = [int(number) for number in re.findall(r"\d+", text.split("(")[0])]
    return min(max(numbers), 72) if numbers else GPUS_PER_NODE
