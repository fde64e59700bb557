"""`tkit doctor` on this machine, and on ones that stand-ins, metadata and ports make of it."""

from __future__ import annotations

import json
import socket

from container import write_container
from nvidia_node import write_programs

from tkit.backends.nvidia import Machine
from tkit.specs.server import ServeOptions
from tkit.stages.doctor import diagnose
from tkit.triton import install


def checks_of(result) -> dict[str, dict]:
    return {check["name"]: check for check in json.loads(result.stdout)["checks"]}


def test_this_machine_serves_the_reference_backend_and_names_its_triton(tkit) -> None:
    result = tkit("doctor", "--backend", "reference")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("this machine can tkit serve with the reference backend\n")
    checks = checks_of(tkit("doctor", "--backend", "reference", "--json"))
    assert checks.keys() >= {"versions", "packages", "driver", "triton", "libpython", "numpy", "disk", "shm", "limits"}
    assert (
        "pytriton/tritonserver/bin/tritonserver (from the nvidia-pytriton wheel: no $TKIT_TRITONSERVER"
        in checks["triton"]["found"]
    )
    assert all((check["fix"] is None) == (check["status"] == "ok") for check in checks.values())


def test_without_a_gpu_only_what_needs_one_fails(tkit, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert tkit("doctor", "build", "--backend", "reference").exit_code == 0
    result = tkit("doctor", "build", "--backend", "tensorrt", "--json")
    assert result.exit_code == 1
    failed = {name for name, check in checks_of(result).items() if check["status"] == "fail"}
    assert failed == {"driver", "gpus", "tensorrt-llm"}
    assert "26.07-trtllm-python-py3 carries 1.2.1" in checks_of(result)["tensorrt-llm"]["fix"]
    assert tkit("doctor", "build", "--backend", "pytorch").exit_code == 0  # it writes files, nothing more


def test_a_node_is_recognized(tkit, monkeypatch, tmp_path) -> None:
    node = tmp_path / "node"
    for name, value in write_programs(node, sm=90, free_mib=10_000).items():
        monkeypatch.setenv(name, value)
    for name, value in write_container(node).items():
        monkeypatch.setenv(name, value)
    server = node / "opt" / "tritonserver" / "bin" / "tritonserver"
    result = tkit("doctor", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["backend"] == "tensorrt"
    checks = checks_of(result)
    assert checks["tensorrt-llm"]["found"] == f"1.2.1; {tmp_path}/node/bin/trtllm-build"
    assert checks["gpu 1"]["found"] == "NVIDIA H100 80GB HBM3, SM 90, 10.5 GB of 85.5 GB free"
    assert (checks["gpu 1"]["status"], "nvidia-smi" in checks["gpu 1"]["fix"]) == ("warn", True)
    assert checks["triton"]["found"] == f"{server} ($TKIT_TRITONSERVER)"

    assert checks["models"]["found"] == f"TensorRT-LLM's Triton models in {node}/app/all_models"
    monkeypatch.setenv("NVIDIA_TRITON_SERVER_VERSION", "25.10")
    monkeypatch.setenv("TKIT_TRTLLM_MODELS", str(tmp_path))
    mixed = tkit("doctor", "--json")
    assert mixed.exit_code == 1
    assert checks_of(mixed)["tensorrt-llm"]["fix"].startswith("container 25.10 came with 1.0.0")
    assert "lacks inflight_batcher_llm/preprocessing/1/model.py" in checks_of(mixed)["models"]["fix"]


def test_what_breaks_the_wheel_is_told_before_it_starts(tkit, monkeypatch, tmp_path) -> None:
    package = tmp_path / "numpy-2.1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 2.1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(install, "SHARED_MEMORY_BYTES", 1 << 62)
    result = tkit("doctor", "--backend", "reference")
    assert result.exit_code == 1
    assert "fail  numpy         2.1.0\n" in result.stdout
    assert "pip install 'numpy<2'" in result.stdout
    assert "fail  shm           /dev/shm\n" in result.stdout
    assert "docker: --shm-size=1g" in result.stdout
    assert tkit("doctor", "plan", "--backend", "reference").exit_code == 0


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        diagnosis = diagnose(
            "serve", "reference", Machine(), ServeOptions(http_port=port, grpc_port=0, metrics_port=0, openai_port=0)
        )
    [check] = [check for check in diagnosis.checks if check.name == "ports"]
    assert (check.status, check.found.startswith(f"--http-port {port} is in use by ")) == ("warn", True)
    assert diagnosis.is_able
