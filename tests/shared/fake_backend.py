"""Backends for tests of serving: the real model.py and Triton around the fake engine; others fail, hang, say nothing."""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import Any

from tkit.files import sha256_file, write_json
from tkit.specs.engine import EngineCard
from tkit.specs.server import ServeOptions, ServerRecord
from tkit.triton.ensemble import ensemble_config
from tkit.triton.install import TritonInstall
from tkit.triton.probe import INSTANCE_PARAMETER
from tkit.triton.repository import ServedModel

SOURCE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import time
from fake_engine import FakeEngine, QueueFull
from tkit.backends.reference_model import TritonPythonModel as ReferenceModel

class TritonPythonModel(ReferenceModel):
    def load_engine(self, parameters):
        %s
        sizes = {{name: int(parameters[name]) for name in ("max_batch_size", "max_queue_size")}}
        return FakeEngine(gap_s=0.01, **sizes), QueueFull
"""


class Fake:
    first_line = "pass"
    is_own_python = True

    def problems(self, engine_dir: Path, options: ServeOptions, install: TritonInstall | None) -> list[str]:
        return []

    def num_ranks(self, engine_dir: Path) -> int:
        return 1

    def gpus(self, engine_dir: Path) -> list[str]:
        return []

    def served_models(self, engine_dir: Path, options: ServeOptions, instance: str) -> list[ServedModel]:
        parameters = {
            INSTANCE_PARAMETER: instance,
            "engine_dir": str(engine_dir),
            "device": "cpu",
            "max_batch_size": str(options.max_batch_size),
            "max_queue_size": str(options.max_queue_size),
        }
        return [ServedModel(config=ensemble_config(parameters), source=SOURCE % self.first_line)]


class Failing(Fake):
    first_line = 'raise ValueError("checkpoint says 7 layers, found 6")'


class Hanging(Fake):
    first_line = "time.sleep(3600)"


class Mute(Fake):
    first_line = 'FakeEngine._step = lambda self, one: self._emit(one, "", (), "error", error="no kernel") or True'


class Locked(Fake):
    """Its first request but the server's own never lets go of Python's lock."""

    first_line = (
        "import ctypes, tkit.backends.reference_model as backend; backend.LOCK_HELD_S = 3; step = FakeEngine._step;"
        "FakeEngine._step = lambda self, one: "
        "step(self, one) if one.request.max_tokens == 1 else ctypes.PyDLL(None).sleep(600)"
    )


ROWS = {
    backend.__name__.lower(): f"{__name__}:{backend.__name__}" for backend in (Fake, Failing, Hanging, Mute, Locked)
}


def write_engine(directory: Path, *, created: str = "2026-01-01T00:00:00Z", **changes: Any) -> EngineCard:
    """A complete engine directory with one file of weights."""
    weights = directory / "checkpoint" / "rank0.safetensors"
    weights.parent.mkdir(parents=True, exist_ok=True)
    weights.write_bytes(b"weights")
    files = {"checkpoint/rank0.safetensors": {"bytes": 7, "sha256": sha256_file(weights)}}
    values = dict(
        name=directory.name, key="0" * 64, created=created, backend="fake", architecture="LlamaForCausalLM",
        dtype="float32", quant="none", quant_algo=None, tp_size=1, pp_size=1, num_params=1, weight_bytes=4,
        max_position_embeddings=128, vocab_size=256, recipe={}, source={}, files=files, versions={},
        command="tkit build", build={},
    )  # fmt: skip
    card = EngineCard(**{**values, **changes})
    write_json(directory / "engine.json", card)
    return card


OPEN = 'tkit_open_requests{state="running"}'


def metrics(server: ServerRecord) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line.startswith("tkit_"))}
