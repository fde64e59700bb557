"""How a server is to be started, what `tkit serve` tells the other commands about it, and where it writes that down."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tkit.errors import InputError
from tkit.specs.device import DEVICES

SERVER_RECORDS = ".servers"  # engines/.servers/<engine name>.json, removed when the server has ended
SERVER_SCHEMA = "tkit.server/1"
MODEL_NAME = "ensemble"  # the client surface of TensorRT-LLM's own repositories


@dataclass(frozen=True, kw_only=True)
class ServerRecord:
    schema: str = SERVER_SCHEMA
    engine: str  # absolute path of the engine directory
    model: str = MODEL_NAME
    pid: int  # of the process that owns the server (and its process group)
    host: str
    http_port: int
    grpc_port: int
    metrics_port: int
    openai_port: int
    model_pids: tuple[int, ...]  # the server's children that run the model
    openai_pid: int  # the child that is the OpenAI front
    api_key_file: str | None  # absolute path; the key itself is written nowhere
    started: str  # UTC, ISO 8601
    log: str  # absolute path
    kv_cache_shares: Mapping[str, float] = field(
        default_factory=dict
    )  # GPU's UUID -> kv_cache_fraction; TensorRT-LLM's


RENDER_TARGETS = ("docker",)
PORTS = ("http_port", "grpc_port", "metrics_port", "openai_port")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Port 0 is any free port. The engine's limits are its own: requests beyond the queue are refused, not kept."""

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    openai_port: int = 9000
    api_key_file: Path | None = None  # what clients of the OpenAI port must know; Triton's own ports know no key
    device: str = "auto"
    max_batch_size: int = 32
    max_queue_size: int = 256
    kv_cache_fraction: float = 0.9  # of the GPU memory that is free once the engine is loaded; TensorRT-LLM's
    timeout_s: float = 300.0  # from the start of the process to the first generated token
    exit_timeout_s: int = 10  # what running requests are given to finish when the server is stopped

    def __post_init__(self) -> None:
        if self.host == "localhost":
            object.__setattr__(self, "host", "127.0.0.1")
        ports = {_typed(name): port for name, port in zip(PORTS, self.ports, strict=True)}
        problems = [
            f"{name} is {port}, expected 0 (any free port) to 65535"
            for name, port in ports.items()
            if not 0 <= port < 65536
        ]
        fixed = [port for port in self.ports if port]
        if len(set(fixed)) < len(fixed):
            problems.append(f"two ports are equal: {', '.join(f'{name} {port}' for name, port in ports.items())}")
        if not _is_address(self.host):
            problems.append(f'--host is "{self.host}", expected an IPv4 address, such as 127.0.0.1')
        if self.device not in DEVICES:
            problems.append(f'--device is "{self.device}", expected one of {", ".join(DEVICES)}')
        for name in ("max_batch_size", "max_queue_size", "exit_timeout_s"):
            if getattr(self, name) < 1:
                problems.append(f"{_typed(name)} is {getattr(self, name)}, expected at least 1")
        if not 0 < self.kv_cache_fraction < 1:
            problems.append(f"--kv-cache-fraction is {self.kv_cache_fraction}, expected more than 0, less than 1")
        if not 0 < self.timeout_s < float("inf"):
            problems.append(f"--timeout is {self.timeout_s}, expected more than 0 seconds")
        if problems:
            raise InputError("impossible server", problems=problems)

    @property
    def ports(self) -> tuple[int, ...]:
        """In the order of PORTS."""
        return tuple(getattr(self, name) for name in PORTS)

    @property
    def is_loopback(self) -> bool:
        return ipaddress.IPv4Address(self.host).is_loopback


def _typed(name: str) -> str:
    """A field as an option of `tkit serve`."""
    return f"--{name.replace('_', '-')}"


def _is_address(host: str) -> bool:
    """IPv4 only: tritonserver's three listeners do not agree on how IPv6 is written."""
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True
