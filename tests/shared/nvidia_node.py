"""A directory of programs that make this machine look like an NVIDIA node to whoever asks nvidia-smi and trtllm-build."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent


def write_programs(
    directory: Path, *, sm: int = 90, num_gpus: int = 2, free_mib: int = 80_000, version: str | None = "1.2.1"
) -> dict[str, str]:
    """The environment variables with which the programs in `directory` are found. `version` None: no TensorRT-LLM."""
    programs, packages = directory / "bin", directory / "packages"
    programs.mkdir(parents=True, exist_ok=True)
    rows = "\n".join(
        f"{index}, GPU-{index}0000000, NVIDIA H100 80GB HBM3, {sm // 10}.{sm % 10}, 81559, {free_mib}, 580.65.06"
        for index in range(num_gpus)
    )
    _write(programs / "nvidia-smi", f"#!/bin/sh\ncat <<'END'\n{rows}\nEND\n")
    if version is not None:
        package = packages / f"tensorrt_llm-{version}.dist-info"
        package.mkdir(parents=True)
        (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: {version}\n")
        source = (HERE / "trtllm_build.py").read_text().split("\n", 1)[1]
        _write(programs / "trtllm-build", f"#!{sys.executable}\n{source}")
    paths = {"PATH": programs, "PYTHONPATH": packages}
    values = {name: os.pathsep.join(filter(None, [str(path), os.environ.get(name)])) for name, path in paths.items()}
    return {**values, "STAND_IN_SM": str(sm)}


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)
