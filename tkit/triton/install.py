"""Which Triton this machine has, and everything that would keep it from starting. Starts nothing.

The wheel of nvidia-pytriton carries a whole tritonserver 2.51 for machines without the container. What it needs, each
found by a start that failed: a Python it has a stub for; NumPy 1 (its pybind11 misreads NumPy 2's type sizes: the model
gets ready, and the first request with text aborts it); libpython as a shared library.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from tkit.units import format_bytes

SERVER_VARIABLE = "TKIT_TRITONSERVER"
CONTAINER_SERVER = Path("/opt/tritonserver/bin/tritonserver")
WHEEL = "nvidia-pytriton"
BACKEND_FILES = ("libtriton_python.so", "triton_python_backend_utils.py")
STUB = "triton_python_backend_stub"
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
SHARED_MEMORY = Path("/dev/shm")
# One instance takes 1 MB at rest and grew to 28 MB after a 20 MB request; a container's default is 64 MB in all.
SHARED_MEMORY_BYTES = 64_000_000


@dataclass(frozen=True, kw_only=True)
class TritonInstall:
    """`origin` says where the server was found and what was looked at before, for the first line of a launch."""

    binary: Path
    origin: str
    is_wheel: bool

    @property
    def root(self) -> Path:
        return self.binary.parent.parent


def find_install(environment: Mapping[str, str] = os.environ) -> TritonInstall | None:
    """$TKIT_TRITONSERVER, the container's, PATH, then the wheel; None when there is none. A set variable is binding."""
    if named := environment.get(SERVER_VARIABLE):
        return _install(Path(named).absolute(), f"${SERVER_VARIABLE}")
    if CONTAINER_SERVER.is_file():
        return _install(CONTAINER_SERVER, "the container's")
    if on_path := shutil.which("tritonserver", path=environment.get("PATH")):
        return _install(Path(on_path).resolve(), "the first on PATH")
    package = importlib.util.find_spec("pytriton")
    if package is None or not package.submodule_search_locations:
        return None
    binary = Path(package.submodule_search_locations[0]) / "tritonserver" / "bin" / "tritonserver"
    origin = f"from the {WHEEL} wheel: no ${SERVER_VARIABLE}, no {CONTAINER_SERVER}, none on PATH"
    return _install(binary, origin) if binary.is_file() else None


def _install(binary: Path, origin: str) -> TritonInstall:
    is_wheel = (binary.parent.parent / "python_backend_stubs").is_dir()
    return TritonInstall(binary=binary, origin=origin, is_wheel=is_wheel)


def install_problems(install: TritonInstall | None) -> list[str]:
    """Why this server cannot run here, one line each with what to do."""
    if install is None:
        problem = "no tritonserver: none in the container's place, on PATH or as a wheel; pip install 'tkit[serve]'"
        return [problem, *_python_problems()]
    if not os.access(install.binary, os.X_OK):
        return [f"{install.binary} ({install.origin}) is not an executable file"]
    if not install.is_wheel:
        return []
    problems = _python_problems()
    stub = install.root / "python_backend_stubs" / _python_version() / STUB
    if not problems and not stub.is_file():
        problems.append(f"the {WHEEL} wheel has no Python backend for Python {_python_version()}; use 3.10 to 3.12")
    if library_directory() is None:
        name = f"libpython{_python_version()}.so"
        problems.append(f"{name} not found: this Python has no shared library; use one built with --enable-shared")
    return problems


def _python_problems() -> list[str]:
    problems = []
    if sys.version_info >= (3, 13):
        problems.append(f"Python {_python_version()}: the {WHEEL} wheel needs NumPy 1, which ends with Python 3.12")
    elif (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        problems.append(f"{platform.system()} {platform.machine()}: the {WHEEL} wheel is for Linux x86_64 only")
    numpy = importlib.metadata.version("numpy")
    if int(numpy.split(".")[0]) >= 2:
        problems.append(f"NumPy {numpy}: the {WHEEL} wheel aborts on the first request; pip install 'numpy<2'")
    return problems


def others_path(environment: Mapping[str, str]) -> str:
    """PATH without the virtual environment that tkit may live in: there the container's own programs come first."""
    own, paths = str(Path(sys.executable).parent), environment.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join(path for path in paths if path != own or sys.prefix == sys.base_prefix)


def has_nvidia_driver() -> bool:
    return NVIDIA_DRIVER.exists()


def library_directory() -> Path | None:
    """Where this interpreter's libpython lies; None when there is none to load."""
    name = sysconfig.get_config_var("INSTSONAME") or ""
    directory = Path(sysconfig.get_config_var("LIBDIR") or "/nowhere")
    return directory if name.startswith("libpython") and ".so" in name and (directory / name).exists() else None


def _python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def link_backends(install: TritonInstall, directory: Path) -> None:
    """A backend directory with only the Python backend and the stub of this interpreter's version.

    Links, not copies: the stub finds the wheel's libraries relative to where its file really lies.
    """
    python = directory / "python"
    python.mkdir(parents=True)
    for name in BACKEND_FILES:
        (python / name).symlink_to(install.root / "backends" / "python" / name)
    (python / STUB).symlink_to(install.root / "python_backend_stubs" / _python_version() / STUB)


def free_ports(host: str, count: int) -> list[int]:
    """Ports nobody listens on now, all different."""
    sockets = [_bound_socket(host, 0) for _ in range(count)]
    ports = [bound.getsockname()[1] for bound in sockets]
    for bound in sockets:
        bound.close()
    return ports


@contextlib.contextmanager
def held_ports(host: str, ports: Iterable[int]) -> Iterator[None]:
    """Keeps others from taking these ports until servers listen on them that share theirs (SO_REUSEPORT), as ours do."""
    with contextlib.ExitStack() as held:
        for port in ports:
            bound = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            with contextlib.suppress(OSError):  # taken: the server will say by whom it was refused
                bound.bind((host, port))
        yield


def host_problems(host: str) -> list[str]:
    try:
        _bound_socket(host, 0).close()
    except OSError as error:
        return [f"--host {host}: {error.strerror}; expected an address of this machine"]
    return []


def port_problems(host: str, ports: Mapping[str, int]) -> list[str]:
    """Ports of this machine that cannot be bound: `--http-port 8000 is in use by python (pid 4711)`."""
    problems = []
    for option, port in ports.items():
        try:
            _bound_socket(host, port).close()
        except PermissionError:
            problems.append(f"{option} {port}: not permitted; ports below 1024 belong to root")
        except OSError as error:
            is_taken = error.errno == errno.EADDRINUSE
            problems.append(f"{option} {port} {f'is in use{_port_owner(port)}' if is_taken else error.strerror}")
    return problems


def _bound_socket(host: str, port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # Connections of an earlier server in TIME_WAIT do not count; a listener does, with or without this option.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound


def _port_owner(port: int) -> str:
    """` by python (pid 4711)` where the system tells, else nothing."""
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except psutil.Error:
        pass
    return ""


def shared_memory_problems() -> list[str]:
    try:
        free_bytes = shutil.disk_usage(SHARED_MEMORY).free
    except OSError as error:
        return [f"{SHARED_MEMORY}: {error.strerror}; the Python backend needs it"]
    if free_bytes >= SHARED_MEMORY_BYTES:
        return []
    needed = format_bytes(SHARED_MEMORY_BYTES)
    return [f"{SHARED_MEMORY} has {format_bytes(free_bytes)} free, the backend needs {needed}; docker: --shm-size=1g"]
