"""Triton's generate_stream with the inputs and outputs of TensorRT-LLM's `ensemble`: one POST per request.

The answer has no final marker: it is whole when the transport says so and as many tokens came as were asked for. An
error past the first event is an event, after a 200.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from tkit.errors import InputError, ServerError
from tkit.loadgen.sse_client import Chunk, SseClient, count_of
from tkit.loadgen.triton import refuse_unless_streaming, request_inputs, token_source


class TritonHttpClient(SseClient):
    text_key = b'"text_output":'
    count_pattern = re.compile(rb'"num_output_tokens":\s*\[?(\d+)')
    ends_with_done = False

    async def open(self, timeout_s: float) -> None:
        if self._address.path:
            raise InputError(f"--url is {self._url!r}, expected host:port for Triton, without a path")
        server = await self._ask_json("/v2", timeout_s)
        if not await self.is_ready(timeout_s):
            hint = "name the served model: --model NAME"
            raise ServerError(f'{self._url}: model "{self.model}" is not ready', hint=hint)
        metadata = await self._ask_json(self._path, timeout_s)
        config = await self._ask_json(f"{self._path}/config", timeout_s)
        self._inputs = [tensor["name"] for tensor in metadata["inputs"]]
        outputs = [tensor["name"] for tensor in metadata["outputs"]]
        is_decoupled = bool(config.get("model_transaction_policy", {}).get("decoupled"))
        refuse_unless_streaming(self._url, self.model, self._inputs, is_decoupled=is_decoupled)
        self.token_source = token_source(self._inputs, outputs)
        self.identity = {
            "server": server.get("name"),
            "version": server.get("version"),
            "extensions": server.get("extensions", []),
            "model": self.model,
            "model_versions": metadata.get("versions", []),
            "platform": metadata.get("platform"),
            "inputs": self._inputs,
            "outputs": outputs,
            "parameters": {key: value["string_value"] for key, value in sorted(config.get("parameters", {}).items())},
        }

    async def is_ready(self, timeout_s: float) -> bool:
        try:
            return (await self._ask(f"{self._path}/ready", timeout_s)).status == 200
        except ServerError:
            return False

    @property
    def _path(self) -> str:
        return f"/v2/models/{quote(self.model, safe='')}"

    def request(self, name: str, prompt: str, osl: int, seed: int) -> bytes:
        values = request_inputs(self._inputs, prompt, osl, seed).items()
        body = {"id": name, **{tensor: value for tensor, (_, value) in values}}
        return self._http.request(
            "POST", f"{self._path}/generate_stream", json.dumps(body).encode(), content_type="application/json"
        )

    def _chunk(self, event: Any) -> Chunk:
        text = event["text_output"]
        text = text[0] if isinstance(text, list) and len(text) == 1 else text
        if not isinstance(text, str):
            raise ValueError("text_output is no text")
        return Chunk(
            text=text,
            num_input_tokens=count_of(event.get("num_input_tokens")),
            num_output_tokens=count_of(event.get("num_output_tokens")),
        )

    def _adds_up(self, counts: Sequence[int], osl: int) -> bool:
        return counts[0] == 1 and counts[-1] in (1, osl)
