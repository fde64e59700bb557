"""The protocols a sweep speaks, and what each client answers. Knows names; imports a client when it is used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tkit.errors import InputError, did_you_mean
from tkit.loadgen.exchange import Answer, Exchange
from tkit.loadgen.token_counts import TokenEnds
from tkit.specs.recipe import HF_GENERATE

DEFAULT_PROTOCOL = "triton-grpc"


class Client(Protocol):
    """One open connection to one model. Everything but `perform` may be slow: it runs before the load or after it."""

    model: str  # its name, once the client is open
    token_source: str  # one of specs.record.TOKEN_SOURCES
    identity: Mapping[str, Any]  # what the server says of itself

    async def open(self, timeout_s: float) -> None:
        """Connects and reads what the model accepts. Raises ServerError unless the model is ready to stream."""

    async def is_ready(self, timeout_s: float) -> bool:
        """The server answers and the model is loaded."""

    def request(self, name: str, prompt: str, osl: int, seed: int) -> bytes:
        """The bytes of one request for exactly `osl` tokens, greedily, end of sequence ignored."""

    async def perform(self, exchange: Exchange) -> None:
        """Sends, and writes a time and the bytes per message. Never raises for what a server may do: see `error`."""

    def answer(self, exchange: Exchange) -> Answer:
        """What the messages say."""

    async def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class ProtocolRow:
    client: str  # module:class, called with (url, model, token_ends), and api_key where it takes one
    port: str  # the field of ServerRecord that holds its port
    is_http: bool
    lists_models: bool = False  # so that a server of one model need not be told which
    has_api_key: bool = False
    wraps_prompts: bool = False  # the server adds a chat template's tokens to every prompt


PROTOCOLS = {
    "triton-grpc": ProtocolRow(client="tkit.loadgen.triton_grpc:TritonGrpcClient", port="grpc_port", is_http=False),
    "triton-http": ProtocolRow(client="tkit.loadgen.triton_http:TritonHttpClient", port="http_port", is_http=True),
    "openai":      ProtocolRow(client="tkit.loadgen.openai_http:OpenAIClient",     port="openai_port", is_http=True,
                               lists_models=True, has_api_key=True),
    "openai-chat": ProtocolRow(client="tkit.loadgen.openai_http:OpenAIChatClient", port="openai_port", is_http=True,
                               lists_models=True, has_api_key=True, wraps_prompts=True),
}  # fmt: skip


def find_protocol(name: str) -> ProtocolRow:
    if name not in PROTOCOLS:
        raise InputError(
            f'--protocol: unknown protocol "{name}"{did_you_mean(name, PROTOCOLS)}',
            hint=f"known: {', '.join(PROTOCOLS)}, {HF_GENERATE}",
        )
    return PROTOCOLS[name]


def make_client(
    protocol: str, url: str, model: str | None, token_ends: TokenEnds | None, api_key: str | None = None
) -> Client:
    """`token_ends` gives the end of each token in a text, for servers that do not count tokens themselves;
    without it each of their chunks counts as one."""
    row = find_protocol(protocol)
    module, _, name = row.client.partition(":")
    key = {"api_key": api_key} if row.has_api_key else {}
    client: Client = getattr(importlib.import_module(module), name)(url, model, token_ends, **key)
    return client
