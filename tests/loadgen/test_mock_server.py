from __future__ import annotations

import socket
import subprocess
import sys


def test_the_mock_server_runs_in_the_background():
    """There stdin is /dev/null, which ends nothing."""
    command = [sys.executable, "-m", "tkit.loadgen.mock_server"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as server:
        with socket.create_connection(("127.0.0.1", int(server.stdout.readline()))) as connection:
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(9) == b"HTTP/1.1 "
        server.terminate()
