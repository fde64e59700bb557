"""Doctor: can this machine do what is asked of it? A check per line, each with what to do. Changes nothing, needs no torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from tkit import __version__
from tkit.backends import pytorch, tensorrt
from tkit.backends.nvidia import IMAGE, Machine, container_table, container_with, is_engine_builder
from tkit.gateway.settings import missing_packages
from tkit.specs.diagnosis import ASKABLE, Check, Diagnosis
from tkit.specs.server import PORTS, ServeOptions
from tkit.stages.compile import machine_problems
from tkit.stages.engines import ENGINES_DIR
from tkit.triton.install import (
    NVIDIA_DRIVER,
    SHARED_MEMORY,
    find_install,
    install_problems,
    library_directory,
    port_problems,
    shared_memory_problems,
)
from tkit.units import format_bytes

BACKENDS = ("reference", "tensorrt", "pytorch")
CONVERT_PACKAGES = ("torch", "transformers", "safetensors", "huggingface_hub", "ml_dtypes")
# The demo's engines take a few megabytes, an 8 B model in 16 bits 16 GB.
LITTLE_DISK, NO_DISK = 20_000_000_000, 100_000_000
# A sweep of 512 concurrent requests over HTTP holds a connection for each, on both sides of a loopback.
OPEN_FILES = 2048
STACK_BYTES = 64 << 20  # Triton's HTTP server needs that much for bodies in many pieces


@dataclass(frozen=True, kw_only=True)
class _Asked:
    command: str
    backend: str
    machine: Machine
    options: ServeOptions


def diagnose(command: str, backend: str, machine: Machine, options: ServeOptions) -> Diagnosis:
    """`backend` "auto" is what `tkit build` would take here. Every check runs; what was not asked for can only warn."""
    if backend == "auto":
        backend = "reference" if machine_problems(machine) else "tensorrt"
    asked = _Asked(command=command, backend=backend, machine=machine, options=options)
    checks = []
    for row in _ROWS:
        is_needed = backend in row.needed.get(command, ())
        for check in row.look(asked):
            if check.status == "fail" and not is_needed:
                check = Check(name=check.name, status="warn", found=check.found, fix=check.fix)
            checks.append(check)
    return Diagnosis(command=command, backend=backend, checks=tuple(checks))


def _versions(asked: _Asked) -> Iterator[Check]:
    found = f"tkit {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    if sys.version_info >= (3, 13) and asked.backend == "reference":
        fix = "use Python 3.11 or 3.12 to serve without NVIDIA's container: the wheel's Triton has no stub for this one"
        yield Check(name="versions", status="warn", found=found, fix=fix)
    else:
        yield Check(name="versions", status="ok", found=found)


def _packages(asked: _Asked) -> Iterator[Check]:
    versions = {name: _version(name) for name in CONVERT_PACKAGES}
    found = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    if None in versions.values():
        yield Check(name="packages", status="fail", found=found, fix="pip install 'tkit[convert]'")
    else:
        yield Check(name="packages", status="ok", found=found)


def _front(asked: _Asked) -> Iterator[Check]:
    missing = missing_packages()
    if missing:
        found = f"{', '.join(missing)} missing"
        yield Check(name="openai front", status="fail", found=found, fix="pip install 'tkit[serve]'")
    else:
        yield Check(name="openai front", status="ok", found="its packages are installed")


def _driver(asked: _Asked) -> Iterator[Check]:
    if asked.machine.gpus:
        yield Check(name="driver", status="ok", found=f"NVIDIA {asked.machine.gpus[0].driver}")
    elif NVIDIA_DRIVER.exists():
        found = NVIDIA_DRIVER.read_text().splitlines()[0].strip()
        yield Check(
            name="driver",
            status="fail",
            found=found,
            fix=f"{asked.machine.gpus_problem}: container without --gpus all?",
        )
    else:
        fix = "needed for TensorRT-LLM and CUDA only; install NVIDIA's driver, or start the container with --gpus all"
        yield Check(name="driver", status="fail", found="no NVIDIA driver", fix=fix)


def _gpus(asked: _Asked) -> Iterator[Check]:
    for gpu in asked.machine.gpus:
        memory = f"{format_bytes(gpu.free_bytes)} of {format_bytes(gpu.memory_bytes)} free"
        found = f"{gpu.name}, SM {gpu.sm}, {memory}"
        if gpu.free_bytes < gpu.memory_bytes // 2:
            fix = "something else uses it: see nvidia-smi, or choose others with CUDA_VISIBLE_DEVICES"
            yield Check(name=f"gpu {gpu.index}", status="warn", found=found, fix=fix)
        else:
            yield Check(name=f"gpu {gpu.index}", status="ok", found=found)
    if not asked.machine.gpus:
        fix = "the reference backend runs on the CPU; the others need a GPU that nvidia-smi lists"
        yield Check(name="gpus", status="fail", found=f"none: {asked.machine.gpus_problem}", fix=fix)
    if len(asked.machine.sms) > 1:
        found = f"SM {', '.join(map(str, asked.machine.sms))}"
        fix = "an engine runs on one generation; choose with CUDA_VISIBLE_DEVICES"
        yield Check(name="gpus", status="fail", found=found, fix=fix)


def _tensorrt_llm(asked: _Asked) -> Iterator[Check]:
    machine, newest = asked.machine, next(filter(is_engine_builder, container_table().values()))
    image = IMAGE.format(release=container_with(newest))
    name = "tensorrt-llm"
    if machine.trtllm_version is None:
        fix = f"NVIDIA's container has it: {image} carries {newest}"
        yield Check(name=name, status="fail", found="not installed", fix=fix)
        return
    where = f"; {machine.trtllm_build}" if machine.trtllm_build else "; no trtllm-build"
    found = machine.trtllm_version + where
    expected = container_table().get(machine.release or "", machine.trtllm_version)
    if expected != machine.trtllm_version:
        fix = f"container {machine.release} came with {expected}, and its Triton backend is built for that"
        yield Check(name=name, status="fail", found=found, fix=fix)
    elif asked.backend != "pytorch" and not is_engine_builder(machine.trtllm_version):
        fix = f"engines are built and served by 1.0 to 1.2: use {image}, or --backend pytorch"
        yield Check(name=name, status="fail", found=found, fix=fix)
    elif asked.backend == "tensorrt" and machine.trtllm_build is None:
        yield Check(name=name, status="fail", found=found, fix=f"put trtllm-build on PATH, or use {image}")
    else:
        yield Check(name=name, status="ok", found=found)


def _mpi(asked: _Asked) -> Iterator[Check]:
    path = shutil.which("mpirun")
    if path is not None:
        yield Check(name="mpirun", status="ok", found=path)
    elif len(asked.machine.gpus) > 1:
        fix = (
            "an engine on several GPUs is served by one process each, which mpirun starts; it is in NVIDIA's container"
        )
        yield Check(name="mpirun", status="fail", found="not on PATH", fix=fix)


def _triton(asked: _Asked) -> Iterator[Check]:
    install = find_install()
    problems = install_problems(install)
    if asked.backend == "tensorrt":
        problems = tensorrt.backend_problems(install) or problems
    found = f"{install.binary} ({install.origin})" if install is not None else "none"
    if problems:
        for problem in problems:
            yield Check(name="triton", status="fail", found=found, fix=problem)
    else:
        yield Check(name="triton", status="ok", found=found)


def _models(asked: _Asked) -> Iterator[Check]:
    code = {"tensorrt": tensorrt.model_code, "pytorch": pytorch.model_code}.get(asked.backend)
    if code is None:
        return
    directory = str(tensorrt.models_directory())
    problems = tensorrt.code_problems(code())
    for problem in problems:
        yield Check(name="models", status="fail", found=directory, fix=problem)
    if not problems:
        yield Check(name="models", status="ok", found=f"TensorRT-LLM's Triton models in {directory}")


def _libpython(asked: _Asked) -> Iterator[Check]:
    install = find_install()
    directory = library_directory()
    if directory is not None:
        yield Check(name="libpython", status="ok", found=f"shared, in {directory}")
    elif install is None or install.is_wheel:
        fix = "the wheel's Triton loads it: use a Python built with --enable-shared"
        yield Check(name="libpython", status="fail", found="no shared library", fix=fix)


def _numpy(asked: _Asked) -> Iterator[Check]:
    install, version = find_install(), _version("numpy")
    if version is None:
        yield Check(name="numpy", status="fail", found="missing", fix="pip install numpy")
    elif int(version.split(".")[0]) >= 2 and (install is None or install.is_wheel):
        fix = "the wheel's Triton aborts on the first request; pip install 'numpy<2'"
        yield Check(name="numpy", status="fail", found=version, fix=fix)
    else:
        yield Check(name="numpy", status="ok", found=version)


def _disk(asked: _Asked) -> Iterator[Check]:
    directory = next(path for path in (ENGINES_DIR, Path.cwd()) if path.is_dir())
    free = shutil.disk_usage(directory).free
    found = f"{format_bytes(free)} free for {ENGINES_DIR}/"
    if not os.access(directory, os.W_OK):
        found = f"{directory} is read-only"
        yield Check(name="disk", status="fail", found=found, fix="go to another directory, or build with --out")
        return
    status = "fail" if free < NO_DISK else "warn" if free < LITTLE_DISK else "ok"
    fix = None if status == "ok" else "an 8 B model takes 16 GB in 16 bits; free some, or build elsewhere with --out"
    yield Check(name="disk", status=status, found=found, fix=fix)


def _memory(asked: _Asked) -> Iterator[Check]:
    memory = psutil.virtual_memory()
    yield Check(
        name="memory",
        status="ok",
        found=f"{format_bytes(memory.available)} of {format_bytes(memory.total)} available",
    )


def _shared_memory(asked: _Asked) -> Iterator[Check]:
    problems = shared_memory_problems()
    for problem in problems:
        yield Check(name="shm", status="fail", found=str(SHARED_MEMORY), fix=problem)
    if not problems:
        free = format_bytes(shutil.disk_usage(SHARED_MEMORY).free)
        yield Check(name="shm", status="ok", found=f"{free} free in {SHARED_MEMORY}")


def _ports(asked: _Asked) -> Iterator[Check]:
    options = asked.options
    ports = {f"--{name.replace('_', '-')}": port for name, port in zip(PORTS, options.ports, strict=True)}
    taken = port_problems(options.host, ports)
    for problem in taken:
        fix = "tkit stop, if it is a server of tkit; or choose another port, 0 for any free one"
        yield Check(name="ports", status="warn", found=problem, fix=fix)
    if not taken:
        numbers = ", ".join(map(str, ports.values()))
        yield Check(name="ports", status="ok", found=f"{numbers} free on {options.host}")


def _limits(asked: _Asked) -> Iterator[Check]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{files} open files"
    if files < OPEN_FILES:
        yield Check(name="limits", status="warn", found=found, fix=f"ulimit -n {OPEN_FILES}, for high concurrencies")
    else:
        yield Check(name="limits", status="ok", found=found)
    _, stack = resource.getrlimit(resource.RLIMIT_STACK)
    if 0 <= stack < STACK_BYTES:
        fix = "docker: --ulimit stack=67108864; Triton's HTTP server dies of bodies that come in many pieces"
        yield Check(name="limits", status="warn", found=f"{format_bytes(stack)} of stack at most", fix=fix)
    _, locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked >= 0 and asked.machine.gpus:
        fix = "docker: --ulimit memlock=-1; transfers between GPUs lock memory"
        yield Check(name="limits", status="warn", found=f"{format_bytes(locked)} locked memory at most", fix=fix)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class _Row:
    """A check, and what cannot be done where it fails."""

    look: Callable[[_Asked], Iterator[Check]]
    needed: Mapping[str, tuple[str, ...]]  # command -> backends


_EVERY = dict.fromkeys(ASKABLE, BACKENDS)
_GPU = ("tensorrt", "pytorch")
_REFERENCE = ("reference",)
# fmt: off
_ROWS = (
    _Row(_versions,      _EVERY),
    _Row(_packages,      {"build": BACKENDS, "validate": BACKENDS, "serve": _REFERENCE}),
    _Row(_front,         {"serve": BACKENDS}),
    _Row(_driver,        {"build": ("tensorrt",), "serve": _GPU}),
    _Row(_gpus,          {"build": ("tensorrt",), "serve": _GPU}),
    _Row(_tensorrt_llm,  {"build": ("tensorrt",), "serve": _GPU}),
    _Row(_mpi,           {"serve": ("tensorrt",)}),
    _Row(_triton,        {"serve": BACKENDS}),
    _Row(_models,        {"serve": _GPU}),
    _Row(_libpython,     {"serve": _REFERENCE}),
    _Row(_numpy,         {"serve": _REFERENCE}),
    _Row(_disk,          {"build": BACKENDS}),
    _Row(_memory,        _EVERY),
    _Row(_shared_memory, {"serve": BACKENDS}),
    _Row(_ports,         {"serve": BACKENDS}),
    _Row(_limits,        {"serve": BACKENDS, "sweep": BACKENDS}),
)
# fmt: on
