"""The pytorch backend: the unified Hugging Face checkpoint in TensorRT-LLM's `llmapi` Triton model. Runs in NVIDIA's container.

One tritonserver, whatever the number of GPUs: the LLM API starts a worker for each by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tkit.backends.llm_api import LLM_API_FILE
from tkit.backends.nvidia import has_llm_api, this_machine
from tkit.backends.tensorrt import code_problems, models_directory
from tkit.files import read_yaml
from tkit.specs.server import ServeOptions
from tkit.triton.ensemble import ensemble_config
from tkit.triton.install import TritonInstall
from tkit.triton.llmapi import LLM_CODE, LLM_MODEL, llmapi_config, model_yaml
from tkit.triton.probe import INSTANCE_PARAMETER
from tkit.triton.repository import ServedModel

CODE = Path("llmapi") / LLM_MODEL / "1"
FRONT = Path(__file__).with_name("llmapi_front.py")
# Of `ensemble`, what the LLM API's model has nothing for and common clients leave out where it is not there.
LACKING = ("min_tokens", "end_id", "num_input_tokens", "num_output_tokens")


class PyTorch:
    is_own_python = False

    def problems(self, engine_dir: Path, options: ServeOptions, install: TritonInstall | None) -> list[str]:
        machine, problems = this_machine(), []
        if machine.trtllm_version is None:
            problems.append("no TensorRT-LLM in the Python on PATH; run tkit in NVIDIA's container")
        elif not has_llm_api(machine.trtllm_version):
            problems.append(f"TensorRT-LLM {machine.trtllm_version}: the PyTorch backend begins with 1.0")
        if install is not None and install.is_wheel:
            problems.append(f"{install.binary} is the wheel's; run tkit in NVIDIA's container")
        if machine.gpus_problem:
            problems.append(f"no GPU: {machine.gpus_problem}")
        elif (ranks := num_gpus(engine_dir)) > len(machine.gpus):
            problems.append(f"the engine spans {ranks} GPUs, this machine shows {len(machine.gpus)}")
        return [*problems, *code_problems(model_code())]

    def num_ranks(self, engine_dir: Path) -> int:
        return 1

    def gpus(self, engine_dir: Path) -> list[str]:
        return [gpu.uuid for gpu in this_machine().gpus[: num_gpus(engine_dir)]]

    def served_models(self, engine_dir: Path, options: ServeOptions, instance: str) -> list[ServedModel]:
        return served_models(engine_dir, options, {INSTANCE_PARAMETER: instance}, models_directory())


def model_code() -> list[Path]:
    """What the container must have, relative to `models_directory`."""
    return [CODE / name for name in LLM_CODE]


def served_models(
    engine_dir: Path, options: ServeOptions, parameters: dict[str, str], models: Path, mounted_as: Path | None = None
) -> list[ServedModel]:
    """TensorRT-LLM's model and `ensemble` before it. `mounted_as`: where the server will see the engine."""
    checkpoint = (mounted_as or engine_dir) / "hf"
    return [
        ServedModel(
            config=llmapi_config(),
            files={"model.yaml": model_yaml(_options(engine_dir), str(checkpoint), options.kv_cache_fraction)},
            links={path.name: models / path for path in model_code()},
        ),
        ServedModel(config=ensemble_config(parameters, without=LACKING), source=FRONT.read_text("utf-8")),
    ]


def _options(engine_dir: Path) -> dict[str, Any]:
    return read_yaml(engine_dir / LLM_API_FILE)


def num_gpus(engine_dir: Path) -> int:
    options = _options(engine_dir)
    return int(options["tensor_parallel_size"]) * int(options["pipeline_parallel_size"])
