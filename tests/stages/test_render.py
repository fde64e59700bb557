"""`tkit serve --render docker`: the files and the command of a container, written where there is neither docker nor a GPU."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml
from google.protobuf import text_format
from nvidia_node import write_programs
from tritonclient.grpc import model_config_pb2

from tkit.specs.server import ServeOptions
from tkit.stages.render import render_docker

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def engine(tkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as node:
        for name, value in write_programs(tmp_path / "node").items():
            node.setenv(name, value)
        built = tkit("build", "--tp", "2", "--backend", "tensorrt", "--max-batch-size", "4", "--name", "compiled")
    assert built.exit_code == 0, built.output
    return Path(built.stdout.strip())


def test_the_golden_launch(engine: Path, tmp_path: Path) -> None:
    options = ServeOptions(http_port=9100, kv_cache_fraction=0.8)
    launch = render_docker(engine, options, tmp_path / "deploy", key="KEY")
    text = launch.text().replace(str(tmp_path), "/srv")
    assert text + "\n" == (GOLDEN / "docker.txt").read_text()
    compose = yaml.safe_load((tmp_path / "deploy" / "compose.yaml").read_text())["services"]["triton"]
    assert compose["command"] == list(launch.command[-len(compose["command"]) :])  # both start the same

    repository = tmp_path / "deploy" / "repository"
    parameters = {}
    for path in repository.glob("*/config.pbtxt"):
        message = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        parameters[message.name] = {name: value.string_value for name, value in message.parameters.items()}
    assert parameters["tensorrt_llm"]["gpt_model_path"] == "/engine/trt"
    assert parameters["tensorrt_llm"]["kv_cache_free_gpu_mem_fraction"] == "0.8"
    assert (
        parameters["preprocessing"]["tokenizer_dir"]
        == parameters["postprocessing"]["tokenizer_dir"]
        == "/engine/tokenizer"
    )
    code = repository / "tensorrt_llm_bls" / "1"
    assert {path.name: str(path.readlink()) for path in code.iterdir()} == {
        name: f"/app/all_models/inflight_batcher_llm/tensorrt_llm_bls/1/{name}" for name in ("model.py", "lib")
    }


def test_it_prints_and_writes_once(tkit, engine: Path) -> None:
    result = tkit("serve", engine, "--render", "docker", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["image"] == "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"
    assert Path(record["directory"], "compose.yaml").read_text() == record["compose"]
    assert Path(record["directory"]).relative_to(Path.cwd()) == Path("deploy/compiled")
    printed = tkit("serve", engine, "--render", "docker", "--out", "other").stdout
    assert shlex.split(printed.splitlines()[0])[:3] == ["docker", "run", "--rm"]
    again = tkit("serve", engine, "--render", "docker", "--http-port", "0")
    assert again.exit_code == 2
    for problem in ("deploy/compiled exists; remove it, or choose another --out", "port 0: a container needs ports"):
        assert problem in again.stderr


def test_a_unified_checkpoint_needs_one_server_for_all_its_gpus(tkit) -> None:
    assert tkit("build", "--tp", "2", "--backend", "pytorch", "--name", "unified").exit_code == 0
    record = json.loads(tkit("serve", "unified", "--render", "docker", "--json").stdout)
    assert '"device=0,1"' in record["command"]
    assert "mpirun" not in record["command"]
    version = Path("deploy/unified/repository/tensorrt_llm/1")
    assert yaml.safe_load((version / "model.yaml").read_text())["model"] == "/engine/hf"
    assert str((version / "model.py").readlink()) == "/app/all_models/llmapi/tensorrt_llm/1/model.py"


def test_an_engine_without_a_container_is_refused(tkit) -> None:
    assert tkit("build", "--name", "plain").exit_code == 0
    result = tkit("serve", "plain", "--render", "docker")
    assert result.exit_code == 2
    assert "NVIDIA's container serves no engine of the reference backend" in result.stderr
    assert not Path("deploy").exists()
