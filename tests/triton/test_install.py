"""Which server is taken, and what is said when it cannot run here."""

from __future__ import annotations

import os
import socket
import sys
from collections import namedtuple
from pathlib import Path

import psutil
import pytest

from tkit.triton import install
from tkit.triton.install import find_install, free_ports, host_problems, install_problems, link_backends, port_problems


def fake_server(root: Path, *, is_wheel: bool = False) -> Path:
    binary = root / "bin" / "tritonserver"
    binary.parent.mkdir(parents=True)
    binary.touch(mode=0o755)
    if is_wheel:
        (root / "python_backend_stubs").mkdir()
    return binary


def test_the_wheel_is_taken_when_there_is_nothing_else() -> None:
    found = find_install({"PATH": "/nowhere"})
    assert found is not None
    assert (found.is_wheel, found.binary.parts[-4:]) == (True, ("pytriton", "tritonserver", "bin", "tritonserver"))
    assert found.origin == (
        "from the nvidia-pytriton wheel: no $TKIT_TRITONSERVER, no /opt/tritonserver/bin/tritonserver, none on PATH"
    )
    assert install_problems(found) == []


def test_order_of_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, container, on_path = (fake_server(tmp_path / name) for name in ("named", "container", "path"))
    environment = {"TKIT_TRITONSERVER": str(named), "PATH": str(on_path.parent)}
    monkeypatch.setattr(install, "CONTAINER_SERVER", container)
    places = [find_install(environment), find_install({"PATH": str(on_path.parent)})]
    monkeypatch.setattr(install, "CONTAINER_SERVER", tmp_path / "absent")
    places.append(find_install({"PATH": str(on_path.parent)}))
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    assert [(place.binary, place.origin, place.is_wheel) for place in places if place] == [
        (named, "$TKIT_TRITONSERVER", False),
        (container, "the container's", False),
        (on_path, "the first on PATH", False),
    ]
    assert find_install({"PATH": "/nowhere"}) is None


def test_no_server_at_all() -> None:
    assert install_problems(None) == [
        "no tritonserver: none in the container's place, on PATH or as a wheel; pip install 'tkit[serve]'"
    ]


def test_a_named_server_is_not_replaced_by_another(tmp_path: Path) -> None:
    found = find_install({"TKIT_TRITONSERVER": str(tmp_path / "gone"), "PATH": os.environ["PATH"]})
    assert install_problems(found) == [f"{tmp_path}/gone ($TKIT_TRITONSERVER) is not an executable file"]


def test_the_wheel_and_a_python_it_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_install({"TKIT_TRITONSERVER": str(fake_server(tmp_path, is_wheel=True))})
    version = namedtuple("version", "major minor")
    monkeypatch.setattr(install.importlib.metadata, "version", lambda name: "2.2.6")
    monkeypatch.setattr(install.sysconfig, "get_config_var", lambda name: None)
    monkeypatch.setattr(sys, "version_info", version(3, 13))
    assert install_problems(found) == [
        "Python 3.13: the nvidia-pytriton wheel needs NumPy 1, which ends with Python 3.12",
        "NumPy 2.2.6: the nvidia-pytriton wheel aborts on the first request; pip install 'numpy<2'",
        "libpython3.13.so not found: this Python has no shared library; use one built with --enable-shared",
    ]
    monkeypatch.setattr(install.importlib.metadata, "version", lambda name: "1.26.4")
    monkeypatch.setattr(sys, "version_info", version(3, 7))
    assert install_problems(found)[0] == (
        "the nvidia-pytriton wheel has no Python backend for Python 3.7; use 3.10 to 3.12"
    )


def test_a_container_server_brings_its_own_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_install({"TKIT_TRITONSERVER": str(fake_server(tmp_path))})
    monkeypatch.setattr(install.importlib.metadata, "version", lambda name: "2.2.6")
    assert install_problems(found) == []


def test_linked_backends_are_the_wheels_files(tmp_path: Path) -> None:
    found = find_install({"PATH": "/nowhere"})
    assert found is not None
    link_backends(found, tmp_path)
    links = {path.name: path.resolve() for path in (tmp_path / "python").iterdir()}
    assert sorted(links) == ["libtriton_python.so", "triton_python_backend_stub", "triton_python_backend_utils.py"]
    assert all(target.is_file() and path.is_symlink() for path, target in
               ((tmp_path / "python" / name, target) for name, target in links.items()))  # fmt: skip
    assert links["triton_python_backend_stub"].parent.name == f"{sys.version_info.major}.{sys.version_info.minor}"


def test_a_listener_is_named_and_a_free_port_is_not() -> None:
    ports = free_ports("127.0.0.1", 3)
    assert len(set(ports)) == 3
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        assert port_problems("127.0.0.1", {"--http-port": port, "--grpc-port": ports[0]}) == [
            f"--http-port {port} is in use by {psutil.Process().name()} (pid {os.getpid()})"
        ]


def test_a_host_that_is_not_this_machine() -> None:
    assert host_problems("192.0.2.1") == [
        "--host 192.0.2.1: Cannot assign requested address; expected an address of this machine"
    ]
    assert host_problems("127.0.0.1") == []


def test_little_shared_memory_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert install.shared_memory_problems() == []
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(install.shutil, "disk_usage", lambda path: usage(1_500_000))
    assert install.shared_memory_problems() == [
        "/dev/shm has 1.5 MB free, the backend needs 64.0 MB; docker: --shm-size=1g"
    ]
