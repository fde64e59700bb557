"""What this machine has of NVIDIA's: GPUs, TensorRT-LLM and the releases of its containers. Starts nothing, needs no torch."""

from __future__ import annotations

import csv
import functools
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tkit.triton.install import others_path

CONTAINERS = Path(__file__).with_name("data") / "containers.csv"
IMAGE = "nvcr.io/nvidia/tritonserver:{release}-trtllm-python-py3"
RELEASE_VARIABLE = "NVIDIA_TRITON_SERVER_VERSION"  # set inside NVIDIA's containers
PROGRAM = "trtllm-build"
QUESTION_TIMEOUT_S = 60  # nvidia-smi wakes sleeping GPUs one by one
_SMI_FIELDS = "index,uuid,name,compute_cap,memory.total,memory.free,driver_version"


@dataclass(frozen=True, kw_only=True)
class GpuDevice:
    index: int
    uuid: str
    name: str
    sm: int
    memory_bytes: int
    free_bytes: int
    driver: str


@dataclass(frozen=True, kw_only=True)
class Machine:
    """`gpus_problem` says why there are none. `environment`: where its programs are looked for, None for nowhere."""

    gpus: tuple[GpuDevice, ...] = ()
    gpus_problem: str | None = None
    trtllm_build: Path | None = None
    release: str | None = None  # of NVIDIA's container, where this is one
    environment: Mapping[str, str] | None = field(default=None, repr=False, compare=False)

    @functools.cached_property
    def trtllm_version(self) -> str | None:
        """That of the Python that `trtllm-build` runs in; asked only where it matters, as another Python answers."""
        return None if self.environment is None else tensorrt_llm_version(self.trtllm_build, self.environment)

    @property
    def sms(self) -> tuple[int, ...]:
        return tuple(sorted({gpu.sm for gpu in self.gpus}))


def this_machine(environment: Mapping[str, str] = os.environ) -> Machine:
    gpus, problem = visible_gpus(environment)
    build = shutil.which(PROGRAM, path=environment.get("PATH"))
    return Machine(
        gpus=gpus,
        gpus_problem=problem,
        trtllm_build=Path(build) if build else None,
        release=environment.get(RELEASE_VARIABLE),
        environment=environment,
    )


def visible_gpus(environment: Mapping[str, str] = os.environ) -> tuple[tuple[GpuDevice, ...], str | None]:
    """(GPUs in the order CUDA numbers them, None), or ((), why there are none). $CUDA_VISIBLE_DEVICES hides the others."""
    program = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if program is None:
        return (), "no nvidia-smi on PATH"
    command = [program, f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader,nounits"]
    output, problem = _answer(command, environment)
    if problem:
        return (), problem
    try:
        gpus = [_gpu(row) for row in csv.reader(output.splitlines(), skipinitialspace=True) if row]
    except ValueError:
        return (), f"nvidia-smi answered {output.strip()[:200]!r}"
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = _chosen(gpus, [name.strip() for name in visible.split(",") if name.strip()])
        if not gpus:
            return (), f'CUDA_VISIBLE_DEVICES is "{visible}" and leaves none'
    return tuple(gpus), None if gpus else "nvidia-smi lists none"


def _chosen(gpus: list[GpuDevice], names: list[str]) -> list[GpuDevice]:
    """By index or the beginning of a UUID, in the order named. CUDA stops at the first name that means nothing."""
    chosen: list[GpuDevice] = []
    for name in names:
        gpu = next((gpu for gpu in gpus if name == str(gpu.index) or gpu.uuid.startswith(name)), None)
        if gpu is None:
            break
        chosen.append(gpu)
    return chosen


def _gpu(row: list[str]) -> GpuDevice:
    index, uuid, name, capability, total_mib, free_mib, driver = row
    return GpuDevice(
        index=int(index),
        uuid=uuid,
        name=name,
        sm=int(capability.replace(".", "")),
        memory_bytes=int(total_mib) << 20,
        free_bytes=int(free_mib) << 20,
        driver=driver,
    )


def tensorrt_llm_version(build: Path | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """Of the package behind trtllm-build, or behind `python3` where that program is gone (from 1.3 on).

    Asked of that Python, since tkit may live in another; from the package's metadata, since importing it takes a minute.
    """
    python = (_interpreter(build) if build else None) or shutil.which("python3", path=others_path(environment))
    if python is None:
        return None
    code = "from importlib.metadata import version; print(version('tensorrt_llm'))"
    output, problem = _answer([python, "-c", code], environment)
    return None if problem else output.strip() or None


def _interpreter(script: Path) -> str | None:
    with open(script, "rb") as file:
        first = file.readline(4096).decode("utf-8", "replace").strip()
    words = first[2:].split() if first.startswith("#!") else []
    return words[0] if words and "python" in Path(words[0]).name else None


def _answer(command: list[str], environment: Mapping[str, str]) -> tuple[str, str | None]:
    """(stdout, None), or ("", what went wrong)."""
    name = Path(command[0]).name
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=QUESTION_TIMEOUT_S, env=dict(environment), check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"{name}: {error}"
    if result.returncode:
        said = (result.stderr or result.stdout).strip().splitlines()
        return "", f"{name} ended with exit code {result.returncode}: {said[-1] if said else 'no message'}"
    return result.stdout, None


def is_engine_builder(version: str) -> bool:
    """Does this TensorRT-LLM read tkit's checkpoint and compile it? The program is gone from 1.3 on."""
    return (1, 0) <= _major_minor(version) < (1, 3)


def has_llm_api(version: str) -> bool:
    """Does this TensorRT-LLM serve a unified Hugging Face checkpoint?"""
    return _major_minor(version) >= (1, 0)


def _major_minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:2])


@functools.cache
def container_table() -> dict[str, str]:
    """{release of NVIDIA's Triton container: its TensorRT-LLM}, the newest first."""
    with open(CONTAINERS, encoding="utf-8", newline="") as file:
        return {row["release"]: row["tensorrt_llm"] for row in csv.DictReader(file)}


def container_with(version: str) -> str | None:
    """The newest container release that carries exactly this TensorRT-LLM."""
    return next((release for release, carried in container_table().items() if carried == version), None)
