"""Serving an engine: check, lay out the repository, start Triton, wait until it generates; and the way back.

A server counts as started when its model is ready, both ports answer with this start's nonce, and a token came over
gRPC: NumPy 2 and port clashes pass every weaker test.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tkit.backends.table import Backend, find_backend
from tkit.errors import InputError, ServerError
from tkit.files import read_api_key, to_json, write_json
from tkit.gateway.settings import GatewaySettings, missing_packages
from tkit.specs.engine import EngineCard
from tkit.specs.progress import Progress
from tkit.specs.server import MODEL_NAME, PORTS, ServeOptions, ServerRecord
from tkit.stages.engines import ENGINES_DIR, read_card, verify_files
from tkit.stages.servers import ServerFiles, ServerLock, known_servers, replacing, running_servers, server_files
from tkit.triton import probe
from tkit.triton.inflight_batcher import ENGINE_MODEL
from tkit.triton.install import (
    TritonInstall,
    find_install,
    free_ports,
    has_nvidia_driver,
    held_ports,
    host_problems,
    install_problems,
    link_backends,
    port_problems,
    shared_memory_problems,
)
from tkit.triton.launcher import (
    GRACE_S,
    LaunchSpec,
    ServerProcess,
    describe_exit,
    end_member,
    kill_group,
    stop_group,
    stop_listening,
)
from tkit.triton.repository import write_repository

SMOKE_PROMPT = "Hello"
PORT_ATTEMPTS = 3  # a port found free may be taken by someone else before the server binds it
FRONT = "tkit.gateway"
MISSING_LIBRARY = "error while loading shared libraries"  # the server itself waits half a minute more before it says so


@dataclass(frozen=True, kw_only=True)
class StoppedServer:
    engine: str  # name
    pid: int | None
    was_running: bool
    was_killed: bool  # it did not end by itself in time


@contextlib.contextmanager
def running_server(
    engine_dir: Path,
    options: ServeOptions | None = None,
    *,
    engines_dir: Path = ENGINES_DIR,
    progress: Progress | None = None,
) -> Iterator[ServerRecord]:
    """A server for as long as the block runs. It and its leftovers are gone afterwards, whatever happened.

    Enter it in a thread that outlives the block: the server dies with the thread that started it.
    """
    server = _start(engine_dir, options or ServeOptions(), engines_dir, progress or Progress(), is_detached=False)
    try:
        yield server.record
    finally:
        server.close()


def serve(
    engine_dir: Path,
    options: ServeOptions,
    announce: Callable[[ServerRecord], None],
    *,
    replaces: bool = False,
    engines_dir: Path = ENGINES_DIR,
    progress: Progress | None = None,
) -> None:
    """Serves in the foreground: `announce` when ready; returns when someone stops the server, raises when it dies.

    `replaces` the one server that runs: on its ports, beside it until this one has generated; then the old one ends.
    """
    progress = progress or Progress()
    with _server_to_replace(engines_dir) if replaces else contextlib.nullcontext() as old:
        server = _start(engine_dir, options, engines_dir, progress, is_detached=False, old=old)
        try:
            _end_replaced(old, engines_dir, progress)
        except BaseException:
            server.close()
            raise
    try:
        announce(server.record)
        server.watch()
    finally:
        server.close()


def serve_detached(
    engine_dir: Path,
    options: ServeOptions,
    *,
    replaces: bool = False,
    engines_dir: Path = ENGINES_DIR,
    progress: Progress | None = None,
) -> ServerRecord:
    """Leaves a server behind that answers; `stop_server` ends it. `replaces` as in `serve`."""
    progress = progress or Progress()
    with _server_to_replace(engines_dir) if replaces else contextlib.nullcontext() as old:
        server = _start(engine_dir, options, engines_dir, progress, is_detached=True, old=old)
        server.leave()
        _end_replaced(old, engines_dir, progress)
    return server.record


def stop_server(engine: str | None = None, *, engines_dir: Path = ENGINES_DIR) -> list[StoppedServer]:
    """Ends the server of an engine (None: the only one there is) and removes what it or a dead one left behind."""
    known = {files.name: files for files in known_servers(engines_dir)}
    running = [name for name, files in known.items() if files.is_running()]
    if engine is not None:
        name = Path(engine).name
        if name not in known:
            raise ServerError(
                f'no server is running for "{name}"',
                hint=f"running: {', '.join(running)}" if running else "start one: tkit serve",
            )
        return [_stop(known[name])]
    if len(running) > 1:
        raise InputError("several servers are running", problems=running, hint="name one: tkit stop ENGINE")
    if not known:
        raise ServerError("no server is running", hint="start one: tkit serve")
    return [_stop(files) for files in known.values()]


def _stop(files: ServerFiles) -> StoppedServer:
    pid, was_running, was_killed = files.pid(), files.is_running(), False
    if pid is None and was_running:
        raise ServerError(f"{files.name}: its server is about to be started", hint="end that tkit serve")
    try:
        if pid is not None and was_running:
            _end_front(files.readable_record())
            was_killed = stop_group(pid, ServeOptions.exit_timeout_s + GRACE_S)
        elif pid is not None and files.is_locked():
            kill_group(pid)
    finally:
        files.remove_leftovers()
        if not files.is_locked():
            files.lock.unlink(missing_ok=True)
    return StoppedServer(engine=files.name, pid=pid, was_running=was_running, was_killed=was_killed)


@contextlib.contextmanager
def _server_to_replace(engines_dir: Path) -> Iterator[ServerRecord]:
    """The one server that runs. No other may take its place meanwhile: two would share its ports, and its clients."""
    with replacing(engines_dir):
        running = running_servers(engines_dir)
        if len(running) > 1:
            names = [Path(record.engine).name for record in running]
            raise InputError(
                "several servers are running", problems=names, hint="stop all but the one to replace: tkit stop ENGINE"
            )
        if not running:
            raise ServerError("no server is running that could be replaced", hint="start one: tkit serve")
        yield running[0]


def _end_replaced(old: ServerRecord | None, engines_dir: Path, progress: Progress) -> None:
    """Requests that it is answering finish, within its exit timeout; new ones come to the new server already."""
    if old is not None:
        name = Path(old.engine).name
        stop_listening(old.pid, (old.http_port, old.grpc_port))
        stopped = _stop(server_files(name, engines_dir))
        progress.note(f"{name}: {'killed, it did not end in time' if stopped.was_killed else 'replaced'}")


def _on_the_ports_of(old: ServerRecord, options: ServeOptions) -> ServeOptions:
    """Triton cannot share the metrics port, so that one is new. The key is never dropped on the way."""
    return replace(
        options,
        host=old.host,
        http_port=old.http_port,
        grpc_port=old.grpc_port,
        openai_port=old.openai_port,
        metrics_port=0,
        api_key_file=options.api_key_file or (Path(old.api_key_file) if old.api_key_file else None),
    )


def _end_front(record: ServerRecord | None) -> None:
    """First, so that nobody comes in through it while the server ends; it waits for the answers under way."""
    if record is not None:
        end_member(record.pid, record.openai_pid, ServeOptions.exit_timeout_s)


@dataclass(frozen=True)
class _Launch:
    """What stays the same over the attempts to start one server."""

    engine_dir: Path
    card: EngineCard
    backend: Backend
    install: TritonInstall
    files: ServerFiles
    lock: ServerLock
    is_detached: bool
    progress: Progress


class _Server:
    """A server that has generated, together with its lock and files."""

    def __init__(self, process: ServerProcess, record: ServerRecord, launch: _Launch):
        self.record = record
        self._process = process
        self._launch = launch
        self._child_pids = {*record.model_pids, record.openai_pid}

    def watch(self) -> None:
        """Returns when the server has ended because someone asked it to; raises when it or a child of it died."""
        process = self._process
        while (code := process.wait(1.0)) is None:
            gone = self._child_pids - process.child_pids()
            if gone and process.wait(1.0) is None and not process.is_asked_to_end:
                who = "the OpenAI front" if self.record.openai_pid in gone else "the model's process"
                error = process.failure(f"{who} died (killed, or out of memory)")
                process.kill()  # asked to end, it would wait for the dead model
                raise error
        if not process.is_asked_to_end:
            raise process.failure(f"the server died: {describe_exit(code)}")

    def leave(self) -> None:
        self._process.leave()
        self._launch.lock.leave_to_server()

    def close(self) -> None:
        try:
            _end_front(self.record)
            self._process.stop()
        finally:
            self._launch.files.remove_leftovers()
            self._launch.lock.release()


def _start(
    engine_dir: Path,
    options: ServeOptions,
    engines_dir: Path,
    progress: Progress,
    *,
    is_detached: bool,
    old: ServerRecord | None = None,
) -> _Server:
    """Cheap checks first, all reported at once; then the hashes; then the process. An error leaves nothing behind."""
    engine_dir = engine_dir.resolve()
    if old is not None:
        options = _on_the_ports_of(old, options)
    card = read_card(engine_dir)
    backend = find_backend(card.backend)
    files = server_files(engine_dir.name, engines_dir)
    lock = ServerLock(files)
    try:
        if options.api_key_file is not None:
            read_api_key(options.api_key_file)
        install = _checked_install(engine_dir, card.backend, options, engines_dir, old)
        progress.note(f"{install.binary} ({install.origin})")
        _warn_about_host(options, install, progress)
        verify_files(engine_dir, card, progress)
        launch = _Launch(engine_dir, card, backend, install, files, lock, is_detached, progress)
        process, options, openai_pid = _launch_until_it_generates(launch, options)
    except BaseException as error:
        files.remove_leftovers()
        lock.release()
        if isinstance(error, OSError):
            raise ServerError(f"the server could not be started: {error}") from error
        raise
    record = ServerRecord(
        engine=str(engine_dir),
        pid=process.pid,
        host=options.host,
        http_port=options.http_port,
        grpc_port=options.grpc_port,
        metrics_port=options.metrics_port,
        openai_port=options.openai_port,
        model_pids=tuple(sorted(process.child_pids() - {openai_pid})),
        openai_pid=openai_pid,
        api_key_file=_absolute(options.api_key_file),
        started=datetime.now(UTC).isoformat(timespec="microseconds"),
        log=str(files.log),
        kv_cache_shares=dict.fromkeys(backend.gpus(engine_dir), options.kv_cache_fraction),
    )
    server = _Server(process, record, launch)
    try:
        write_json(files.record, record)
    except BaseException:
        server.close()
        raise
    return server


def _checked_install(
    engine_dir: Path, backend_name: str, options: ServeOptions, engines_dir: Path, old: ServerRecord | None
) -> TritonInstall:
    install, backend = find_install(), find_backend(backend_name)
    ports = {f"--{name.replace('_', '-')}": port for name, port in zip(PORTS, options.ports, strict=True)}
    if old is not None:
        ports = {}  # the old server's
    missing = missing_packages()
    unreachable = host_problems(options.host)
    taken = [] if unreachable else port_problems(options.host, ports)
    problems = [
        *install_problems(install),
        *([f"{', '.join(missing)} not installed; pip install 'tkit[serve]'"] if missing else []),
        *backend.problems(engine_dir, options, install),
        *_sharing_problems(backend.gpus(engine_dir), options.kv_cache_fraction, engines_dir),
        *unreachable,
        *taken,
        *shared_memory_problems(),
    ]
    if problems or install is None:
        hint = f"tkit doctor --backend {backend_name} says what this machine lacks"
        if taken:
            hint = "tkit status names the servers of this checkout, tkit stop ends one; port 0 is any free one"
        raise ServerError("the server cannot start here", problems=problems, hint=hint)
    return install


def _sharing_problems(gpus: Sequence[str], fraction: float, engines_dir: Path) -> list[str]:
    """KV caches that together want more than a GPU: each takes its fraction of what the others have left, so the last to
    start gets next to nothing."""
    problems = []
    for gpu in gpus:
        shares = {
            Path(record.engine).name: record.kv_cache_shares.get(gpu, 0) for record in running_servers(engines_dir)
        }
        shares = {name: share for name, share in shares.items() if share}
        if shares and fraction + sum(shares.values()) > 1:
            others = ", ".join(f"{share} of {name}" for name, share in shares.items())
            problems.append(f"GPU {gpu}: --kv-cache-fraction {fraction} beside {others} is more than all its memory")
    return problems


def _warn_about_host(options: ServeOptions, install: TritonInstall, progress: Progress) -> None:
    if options.is_loopback:
        return
    lack = "without authentication or encryption"
    if options.api_key_file is not None:
        lack = "without encryption; the key guards the OpenAI port, not Triton's own"
    progress.note(f"warning: --host {options.host} opens the server to the network, {lack}")
    if install.is_wheel:
        progress.note(
            "warning: the wheel's tritonserver 2.51 has known remote holes (CVE-2025-23310, -23319, -23320, -23334; "
            "fixed in 2.59.1); bind loopback, or use NVIDIA's container"
        )


def _launch_until_it_generates(launch: _Launch, options: ServeOptions) -> tuple[ServerProcess, ServeOptions, int]:
    """A server that has generated, the options with the ports it listens on, and the process id of its OpenAI front."""
    for attempt in range(PORT_ATTEMPTS):
        fixed, instance = _with_ports(options), secrets.token_hex(8)
        process = _launch(launch, fixed, instance)
        try:
            with held_ports(fixed.host, (fixed.http_port, fixed.grpc_port, fixed.openai_port)):
                _wait_until_it_generates(process, fixed, instance, launch.progress)
                return process, fixed, _wait_for_the_front(process, fixed, instance)
        except BaseException as error:
            is_port_lost = isinstance(error, ServerError) and process.log_contains("already in use")
            process.kill()
            launch.files.remove_leftovers()
            if not is_port_lost or fixed == options or attempt == PORT_ATTEMPTS - 1:
                raise
    raise AssertionError("the last attempt returns or raises")


def _with_ports(options: ServeOptions) -> ServeOptions:
    """Every port 0 replaced by a free one."""
    free = iter(free_ports(options.host, options.ports.count(0)))
    ports: dict[str, Any] = {name: port or next(free) for name, port in zip(PORTS, options.ports, strict=True)}
    return replace(options, **ports)


def _launch(launch: _Launch, options: ServeOptions, instance: str) -> ServerProcess:
    runtime = launch.files.runtime
    runtime.mkdir(mode=0o700)
    write_repository(runtime / "repository", launch.backend.served_models(launch.engine_dir, options, instance))
    backends = runtime / "backends" if launch.install.is_wheel else None
    if backends is not None:
        link_backends(launch.install, backends)
    spec = LaunchSpec(
        repository=runtime / "repository",
        host=options.host,
        http_port=options.http_port,
        grpc_port=options.grpc_port,
        metrics_port=options.metrics_port,
        exit_timeout_s=options.exit_timeout_s,
        backends=backends,
        has_gpu_metrics=options.device != "cpu" and has_nvidia_driver(),
        is_own_python=launch.backend.is_own_python,
        shares_ports=True,
        num_ranks=launch.backend.num_ranks(launch.engine_dir),
        rank_model=ENGINE_MODEL,
    )
    process = ServerProcess.start(
        launch.install,
        spec,
        launch.files.log,
        dies_with_parent=not launch.is_detached,
        keep_open=[launch.lock.descriptor],
        beside=_front_command(launch, options, instance),
    )
    try:
        launch.lock.write_pid(process.pid)
    except BaseException:
        process.kill()
        raise
    return process


def _front_command(launch: _Launch, options: ServeOptions, instance: str) -> list[str]:
    settings = GatewaySettings(
        host=options.host,
        port=options.openai_port,
        triton=f"{probe.connect_host(options.host)}:{options.grpc_port}",
        model=MODEL_NAME,
        instance=instance,
        engine=launch.card.name,
        tokenizer=str(launch.engine_dir / "tokenizer"),
        max_positions=_max_positions(launch.card),
        api_key_file=_absolute(options.api_key_file),
        drain_s=options.exit_timeout_s,
    )
    return [sys.executable, "-P", "-m", FRONT, "{pid}", to_json(settings)]


def _max_positions(card: EngineCard) -> int:
    """Of prompt and answer: what the engine was built for, where it was told."""
    limit: int | None = (card.compiled or card.recipe).get("max_seq_len")
    return limit or card.max_position_embeddings


def _absolute(path: Path | None) -> str | None:
    return str(path.absolute()) if path is not None else None


def _wait_for_the_front(process: ServerProcess, options: ServeOptions, instance: str) -> int:
    """Its process id, once it is connected to the model of this start and answers."""
    deadline = time.monotonic() + options.timeout_s
    while True:
        pid = process.find_child(FRONT)
        if pid is None:
            raise process.failure("the OpenAI front did not start")
        if probe.front_instance(options.host, options.openai_port, timeout_s=1.0) == instance:
            return pid
        if time.monotonic() > deadline:
            raise process.failure(f"the OpenAI front did not answer within {options.timeout_s:g} s")
        time.sleep(0.1)


def _wait_until_it_generates(process: ServerProcess, options: ServeOptions, instance: str, progress: Progress) -> None:
    """Within `timeout_s`, or ServerError with the exit code or the time, and the last lines of the log."""
    deadline = time.monotonic() + options.timeout_s
    progress.step("starting Triton", 0, 2)
    while (found := probe.http_instance(options.host, options.http_port, timeout_s=1.0)) != instance:
        process.check_alive()
        if process.log_contains(MISSING_LIBRARY):
            raise process.failure("the model's process lacks a library")
        if time.monotonic() > deadline:
            other = "; another server answers on its HTTP port" if found is not None else ""
            raise process.failure(f"the server was not ready within {options.timeout_s:g} s{other}")
        time.sleep(0.1)
    progress.step("starting Triton", 1, 2)
    remaining_s = max(deadline - time.monotonic(), 1.0)
    try:
        probe.generate(options.host, options.grpc_port, SMOKE_PROMPT, 1, remaining_s, instance=instance)
    except ServerError as error:
        process.check_alive()
        raise process.failure(error.message) from error
    progress.step("starting Triton", 2, 2)
