"""OpenAI's completions and chat, streamed, as vLLM, SGLang, trtllm-serve, NIM and Triton's own frontend answer it.

`ignore_eos` and `min_tokens` are no part of OpenAI's API but of all of these. The usage at the end of the stream counts the
tokens, not their times: an answer of as many texts as tokens had one token in each; see `tokens_of_total` for others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from tkit.errors import InputError, ServerError, did_you_mean
from tkit.loadgen.sse_client import Chunk, SseClient, count_of

DEFAULT_BASE = "/v1"


class OpenAIClient(SseClient):
    text_key = b'"text":'
    count_pattern = re.compile(rb'"completion_tokens":\s*(\d+)')
    ends_with_done = True
    path = "completions"

    @property
    def _base(self) -> str:
        return self._address.path or DEFAULT_BASE

    async def open(self, timeout_s: float) -> None:
        reply = await self._ask(f"{self._base}/models", timeout_s)
        if reply.status in (401, 403):
            hint = "give the file that holds the key: --api-key-file FILE"
            raise InputError(f"{self._url}: {self._told(reply.status, reply.body)}", hint=hint)
        models = _models(reply.body) if reply.status == 200 else {}
        names = list(models)
        known = ", ".join(names)
        if not self.model and len(names) != 1:
            what = f"serves {len(names)} models ({known})" if names else "does not say which models it serves"
            raise ServerError(f"{self._url} {what}", hint="name one: --model NAME")
        if self.model and names and self.model not in names:
            raise ServerError(
                f'{self._url}: no model "{self.model}"{did_you_mean(self.model, names)}', hint=f"it serves: {known}"
            )
        self.model = self.model or names[0]
        self.token_source = "server_usage"
        self.identity = {
            "server": reply.fields.get("server"),
            "version": await self._version(timeout_s),
            "model": self.model,
            "models": names,
            "root": models.get(self.model, {}).get("root"),
        }

    async def _version(self, timeout_s: float) -> str | None:
        """vLLM and SGLang tell theirs outside of OpenAI's paths."""
        reply = await self._ask("/version", timeout_s)
        try:
            version = json.loads(reply.body)["version"] if reply.status == 200 else None
        except (ValueError, KeyError, TypeError):
            return None
        return str(version) if version is not None else None

    async def is_ready(self, timeout_s: float) -> bool:
        """Whatever it answers, unless that is a failure of its own: not every server lists its models."""
        try:
            return (await self._ask(f"{self._base}/models", timeout_s)).status < 500
        except ServerError:
            return False

    def request(self, name: str, prompt: str, osl: int, seed: int) -> bytes:
        body = {
            "model": self.model,
            **self._prompt(prompt),
            "max_tokens": osl,
            "min_tokens": osl,
            "ignore_eos": True,
            "temperature": 0,
            "seed": seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return self._http.request(
            "POST", f"{self._base}/{self.path}", json.dumps(body).encode(), content_type="application/json",
            accept="text/event-stream", x_request_id=name,
        )  # fmt: skip

    def _prompt(self, prompt: str) -> dict[str, Any]:
        return {"prompt": prompt}

    def _chunk(self, event: Any) -> Chunk:
        usage, texts = event.get("usage") or {}, [_text(choice) for choice in event["choices"]]
        count = count_of(usage.get("completion_tokens"))
        return Chunk(
            text="".join(texts),
            num_input_tokens=count_of(usage.get("prompt_tokens")),
            num_output_tokens=count if texts else None,
            total_output_tokens=count,
        )

    def _adds_up(self, counts: Sequence[int], osl: int) -> bool:
        return counts[-1] == osl


class OpenAIChatClient(OpenAIClient):
    text_key = b'"content":'
    path = "chat/completions"

    def _prompt(self, prompt: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": prompt}]}


def _text(choice: Any) -> str:
    """Chat servers open with a delta that only names a role, and what a model thinks before it answers is generated too."""
    delta = choice if "text" in choice else choice["delta"]
    text = next(filter(None, map(delta.get, ("text", "content", "reasoning_content", "reasoning"))), None)
    if not isinstance(text, str | None):
        raise ValueError("text is no text")
    return text or ""


def _models(body: bytes) -> dict[str, dict[str, Any]]:
    """By name. vLLM's `root`, where there is one, tells what stands behind a name."""
    try:
        return {str(model["id"]): model for model in json.loads(body)["data"]}
    except (ValueError, KeyError, TypeError):
        return {}
