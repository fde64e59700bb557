"""Render: the launch of an engine on another machine, as files. Runs nothing."""

from __future__ import annotations

import secrets
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tkit.backends import pytorch, tensorrt
from tkit.backends.nvidia import IMAGE, container_table, container_with, has_llm_api
from tkit.errors import InputError
from tkit.files import write_atomic
from tkit.specs.server import MODEL_NAME, ServeOptions
from tkit.stages.engines import read_card
from tkit.triton.inflight_batcher import ENGINE_MODEL
from tkit.triton.install import CONTAINER_SERVER
from tkit.triton.launcher import OFFLINE, STACK_BYTES, LaunchSpec, server_command
from tkit.triton.repository import write_repository

RENDER_SCHEMA = "tkit.render/1"
DEPLOY_DIR = Path("deploy")
COMPOSE_FILE = "compose.yaml"
ENGINE_MOUNT, REPOSITORY_MOUNT = Path("/engine"), Path("/repository")
SHM_SIZE = "2g"  # NVIDIA's own; a container's 64 MB end with the first large request
START_S = 600  # loading an engine of many gigabytes from a cold disk


@dataclass(frozen=True, kw_only=True)
class DockerLaunch:
    """`command` and the compose file start the same container; both need `directory`/repository."""

    schema: str = RENDER_SCHEMA
    engine: str
    directory: str
    image: str
    command: tuple[str, ...]
    compose: str

    def text(self) -> str:
        return f"{shlex.join(self.command)}\n\n# {self.directory}/{COMPOSE_FILE}\n{self.compose}".rstrip()


def render_docker(
    engine_dir: Path, options: ServeOptions, out: Path | None = None, *, key: str | None = None
) -> DockerLaunch:
    """Writes the model repository and compose.yaml into `out` (default: deploy/<engine>), which must not exist yet."""
    engine_dir = engine_dir.resolve()
    card = read_card(engine_dir)
    problems = []
    if card.backend == "tensorrt":
        config = tensorrt.read_engine_config(engine_dir)
        version, num_gpus = config["version"], tensorrt.world_size(config)
        num_ranks, served_models = num_gpus, tensorrt.served_models
        problems += tensorrt.tokenizer_problems(engine_dir / "tokenizer")
    elif card.backend == "pytorch":
        version, num_gpus = next(filter(has_llm_api, container_table().values())), pytorch.num_gpus(engine_dir)
        num_ranks, served_models = 1, pytorch.served_models
    else:
        raise InputError(
            f"{engine_dir}: NVIDIA's container serves no engine of the {card.backend} backend",
            hint="tkit build ENGINE --backend tensorrt, on the GPU node; or tkit build MODEL --backend pytorch",
        )
    release = container_with(version)
    if release is None:
        problems.append(f"no container of NVIDIA's carries TensorRT-LLM {version}")
    if 0 in (options.http_port, options.grpc_port, options.metrics_port):
        problems.append("port 0: a container needs ports that are known beforehand")
    directory = (out or DEPLOY_DIR / card.name).absolute()
    if directory.exists():
        problems.append(f"{directory} exists; remove it, or choose another --out")
    if problems:
        raise InputError(f"{engine_dir} cannot be rendered", problems=problems)
    image = IMAGE.format(release=release)
    server = _server(num_ranks, options, key or secrets.token_hex(16))
    repository = directory / "repository"
    launch = DockerLaunch(
        engine=str(engine_dir),
        directory=str(directory),
        image=image,
        command=tuple(_docker_command(card.name, image, engine_dir, repository, num_gpus, options, server)),
        compose=_compose(image, engine_dir, repository, num_gpus, options, server),
    )
    write_repository(
        repository, served_models(engine_dir, options, {}, tensorrt.CONTAINER_MODELS, mounted_as=ENGINE_MOUNT)
    )
    write_atomic(directory / COMPOSE_FILE, launch.compose)
    return launch


def _server(num_ranks: int, options: ServeOptions, key: str) -> list[str]:
    """The command inside the container, where it listens on all addresses: docker's own binding keeps others out."""
    spec = LaunchSpec(
        repository=REPOSITORY_MOUNT,
        host="0.0.0.0",
        http_port=ServeOptions.http_port,
        grpc_port=ServeOptions.grpc_port,
        metrics_port=ServeOptions.metrics_port,
        exit_timeout_s=options.exit_timeout_s,
        has_gpu_metrics=True,
        num_ranks=num_ranks,
        rank_model=ENGINE_MODEL,
    )
    return [word.replace("{pid}", "") for word in server_command(CONTAINER_SERVER, spec, key)]


def _published(options: ServeOptions) -> list[str]:
    pairs = (
        (options.http_port, ServeOptions.http_port),
        (options.grpc_port, ServeOptions.grpc_port),
        (options.metrics_port, ServeOptions.metrics_port),
    )
    return [f"{options.host}:{outer}:{inner}" for outer, inner in pairs]


def _volumes(engine_dir: Path, repository: Path) -> list[str]:
    return [f"{engine_dir}:{ENGINE_MOUNT}:ro", f"{repository}:{REPOSITORY_MOUNT}:ro"]


def _devices(num_gpus: int) -> list[str]:
    return [str(index) for index in range(num_gpus)]


def _docker_command(
    name: str,
    image: str,
    engine_dir: Path,
    repository: Path,
    num_gpus: int,
    options: ServeOptions,
    server: list[str],
) -> list[str]:
    return [
        "docker", "run", "--rm", "--name", name,
        "--gpus", f'"device={",".join(_devices(num_gpus))}"',  # docker wants the quotes
        f"--shm-size={SHM_SIZE}", "--ulimit", "memlock=-1", "--ulimit", f"stack={STACK_BYTES}",
        *(word for variable, value in OFFLINE.items() for word in ("--env", f"{variable}={value}")),
        *(word for port in _published(options) for word in ("--publish", port)),
        *(word for volume in _volumes(engine_dir, repository) for word in ("--volume", volume)),
        image, *server,
    ]  # fmt: skip


def _compose(
    image: str, engine_dir: Path, repository: Path, num_gpus: int, options: ServeOptions, server: list[str]
) -> str:
    ready = f"http://127.0.0.1:{ServeOptions.http_port}/v2/models/{MODEL_NAME}/ready"
    service: dict[str, Any] = {
        "image": image,
        "command": server,
        "ports": _published(options),
        "volumes": _volumes(engine_dir, repository),
        "environment": dict(OFFLINE),
        "shm_size": SHM_SIZE,
        "ulimits": {"memlock": -1, "stack": STACK_BYTES},
        "restart": "unless-stopped",
        "stop_grace_period": f"{options.exit_timeout_s + 5}s",
        "healthcheck": {
            "test": ["CMD", "python3", "-c", f"import urllib.request; urllib.request.urlopen('{ready}')"],
            "start_period": f"{START_S}s",
        },
        "deploy": {
            "resources": {
                "reservations": {
                    "devices": [{"driver": "nvidia", "device_ids": _devices(num_gpus), "capabilities": ["gpu"]}]
                }
            }
        },
    }
    return yaml.safe_dump({"services": {"triton": service}}, sort_keys=False, width=200)
