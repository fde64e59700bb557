"""What the front is told when it is started, and the packages it needs."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

PACKAGES = ("starlette", "uvicorn", "httptools", "uvloop")


@dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    host: str
    port: int
    triton: str  # host:port of its gRPC
    model: str  # Triton's name of it, and OpenAI's
    instance: str  # a nonce in the model's config: without it, it is some other server's
    engine: str  # name
    tokenizer: str  # directory
    max_positions: int  # of prompt and answer together
    api_key_file: str | None = None
    drain_s: int = 10  # what open requests are given to finish


def missing_packages() -> list[str]:
    return [package for package in PACKAGES if importlib.util.find_spec(package) is None]
