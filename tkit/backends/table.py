"""The backends by name. One row each; a backend is imported when it is used."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Protocol

from tkit.errors import InputError, did_you_mean
from tkit.specs.server import ServeOptions
from tkit.triton.repository import ServedModel

# name on an engine's card -> "module:class"
BACKENDS = {
    "reference": "tkit.backends.reference:Reference",
}


class Backend(Protocol):
    def problems(self, device: str) -> list[str]:
        """What this machine lacks to run engines on `device`, one line each."""

    def served_models(self, engine_dir: Path, options: ServeOptions, instance: str) -> list[ServedModel]:
        """What Triton loads for an engine; `instance` is a nonce that the config of `ensemble` must give back."""


def find_backend(name: str) -> Backend:
    if name not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise InputError(f'unknown backend "{name}"{did_you_mean(name, BACKENDS)}', hint=f"known: {known}")
    module, _, attribute = BACKENDS[name].partition(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)()
    return backend
