"""How the servers of this checkout are: who serves, where, since when, how busy; and who does not, and why."""

from __future__ import annotations

import http.client
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tkit.errors import InputError, ServerError, did_you_mean
from tkit.specs.server import ServerRecord
from tkit.stages.engines import ENGINES_DIR
from tkit.stages.servers import ServerFiles, known_servers
from tkit.triton import probe
from tkit.triton.launcher import is_running

TIMEOUT_S = 10.0
SAMPLE = re.compile(r'tkit_(requests_total|open_requests)\{\w+="(\w+)"\} (\S+)')


@dataclass(frozen=True, kw_only=True)
class ServerStatus:
    engine: str  # name
    state: (
        str  # "serving", "starting", "failing" (it runs, but not as it should) or "dead" (what it left is still there)
    )
    problem: str | None = None
    log: str
    record: ServerRecord | None = None  # while it is starting there is none
    requests: Mapping[str, int] | None = (
        None  # running, waiting, and by how they ended; None where the model does not tell
    )


def server_statuses(engine: str | None = None, *, engines_dir: Path = ENGINES_DIR) -> list[ServerStatus]:
    """Of every server that is there or has left something; raises ServerError when `engine` has none."""
    known = known_servers(engines_dir)
    if engine is not None:
        name = Path(engine).name
        chosen = [files for files in known if files.name == name]
        if not chosen:
            names = [files.name for files in known]
            raise ServerError(f'no server is running for "{name}"{did_you_mean(name, names)}', hint="tkit status")
        known = chosen
    return [_status(files) for files in known]


def _status(files: ServerFiles) -> ServerStatus:
    record, problem, requests = None, None, None
    try:
        record = files.read_record()
    except InputError as error:
        problem = "; ".join(error.problems or (error.message,))
    if not files.is_running():
        state, problem = "dead", problem or "it ended without tkit stop: killed, or crashed"
    elif problem is not None:
        state = "failing"
    elif record is None:
        state = "starting"
    else:
        problem = _problem(record)
        state = "failing" if problem else "serving"
        requests = _requests(record)
    return ServerStatus(
        engine=files.name, state=state, problem=problem, log=str(files.log), record=record, requests=requests
    )


def _problem(record: ServerRecord) -> str | None:
    if not all(is_running(pid) for pid in record.model_pids):
        return "the model's process has died"
    if not is_running(record.openai_pid):
        return "the OpenAI front has died"
    if not probe.is_http_ready(record.host, record.http_port, TIMEOUT_S):
        return f"the model is not ready on port {record.http_port}"
    if probe.front_instance(record.host, record.openai_port, TIMEOUT_S) is None:
        return f"the OpenAI front on port {record.openai_port} is not ready"
    return None


def _requests(record: ServerRecord) -> dict[str, int] | None:
    connection = http.client.HTTPConnection(
        probe.connect_host(record.host), record.metrics_port, timeout=TIMEOUT_S
    )  # fmt: skip
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return {label: int(float(value)) for _, label, value in SAMPLE.findall(text)} or None
