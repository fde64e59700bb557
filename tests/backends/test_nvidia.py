"""What tkit believes of a machine: the answers of nvidia-smi, CUDA's own hiding of GPUs, the table of containers."""

from __future__ import annotations

from pathlib import Path

import pytest
from nvidia_node import write_programs

from tkit.backends.nvidia import (
    Machine,
    container_table,
    container_with,
    has_llm_api,
    is_engine_builder,
    this_machine,
    visible_gpus,
)
from tkit.backends.reference import Reference
from tkit.specs.server import ServeOptions
from tkit.triton.install import has_nvidia_driver


def test_a_node(tmp_path: Path) -> None:
    machine = this_machine(write_programs(tmp_path, sm=90, num_gpus=2))
    assert [(gpu.index, gpu.sm, gpu.memory_bytes) for gpu in machine.gpus] == [
        (0, 90, 81559 << 20),
        (1, 90, 81559 << 20),
    ]
    assert (machine.trtllm_version, machine.trtllm_build) == ("1.2.1", tmp_path / "bin" / "trtllm-build")


@pytest.mark.skipif(has_nvidia_driver(), reason="this machine has a driver")
def test_a_gpu_that_nvidia_smi_lists_can_serve_without_a_trace_of_the_driver(tmp_path, monkeypatch) -> None:
    options = ServeOptions(device="cuda")
    monkeypatch.setenv("PATH", "/nowhere")
    said = Reference().problems(tmp_path, options, None)
    assert said == ["--device cuda: no NVIDIA driver, no nvidia-smi on PATH"]
    for name, value in write_programs(tmp_path, version=None).items():
        monkeypatch.setenv(name, f"{value}:/bin" if name == "PATH" else value)
    assert Reference().problems(tmp_path, options, None) == []
    [problem] = Reference().problems(tmp_path / "modèles", options, None)
    assert problem.endswith("modèles: Triton's Python backend finds no path that is not ASCII; move the engine")


def test_a_machine_without_anything() -> None:
    machine = this_machine({"PATH": "/nowhere"})
    assert machine == Machine(gpus_problem="no nvidia-smi on PATH")
    assert machine.trtllm_version is None


@pytest.mark.parametrize(
    ("visible", "indices"), [("1", [1]), ("1,0", [1, 0]), ("GPU-1", [1]), ("7", []), ("", []), ("0,7,1", [0])]
)
def test_cuda_visible_devices_choose_and_order(tmp_path: Path, visible: str, indices: list[int]) -> None:
    environment = {**write_programs(tmp_path), "CUDA_VISIBLE_DEVICES": visible}
    gpus, problem = visible_gpus(environment)
    assert [gpu.index for gpu in gpus] == indices
    assert problem == (None if indices else f'CUDA_VISIBLE_DEVICES is "{visible}" and leaves none')


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (
            "echo 'NVIDIA-SMI has failed because it could not communicate' ; exit 9",
            "ended with exit code 9: NVIDIA-SMI has",
        ),
        ("echo garbage", "nvidia-smi answered 'garbage'"),
        ("true", "nvidia-smi lists none"),
    ],
)
def test_a_broken_driver_is_told_not_raised(tmp_path: Path, script: str, problem: str) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    gpus, found = visible_gpus({"PATH": f"{tmp_path}:/bin:/usr/bin"})
    assert gpus == ()
    assert found is not None and problem in found


def test_the_table_of_containers() -> None:
    assert (container_with("1.2.1"), container_with("1.1.0"), container_with("9.9")) == ("26.07", "26.02", None)
    assert list(container_table()) == sorted(container_table(), reverse=True)
    versions = ("0.21.0", "1.0.3.2510", "1.2.1", "1.3.0rc20", "1.10.0")
    assert [is_engine_builder(version) for version in versions] == [False, True, True, False, False]
    assert [has_llm_api(version) for version in versions] == [False, True, True, True, True]
