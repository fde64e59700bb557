"""The backends by name. One row each; a backend is imported when it is used."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Protocol

from tkit.errors import InputError, did_you_mean
from tkit.specs.server import ServeOptions
from tkit.triton.install import TritonInstall
from tkit.triton.repository import ServedModel

# name on an engine's card -> "module:class"
BACKENDS = {
    "reference": "tkit.backends.reference:Reference",
    "tensorrt": "tkit.backends.tensorrt:TensorRT",
    "pytorch": "tkit.backends.pytorch:PyTorch",
}


class Backend(Protocol):
    is_own_python: bool  # its models run in tkit's Python, not in the container's

    def problems(self, engine_dir: Path, options: ServeOptions, install: TritonInstall | None) -> list[str]:
        """What keeps this engine from being served here, one line each."""

    def num_ranks(self, engine_dir: Path) -> int:
        """Server processes that one engine needs."""

    def gpus(self, engine_dir: Path) -> list[str]:
        """The UUIDs of those whose memory its KV cache shares with others'; none where that is torch's affair."""

    def served_models(self, engine_dir: Path, options: ServeOptions, instance: str) -> list[ServedModel]:
        """What Triton loads for an engine; `instance` is a nonce that the config of `ensemble` must give back."""


def find_backend(name: str) -> Backend:
    if name not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise InputError(f'unknown backend "{name}"{did_you_mean(name, BACKENDS)}', hint=f"known: {known}")
    module, _, attribute = BACKENDS[name].partition(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)()
    return backend
