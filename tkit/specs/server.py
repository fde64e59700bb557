"""What `tkit serve` tells the other commands about a running server, and where it writes that down."""

from __future__ import annotations

from dataclasses import dataclass

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
    started: str  # UTC, ISO 8601
    log: str  # absolute path
