"""The paths of OpenAI's API as an ASGI application. Knows HTTP and who may ask; how tokens are made is Triton's."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tkit import __version__
from tkit.gateway.answers import Answer, error_events, to_json
from tkit.gateway.errors import ApiError
from tkit.gateway.prompts import PromptTokenizer
from tkit.gateway.requests import ApiRequest, read_request
from tkit.gateway.settings import GatewaySettings
from tkit.gateway.triton import Generation, Piece, TritonModel

MAX_BODY_BYTES = 16_000_000  # a prompt of a million tokens has about 4 MB
LARGE_BYTES = 50_000  # read beside the event loop; it takes up to 50 ms
# 413: the rest of the body is not read
HEADERS = {
    401: {"www-authenticate": "Bearer"},
    413: {"connection": "close"},
    429: {"retry-after": "1"},
    503: {"retry-after": "1"},
}
CLIENT_LEFT = 499  # nginx's; nobody reads it

Told = tuple[int, Piece]  # of which choice
Handler = Callable[[Request], Coroutine[Any, Any, ASGIApp]]

log = logging.getLogger(__name__)


def make_app(
    settings: GatewaySettings, model: TritonModel, tokenizer: PromptTokenizer, api_key: str | None
) -> Starlette:
    front = _Front(settings, model, tokenizer)
    guarded = [
        ("/v1/models", front.models, "GET"),
        ("/v1/models/{model:path}", front.model, "GET"),
        ("/v1/completions", front.completions, "POST"),
        ("/v1/chat/completions", front.chat_completions, "POST"),
    ]
    routes = [Route(path, _with_key(handler, api_key), methods=[method]) for path, handler, method in guarded]
    routes += [Route("/health", front.health), Route("/version", front.version)]
    handlers = {ApiError: _api_error, HTTPException: _http_error, Exception: _internal_error}
    return Starlette(routes=routes, exception_handlers=handlers)


class _Front:
    def __init__(self, settings: GatewaySettings, model: TritonModel, tokenizer: PromptTokenizer):
        self._settings = settings
        self._model = model
        self._tokenizer = tokenizer
        self._started = int(time.time())

    async def health(self, request: Request) -> Response:
        """Tells which start it belongs to, so that another server on the port is not taken for this one."""
        is_ready = await self._model.is_ready()
        body = {"ready": is_ready, "instance": self._settings.instance}
        return _json(body, 200 if is_ready else 503)

    async def version(self, request: Request) -> Response:
        return _json({"version": __version__})

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model_object()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name != self._settings.model:
            raise ApiError(404, f'the model "{name}" does not exist', param="model", code="model_not_found")
        return _json(self._model_object())

    def _model_object(self) -> dict[str, Any]:
        """`root` and `max_model_len` are vLLM's."""
        settings = self._settings
        return {
            "id": settings.model,
            "object": "model",
            "created": self._started,
            "owned_by": "tkit",
            "root": settings.engine,
            "max_model_len": settings.max_positions,
        }

    async def completions(self, request: Request) -> ASGIApp:
        return await self._complete(request, is_chat=False)

    async def chat_completions(self, request: Request) -> ASGIApp:
        return await self._complete(request, is_chat=True)

    async def _complete(self, request: Request, *, is_chat: bool) -> ASGIApp:
        body = await _read_body(request)
        # A large body takes seconds to become text and tokens, and every stream would wait for it.
        asked = (
            await asyncio.to_thread(self._asked, body, is_chat)
            if len(body) > LARGE_BYTES
            else self._asked(body, is_chat)
        )
        answer = Answer(asked, self._settings.model)
        generation = self._model.generate(asked.generations, answer.id, stream=asked.stream)
        if asked.stream:
            return await _EventStream.opened(answer, generation, request.receive)
        async with _cancelled_when_the_client_leaves(generation, request.receive):
            async for index, piece in generation:
                answer.add(index, piece)
        return Response(status_code=CLIENT_LEFT) if generation.is_cancelled else _json(answer.whole())

    def _asked(self, body: bytes, is_chat: bool) -> ApiRequest:
        return read_request(
            _parsed(body),
            is_chat=is_chat,
            model=self._settings.model,
            max_positions=self._settings.max_positions,
            tokenizer=self._tokenizer,
        )


class _EventStream:
    """A streamed answer as an ASGI application. Its first piece is awaited before the status is sent, so that a refusal
    has a status of its own."""

    def __init__(self, answer: Answer, generation: Generation, first: Told | None, rest: AsyncIterator[Told]):
        self._answer = answer
        self._generation = generation
        self._first = first
        self._rest = rest

    @classmethod
    async def opened(cls, answer: Answer, generation: Generation, receive: Receive) -> _EventStream:
        pieces = aiter(generation)
        async with _cancelled_when_the_client_leaves(generation, receive):
            first = await anext(pieces, None)
        return cls(answer, generation, first, pieces)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with _cancelled_when_the_client_leaves(self._generation, receive):
            try:
                if self._first is not None:
                    await _send(send, self._answer.events(*self._first))
                async for index, piece in self._rest:
                    await _send(send, self._answer.events(index, piece))
            except ApiError as error:
                await _send(send, error_events(error.body()))
        await send({"type": "http.response.body", "body": b""})


async def _send(send: Send, events: Iterable[bytes]) -> None:
    await send({"type": "http.response.body", "body": b"".join(events), "more_body": True})


@contextlib.asynccontextmanager
async def _cancelled_when_the_client_leaves(generation: Generation, receive: Receive) -> AsyncIterator[None]:
    """The server then frees what the request holds within a step. Also cancelled when the block ends with an error."""
    watching = asyncio.create_task(_cancel_on_disconnect(generation, receive))
    try:
        yield
    except ApiError:
        raise
    except BaseException:
        generation.cancel()
        raise
    finally:
        watching.cancel()


async def _cancel_on_disconnect(generation: Generation, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.cancel()


def _with_key(handler: Handler, api_key: str | None) -> Handler:
    if api_key is None:
        return handler
    expected = f"Bearer {api_key}".encode()

    async def guarded(request: Request) -> ASGIApp:
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, expected):
            raise ApiError(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY")
        return await handler(request)

    return guarded


async def _read_body(request: Request) -> bytes:
    length = request.headers.get("content-length", "0")
    body, num_bytes = [], int(length) if length.isdecimal() else 0
    if num_bytes <= MAX_BODY_BYTES:
        num_bytes = 0
        async for part in request.stream():
            num_bytes += len(part)
            if num_bytes > MAX_BODY_BYTES:
                break
            body.append(part)
    if num_bytes > MAX_BODY_BYTES:
        raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    return b"".join(body)


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ApiError(400, "the body is not readable as JSON: nested too deeply") from error
    except ValueError as error:
        raise ApiError(400, f"the body is not readable as JSON: {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, media_type="application/json")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _json(error.body(), error.status, HEADERS.get(error.status))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: f"no such path: {request.url.path}", 405: f"{request.method} is not what {request.url.path} takes"}
    message = what.get(error.status_code, error.detail)
    return _json(ApiError(error.status_code, message).body(), error.status_code, dict(error.headers or {}))


async def _internal_error(request: Request, error: Exception) -> Response:
    """Starlette logs it."""
    return _json(ApiError(500, "internal error; see the server's log").body(), 500)
