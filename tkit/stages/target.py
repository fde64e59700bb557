"""What a sweep measures, as it was asked for, and the server that this means. Asks no server anything."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tkit.errors import InputError, ServerError
from tkit.files import name_problem
from tkit.loadgen.board import MAX_WORKERS
from tkit.loadgen.http import grpc_address, http_address
from tkit.loadgen.protocols import DEFAULT_PROTOCOL, find_protocol
from tkit.specs.engine import EngineCard
from tkit.specs.server import MODEL_NAME
from tkit.stages.engines import find_engine, read_card
from tkit.stages.servers import running_servers


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is measured. With nothing given, the newest server that `tkit serve` started."""

    url: str | None = None  # host:port; over HTTP also http://host:port[/v1]; with TLS https:// or grpcs://
    protocol: str = DEFAULT_PROTOCOL
    model: str | None = None  # None = the one that `tkit serve` serves; openai: the only one there is
    engine: str | None = None  # path or name
    label: str | None = None  # in reports; None = the engine's name, or the model's
    tokenizer: Path | None = None  # None = the engine's
    num_gpus: int | None = None  # None = those of the engine, unless the reference backend serves it
    timeout_s: float = 60.0  # without a message from the server
    reconnect_s: float = 60.0  # that a server which stopped answering is waited for
    api_key_file: Path | None = None  # the key itself is written nowhere
    metrics_url: str | None = None  # the server's Prometheus metrics; None = where such servers have them
    num_workers: int | None = None  # processes that send; None = as many as the load of each point needs


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where it answers, and what is known of it."""

    url: str
    model: str | None  # None = the server is asked
    engine_dir: Path | None
    card: EngineCard | None
    num_servers: int = 1  # that it was chosen from
    metrics_url: str | None = None


def check_target(target: Target, name: str | None = None) -> None:
    """Raises InputError that lists what is wrong with the options; asks nobody."""
    row = find_protocol(target.protocol)
    problems = []
    if not 0 < target.timeout_s < float("inf"):
        problems.append(f"--timeout is {target.timeout_s}, expected more than 0 seconds")
    if not 0 <= target.reconnect_s < float("inf"):
        problems.append(f"--reconnect is {target.reconnect_s}, expected 0 or more seconds")
    if target.num_gpus is not None and target.num_gpus < 1:
        problems.append(f"--gpus is {target.num_gpus}, expected at least 1")
    if target.num_workers is not None and not 1 <= target.num_workers <= MAX_WORKERS:
        problems.append(f"--workers is {target.num_workers}, expected 1 to {MAX_WORKERS}, or auto")
    if target.url is not None:
        try:
            normal_url(target.protocol, target.url)
        except InputError as error:
            problems.append(error.message)
    if target.metrics_url is not None and not re.match(r"https?://[^/\s@]+(/|$)", target.metrics_url):
        problems.append(f"--metrics-url is {target.metrics_url!r}, expected http://HOST:PORT/metrics")
    if target.api_key_file is not None and not row.has_api_key:
        problems.append(f"--api-key-file is given, but {target.protocol} sends no key")
    if name is not None and (problem := name_problem(name)):
        problems.append(f"--name {problem}")
    if problems:
        raise InputError("impossible sweep", problems=problems)


def find_endpoint(target: Target, engines_dir: Path) -> Endpoint:
    """Raises InputError or ServerError when there is none, or the engine is not what its server loaded."""
    if target.url is not None:
        engine_dir = find_engine(target.engine, engines_dir) if target.engine is not None else None
        card = read_card(engine_dir) if engine_dir else None
        model = target.model or (None if find_protocol(target.protocol).lists_models else MODEL_NAME)
        return Endpoint(url=normal_url(target.protocol, target.url), model=model, engine_dir=engine_dir, card=card)
    servers = running_servers(engines_dir)
    if target.engine is not None:
        wanted = str(find_engine(target.engine, engines_dir))
        servers = [server for server in servers if server.engine == wanted]
    if not servers:
        what = f"no server of {target.engine} is running" if target.engine is not None else "no server is running"
        raise ServerError(what, hint="start one with tkit serve, or give the address of another: --url HOST:PORT")
    server = servers[-1]
    card = read_card(Path(server.engine))
    if card.name != Path(server.engine).name:
        raise ServerError(
            f"{server.engine} holds the card of {card.name}: not what the server with pid {server.pid} loaded",
            hint="restart the server: tkit stop, tkit serve",
        )
    host = "127.0.0.1" if server.host == "0.0.0.0" else server.host
    return Endpoint(
        url=f"{host}:{getattr(server, find_protocol(target.protocol).port)}",
        model=target.model or server.model,
        engine_dir=Path(server.engine),
        card=card,
        num_servers=len(servers),
        metrics_url=f"http://{host}:{server.metrics_port}/metrics",
    )


def normal_url(protocol: str, url: str) -> str:
    """As manifests hold it. Raises InputError when it is none of the protocol's."""
    return str((http_address if find_protocol(protocol).is_http else grpc_address)(url))


def refuse_stranger(endpoint: Endpoint, identity: Mapping[str, Any]) -> None:
    """A server that says which engine it serves must say the one that is to be measured."""
    served = identity.get("parameters", {}).get("engine_dir")
    if endpoint.engine_dir is not None and served and Path(served).name != endpoint.engine_dir.name:
        raise ServerError(
            f"{endpoint.url} serves {Path(served).name}, not {endpoint.engine_dir.name}",
            hint="another server has taken the port; restart yours, or name the engine that is served: --engine",
        )
