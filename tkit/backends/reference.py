"""The reference backend: the written checkpoint itself, in transformers and torch, inside Triton's Python backend."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tkit.backends.nvidia import visible_gpus
from tkit.specs.server import ServeOptions
from tkit.triton.ensemble import ensemble_config
from tkit.triton.install import TritonInstall, has_nvidia_driver
from tkit.triton.probe import INSTANCE_PARAMETER
from tkit.triton.repository import ServedModel

PACKAGES = ("torch", "transformers", "safetensors", "tokenizers")
MODEL_SOURCE = '''"""Loaded by Triton's Python backend, which looks for a class of this name here."""

from tkit.backends.reference_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


class Reference:
    is_own_python = True

    def problems(self, engine_dir: Path, options: ServeOptions, install: TritonInstall | None) -> list[str]:
        missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
        problems = []
        if missing:
            problems.append(f"{', '.join(missing)} not installed; pip install 'tkit[serve]'")
        if not str(engine_dir).isascii():
            problems.append(f"{engine_dir}: Triton's Python backend finds no path that is not ASCII; move the engine")
        if options.device == "cuda" and not has_nvidia_driver():  # WSL and some sandboxes show no driver
            _, problem = visible_gpus()
            if problem is not None:
                problems.append(f"--device cuda: no NVIDIA driver, {problem}")
        return problems

    def num_ranks(self, engine_dir: Path) -> int:
        return 1

    def gpus(self, engine_dir: Path) -> list[str]:
        return []

    def served_models(self, engine_dir: Path, options: ServeOptions, instance: str) -> list[ServedModel]:
        parameters = {
            INSTANCE_PARAMETER: instance,
            "engine_dir": str(engine_dir),
            "device": options.device,
            "max_batch_size": str(options.max_batch_size),
            "max_queue_size": str(options.max_queue_size),
        }
        return [ServedModel(config=ensemble_config(parameters), source=MODEL_SOURCE)]
