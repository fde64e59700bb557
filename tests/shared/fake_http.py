"""A small HTTP server that streams as OpenAI's servers and as Triton do, one model per way of behaving.

`python fake_http.py LOG TOKENIZER_FILE` prints its port and serves until its standard input closes. Answers are paced,
30 ms to the first token and 3 ms between. LOG gets one JSON line per answer: id, arrived_ns, sent_ns (per token),
connection, body, key.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TTFT_S, ITL_S = 0.030, 0.003
KEY = "sk-secret-0123456789"
STATUSES = {
    "busy": (429, {"error": {"message": "too many requests"}}),
    "full": (503, {"error": "Exceeds maximum queue size"}),
    "locked": (401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}),
    "refusing": (400, {"detail": "ignore_eos is not known"}),
    "broken": (500, {"message": "worker died"}),
    "error_200": (200, {"error": "generate expects exactly 1 response"}),
}
TEMPLATE = 9  # tokens that a chat template adds
WORD = " wörd"  # two bytes for one of its characters


def frame(payload: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(payload), payload)


def event(value: Any, end: bytes = b"\n\n") -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False).encode()) + end


class Answer:
    """One request and how it is answered."""

    def __init__(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter, log: dict[str, Any]):
        self.is_triton = path.startswith("/v2")
        self.model = path.split("/")[3] if self.is_triton else body["model"]
        self.asked, self.isl = body["max_tokens"], 24
        self.is_chat = path.endswith("/chat/completions")
        if self.is_chat:
            self.isl = TEMPLATE + len(tokenizer().encode(body["messages"][0]["content"]).ids)
        self.writer = writer
        self.log = log

    async def send(self, payload: bytes, *, tokens: int = 0) -> None:
        self.log["sent_ns"] += [time.monotonic_ns()] * tokens
        if self.model == "split":  # a write per three bytes: through characters, line ends and chunk sizes
            for start in range(0, len(data := frame(payload)), 3):
                self.writer.write(data[start : start + 3])
                await self.writer.drain()
        else:
            self.writer.write(payload if self.model == "until_closed" else frame(payload))
            await self.writer.drain()

    async def run(self) -> bool:
        """Whether the connection stays."""
        if self.model == "silent":
            await asyncio.sleep(3600)
        if self.model in STATUSES:
            self.writer.write(reply(*STATUSES[self.model]))
            return True
        await self.head()
        if self.model == "role_first":
            await self.send(event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}))
            await self.send(b": a comment\n\n" + event({"choices": [{"index": 0, "text": ""}]}))
        arrived = time.monotonic()
        step = 4 if self.model == "coalescing" else 1
        for done in range(0, self.asked, step):
            await asyncio.sleep(max(arrived + TTFT_S + done * ITL_S - time.monotonic(), 0))
            if done == self.asked // 2 and (keeps := await self.misbehave(done)) is not None:
                return keeps
            tokens = min(step, self.asked - done)
            await self.send(self.token(done, tokens), tokens=tokens)
        return await self.end()

    async def head(self) -> None:
        framing = "Connection: close" if self.model == "until_closed" else "Transfer-Encoding: chunked"
        self.writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{framing}\r\n\r\n".encode())
        await self.writer.drain()

    async def misbehave(self, done: int) -> bool | None:
        match self.model:
            case "stalled":
                await asyncio.sleep(3600)
            case "reset":
                linger = struct.pack("ii", 1, 0)
                self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                return False
            case "closed":
                return False
            case "truncated":
                self.writer.write(b"0\r\n\r\n")
                return True
            case "cut_event":
                await self.send(b'data: {"choices": [{"te')
                self.writer.write(b"0\r\n\r\n")
                return True
            case "failing":
                await self.send(event({"error": "out of memory" if self.is_triton else {"message": "out of memory"}}))
                await self.send(event(b"[DONE]"))
                self.writer.write(b"0\r\n\r\n")
                return True
            case "garbled":
                await self.send(event(b"{not json") + self.token(done, 1), tokens=1)
                return await self.end_after(done + 1)
            case "no_sse":
                await self.send(b"<html>\n\n" + self.token(done, 1), tokens=1)
                return await self.end_after(done + 1)
            case "bad_chunk":
                self.writer.write(b"xyz\r\n")
                await self.writer.drain()
                return False
            case "short":
                return await self.end(done)
        return None

    async def end_after(self, done: int) -> bool:
        """The rest as if nothing had been."""
        for i in range(done, self.asked):
            await asyncio.sleep(ITL_S)
            await self.send(self.token(i, 1), tokens=1)
        return await self.end()

    def token(self, done: int, tokens: int) -> bytes:
        text = WORD * (done + tokens if self.model == "so_far" else tokens)
        if self.is_chat:
            key = "reasoning_content" if done < 4 else "content"
            return event({"choices": [{"index": 0, "delta": {key: text}}], "usage": None})
        if not self.is_triton:
            return event({"choices": [{"index": 0, "text": text, "finish_reason": None}], "usage": None})
        value = {"model_name": self.model, "text_output": text}
        if self.model not in ("bare", "so_far"):
            value |= {"num_output_tokens": done + tokens, "num_input_tokens": 24}
        return event(value)

    async def end(self, count: int | None = None) -> bool:
        if not self.is_triton:
            usage = {"prompt_tokens": self.isl, "completion_tokens": self.asked if count is None else count}
            if self.model != "no_usage":
                await self.send(event({"choices": [], "usage": usage}))
            await self.send(event(b"[DONE]"))
        if self.model == "until_closed":
            return False
        self.writer.write(b"0\r\n\r\n")
        return True


def reply(status: int, value: Any) -> bytes:
    body = json.dumps(value).encode()
    return b"HTTP/1.1 %d X\r\nServer: fake\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


@functools.cache
def tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(sys.argv[2])


class FakeServer:
    def __init__(self, log: Path):
        self.log = log.open("a", buffering=1)
        self.connections: Iterator[int] = itertools.count()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = next(self.connections)
        try:
            while (head := await reader.readuntil(b"\r\n\r\n")) and await self.one(head, reader, writer, connection):
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def one(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: int
    ) -> bool:
        arrived_ns = time.monotonic_ns()
        first, *lines = head.decode("latin-1").strip().split("\r\n")
        method, path, _ = first.split()
        fields = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        if method == "GET":
            writer.write(reply(*self.told(path, fields)))
            return True
        body = json.loads(await reader.readexactly(int(fields["content-length"])))
        line: dict[str, Any] = {
            "id": fields.get("x-request-id") or body.get("id"), "arrived_ns": arrived_ns, "sent_ns": [],
            "connection": connection, "body": body, "key": fields.get("authorization"),
        }  # fmt: skip
        try:
            return await Answer(path, body, writer, line).run()
        finally:
            self.log.write(json.dumps(line) + "\n")

    def told(self, path: str, fields: dict[str, str]) -> tuple[int, Any]:
        if path.startswith("/locked") and fields.get("authorization") != f"Bearer {KEY}":
            return 401, {"error": {"message": f"not {fields.get('authorization')}"}}
        match path.strip("/").split("/"):
            case ["two", "models"]:
                return 200, {"data": [{"id": "plain"}, {"id": "other"}]}
            case ["one" | "locked", "models"]:
                return 200, {"data": [{"id": "plain"}]}
            case ["version"]:
                return 200, {"version": "0.9"}
            case ["v2"]:
                return 200, {"name": "fake", "version": "0.0", "extensions": []}
            case ["v2", "models", name, "ready"]:
                return 400 if name == "not_ready" else 200, {}
            case ["v2", "models", name, "config"]:
                return 200, {"model_transaction_policy": {"decoupled": name != "unary"}}
            case ["v2", "models", name]:
                counts = ["return_num_output_tokens"] if name not in ("bare", "so_far") else []
                outputs = ["text_output", *(["num_output_tokens"] if counts else [])]
                return 200, {
                    "inputs": [{"name": tensor} for tensor in ("text_input", "max_tokens", *counts)],
                    "outputs": [{"name": tensor} for tensor in outputs],
                }
        return 404, {"error": "not found"}


async def main(log: Path) -> None:
    server = await asyncio.start_server(FakeServer(log).serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    os._exit(0)  # requests that never end are not waited for


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
