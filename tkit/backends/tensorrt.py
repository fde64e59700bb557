"""The tensorrt backend: engines that trtllm-build compiled, in TensorRT-LLM's own Triton models. Runs in NVIDIA's container.

The Python models' code is the container's own (`/app/all_models`): it belongs to its TensorRT-LLM and changes with it. tkit
writes their configs, which are the interface, and links the code.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tkit.backends.nvidia import IMAGE, Machine, container_table, container_with, this_machine
from tkit.files import read_json
from tkit.specs.server import ServeOptions
from tkit.triton.inflight_batcher import PYTHON_MODELS, InflightBatcher, inflight_batcher_configs
from tkit.triton.install import TritonInstall
from tkit.triton.probe import INSTANCE_PARAMETER
from tkit.triton.repository import ServedModel
from tkit.units import format_bytes

ENGINE_DIR = "trt"
MODELS_VARIABLE = "TKIT_TRTLLM_MODELS"
CONTAINER_MODELS = Path("/app/all_models")
INFLIGHT_BATCHER = "inflight_batcher_llm"


class TensorRT:
    is_own_python = False

    def problems(self, engine_dir: Path, options: ServeOptions, install: TritonInstall | None) -> list[str]:
        machine, config = this_machine(), read_engine_config(engine_dir)
        return [
            *_version_problems(config["version"], machine),
            *backend_problems(install),
            *_gpu_problems(engine_dir, config, machine),
            *code_problems(model_code()),
            *tokenizer_problems(engine_dir / "tokenizer"),
        ]

    def num_ranks(self, engine_dir: Path) -> int:
        return world_size(read_engine_config(engine_dir))

    def gpus(self, engine_dir: Path) -> list[str]:
        return [gpu.uuid for gpu in this_machine().gpus[: self.num_ranks(engine_dir)]]

    def served_models(self, engine_dir: Path, options: ServeOptions, instance: str) -> list[ServedModel]:
        return served_models(engine_dir, options, {INSTANCE_PARAMETER: instance}, models_directory())


def served_models(
    engine_dir: Path, options: ServeOptions, parameters: dict[str, str], models: Path, mounted_as: Path | None = None
) -> list[ServedModel]:
    """The five models. `mounted_as`: where the server will see the engine, when that is not where it lies here."""
    config, place = read_engine_config(engine_dir), mounted_as or engine_dir
    build = config["build_config"]
    spec = InflightBatcher(
        engine_dir=str(place / ENGINE_DIR),
        tokenizer_dir=str(place / "tokenizer"),
        max_batch_size=build["max_batch_size"],
        max_beam_width=build["max_beam_width"],
        max_queue_size=options.max_queue_size,
        kv_cache_fraction=options.kv_cache_fraction,
        has_paged_context=bool(build["plugin_config"]["use_paged_context_fmha"]),
        parameters=parameters,
    )
    return [
        ServedModel(
            config=model,
            links={
                name: _code(models / INFLIGHT_BATCHER, model.name, name) for name in PYTHON_MODELS.get(model.name, ())
            },
        )
        for model in inflight_batcher_configs(spec)
    ]


def model_code() -> list[Path]:
    """What the container must have, relative to `models_directory`."""
    return [_code(Path(INFLIGHT_BATCHER), model, name) for model, names in PYTHON_MODELS.items() for name in names]


def _code(directory: Path, model: str, name: str) -> Path:
    return directory / model / "1" / name


def read_engine_config(engine_dir: Path) -> dict[str, Any]:
    """config.json as trtllm-build wrote it."""
    config: dict[str, Any] = read_json(engine_dir / ENGINE_DIR / "config.json")
    return config


def world_size(config: dict[str, Any]) -> int:
    return int(config["pretrained_config"]["mapping"]["world_size"])


def models_directory() -> Path:
    """Where TensorRT-LLM's Triton models lie on this machine."""
    return Path(os.environ.get(MODELS_VARIABLE) or CONTAINER_MODELS)


def _version_problems(version: str, machine: Machine) -> list[str]:
    here = machine.trtllm_version or container_table().get(machine.release or "")
    release = container_with(version)
    image = f"use {IMAGE.format(release=release)}, or " if release else ""
    if here is None:
        return [f"no TensorRT-LLM here; the engine is of {version}: {image}serve its checkpoint with another backend"]
    if here != version:
        return [f"the engine is of TensorRT-LLM {version}, this machine has {here}: {image}compile it here"]
    return []


def backend_problems(install: TritonInstall | None) -> list[str]:
    if install is not None and install.is_wheel:
        return [f"{install.binary} is the wheel's, which has no tensorrtllm backend; run tkit in NVIDIA's container"]
    if install is not None and not (install.root / "backends" / "tensorrtllm").is_dir():
        return [f"{install.root}/backends has no tensorrtllm; the container's tag must end in trtllm-python-py3"]
    return []


def _gpu_problems(engine_dir: Path, config: dict[str, Any], machine: Machine) -> list[str]:
    ranks = world_size(config)
    if machine.gpus_problem:
        return [f"no GPU: {machine.gpus_problem}"]
    problems = []
    if ranks > len(machine.gpus):
        problems.append(f"the engine spans {ranks} GPUs, this machine shows {len(machine.gpus)}")
    if ranks > 1 and shutil.which("mpirun") is None:
        problems.append(f"no mpirun on PATH, which starts the {ranks} processes of the engine")
    sm = read_json(engine_dir / "engine.json")["compiled"]["sm"]
    for rank, gpu in enumerate(machine.gpus[:ranks]):
        if gpu.sm != sm:
            problems.append(f"GPU {gpu.index} {gpu.name} is SM {gpu.sm}, the engine is compiled for SM {sm}")
        needed = (engine_dir / ENGINE_DIR / f"rank{rank}.engine").stat().st_size
        if gpu.free_bytes < needed:
            free = format_bytes(gpu.free_bytes)
            problems.append(f"GPU {gpu.index} has {free} free, rank {rank} takes {format_bytes(needed)} and a KV cache")
    return problems


def code_problems(paths: Iterable[Path]) -> list[str]:
    """Which of the container's model files are missing."""
    directory = models_directory()
    missing = [str(path) for path in paths if not (directory / path).exists()]
    if not missing:
        return []
    return [f"{directory} lacks {', '.join(missing)}; ${MODELS_VARIABLE} says where TensorRT-LLM's Triton models lie"]


def tokenizer_problems(directory: Path) -> list[str]:
    """transformers' AutoTokenizer must find what it needs; the preprocessing model takes the end token's id from it."""
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return [f"{path}: missing, and the container's preprocessing loads the tokenizer by it"]
    if not read_json(path).get("eos_token"):
        return [f"{path}: no eos_token, without which the container's preprocessing does not start"]
    return []
