"""The process: `python -m tkit.gateway SERVER_PID SETTINGS`, SETTINGS being GatewaySettings as JSON.

A child of the server it stands in front of. It listens when the server is ready, and ends with it: on SIGTERM at once
for new requests, after `drain_s` for open ones; without being asked when the server is gone.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from pathlib import Path

import uvicorn
import uvloop

from tkit.files import from_mapping, read_api_key
from tkit.gateway.app import make_app
from tkit.gateway.prompts import PromptTokenizer
from tkit.gateway.settings import GatewaySettings
from tkit.gateway.triton import TritonModel

SERVER_PERIOD_S = 0.5
# Longer than clients keep idle connections (the openai package 5 s): a connection that both ends may close at any time
# fails now and then when it is used again.
KEEP_ALIVE_S = 75
BACKLOG = 2048


def main() -> None:
    server_pid = int(sys.argv[1])
    settings = from_mapping(GatewaySettings, json.loads(sys.argv[2]), "gateway settings")
    uvloop.run(_serve(settings, server_pid))


async def _serve(settings: GatewaySettings, server_pid: int) -> None:
    tokenizer = PromptTokenizer(Path(settings.tokenizer))
    api_key = read_api_key(Path(settings.api_key_file)) if settings.api_key_file is not None else None
    model = TritonModel(settings.triton, settings.model, settings.instance)
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(settings, model, tokenizer, api_key),
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=settings.drain_s,
        )
    )
    watching = asyncio.create_task(_end_with_server(server_pid, server))
    await model.connect()
    await server.serve(sockets=[_listener(settings.host, settings.port)])
    watching.cancel()
    await model.close()


async def _end_with_server(server_pid: int, server: uvicorn.Server) -> None:
    while os.getppid() == server_pid:
        await asyncio.sleep(SERVER_PERIOD_S)
    if not server.started:
        os._exit(1)
    server.should_exit = True


def _listener(host: str, port: int) -> socket.socket:
    """Shared with the front that stands there already, if any: one is to take over from the other."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((host, port))
    listener.listen(BACKLOG)
    return listener


if __name__ == "__main__":
    main()
