"""Measures the load generator itself, and finds what was measured before."""

from __future__ import annotations

import platform
import re
from pathlib import Path

from tkit import __version__
from tkit.cores import usable_cores
from tkit.errors import InputError
from tkit.files import check_writable, from_mapping, read_json, write_json
from tkit.loadgen.protocols import find_protocol
from tkit.loadgen.run_directory import utc_now
from tkit.specs.client import CLIENT_FILE, CLIENT_SCHEMA, ClientCalibration, ClientRecord
from tkit.specs.progress import Progress

PROTOCOLS = ("triton-grpc", "triton-http", "openai")  # chat is sent and read as completions are


def run_calibration(out: Path, protocol: str | None = None, progress: Progress | None = None) -> ClientRecord:
    """Measures one protocol, or all, and writes `out/client.json`; what it holds of other protocols stays."""
    from tkit.loadgen.calibrate import calibrate  # every sweep looks for a calibration, few make one

    check_writable(out, "choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    progress = progress or Progress()
    protocols = PROTOCOLS if protocol is None else (_measured_as(protocol),)
    known = _read(out)
    found = {calibration.protocol: calibration for calibration in known.protocols} if known else {}
    for name in protocols:
        found[name] = calibrate(name, progress.note)
    record = ClientRecord(
        tkit=__version__, machine=client_machine(), created=utc_now(), protocols=tuple(found.values())
    )
    write_json(out / CLIENT_FILE, record)
    return record


def find_calibration(out: Path, protocol: str) -> ClientCalibration | None:
    """What was measured on this machine with this tkit, if it was."""
    record = _read(out)
    return record.of(_measured_as(protocol)) if record else None


def client_machine() -> dict[str, str]:
    """What the load generator's speed depends on."""
    return {
        "cpu": _cpu_name(),
        "cores": str(usable_cores()),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def _measured_as(protocol: str) -> str:
    find_protocol(protocol)
    return "openai" if protocol == "openai-chat" else protocol


def _read(out: Path) -> ClientRecord | None:
    path = out / CLIENT_FILE
    if not path.is_file():
        return None
    try:
        values = read_json(path)
        record = from_mapping(ClientRecord, values, str(path))
    except InputError as error:
        error.hint = error.hint or f"measure it again: rm {path}; tkit sweep --calibrate"
        raise
    is_ours = record.schema == CLIENT_SCHEMA and record.tkit == __version__ and record.machine == client_machine()
    return record if is_ours else None


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
