"""Generating on Triton over gRPC: one channel, one ModelStreamInfer per choice. Knows the inputs of TensorRT-LLM's
`ensemble`; nothing of HTTP.

Every request goes out as a stream of its own, over which cancelling reaches the server. Whether the answer comes token by
token is the request's to say.
"""

from __future__ import annotations

import asyncio
import re
import struct
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2 as pb

from tkit.gateway.errors import TOO_LONG, ApiError
from tkit.specs.generation import INVALID_REQUEST, QUEUE_FULL, GenerationRequest

SERVICE = "/inference.GRPCInferenceService/"
INSTANCE = "instance"  # the parameter in the model's config
FINAL = "triton_final_response"
RETRY_S = 0.1
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),  # the server is this machine's own
    ("grpc.use_local_subchannel_pool", 1),  # a channel that is made anew is to connect anew
)
FORMATS = {"INT32": "<i", "BOOL": "<?", "FP32": "<f", "UINT64": "<Q"}
# What an error in a stream says -> HTTP's status. It has no code: `triton_grpc_error`, with which Triton would send one,
# makes 2.51 use what it has freed: 64 refusals at once kill the server.
MESSAGES = (
    (INVALID_REQUEST,                                                  400),
    (f"{QUEUE_FULL}|maximum queue size",                               429),
    ("^cancelled$|no available version|stopped accepting|not ready",   503),
)  # fmt: skip
# The stream itself is gone: the server has ended, or gave the request up to end.
STATUSES = {grpc.StatusCode.UNAVAILABLE: 503, grpc.StatusCode.CANCELLED: 503}
# What a request says -> the model's input and its type.
# fmt: off
INPUTS = {
    "prompt":             ("text_input",               "BYTES"),
    "stream":             ("stream",                   "BOOL"),
    "max_tokens":         ("max_tokens",               "INT32"),
    "min_tokens":         ("min_tokens",               "INT32"),
    "temperature":        ("temperature",              "FP32"),
    "top_k":              ("top_k",                    "INT32"),
    "top_p":              ("top_p",                    "FP32"),
    "repetition_penalty": ("repetition_penalty",       "FP32"),
    "seed":               ("seed",                     "UINT64"),
    "stop_words":         ("stop_words",               "BYTES"),
    "end_id":             ("end_id",                   "INT32"),
    "exclude_input":      ("exclude_input_in_output",  "BOOL"),
    "return_log_probs":   ("return_log_probs",         "BOOL"),
    "count_input":        ("return_num_input_tokens",  "BOOL"),
    "count_output":       ("return_num_output_tokens", "BOOL"),
}
# fmt: on
OPENAI_NAMES = {"stop_words": "stop", "end_id": "ignore_eos", "return_log_probs": "logprobs"}  # where they differ
# Sent where the model has them; the others must be there when a request uses them.
HELPFUL = {"seed", "count_input", "count_output"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one response added."""

    text: str
    num_tokens: int
    num_input_tokens: int | None = None
    log_probs: tuple[float, ...] = ()
    finish_reason: str | None = None


class TritonModel:
    """Call `connect` first."""

    def __init__(self, address: str, name: str, instance: str):
        self.name = name
        self._address = address
        self._instance = instance
        self._inputs: dict[str, int] = {}  # -> rank
        self._counts_tokens = False

    async def connect(self) -> None:
        """Waits until the model of this instance is ready. Another server may hold the same port for a while."""
        while not await self._find():
            await self._channel.close()
            await asyncio.sleep(RETRY_S)
        self._stream = self._channel.unary_stream(f"{SERVICE}ModelStreamInfer")

    async def close(self) -> None:
        await self._channel.close()

    async def is_ready(self) -> bool:
        try:
            return bool((await self._ask("ModelReady", timeout_s=5)).ready)
        except grpc.aio.AioRpcError:
            return False

    async def _find(self) -> bool:
        self._channel = grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS)
        try:
            if not await self.is_ready():
                return False
            config = (await self._ask("ModelConfig", timeout_s=5)).config
            if config.parameters[INSTANCE].string_value != self._instance:
                return False
            metadata = await self._ask("ModelMetadata", timeout_s=5)
        except grpc.aio.AioRpcError:
            return False
        self._inputs = {tensor.name: len(tensor.shape) for tensor in metadata.inputs}
        self._counts_tokens = any(tensor.name == "num_output_tokens" for tensor in metadata.outputs)
        return True

    async def _ask(self, method: str, timeout_s: float) -> Any:
        request, response = getattr(pb, f"{method}Request")(name=self.name), getattr(pb, f"{method}Response")
        call = self._channel.unary_unary(SERVICE + method)
        return response.FromString(await call(request.SerializeToString(), timeout=timeout_s))

    def generate(self, requests: Sequence[GenerationRequest], request_id: str, *, stream: bool) -> Generation:
        """Raises ApiError when the model has no input for something that a request asks for; none has gone out then."""
        messages = [
            self._message(request, f"{request_id}-{index}" if index else request_id, stream)
            for index, request in enumerate(requests)
        ]
        return Generation([_Choice(self._stream(message), requests[0].max_tokens) for message in messages])

    def _message(self, request: GenerationRequest, request_id: str, stream: bool) -> bytes:
        """Without `stream` the answer is one piece, which spares a response per token; in several all the same where only
        those tell how many tokens there are, or which text is whose log probability.
        """
        message = pb.ModelInferRequest(model_name=self.name, id=request_id)
        missing = []
        stream = stream or request.return_log_probs or not self._counts_tokens
        for what, value in {**_values(request), "stream": stream}.items():
            tensor, data_type = INPUTS[what]
            if tensor in self._inputs:
                rank = self._inputs[tensor]
                items = value if isinstance(value, tuple) else (value,)
                message.inputs.add(name=tensor, datatype=data_type, shape=[*[1] * (rank - 1), len(items)])
                message.raw_input_contents.append(b"".join(_raw(what, data_type, item) for item in items))
            elif what not in HELPFUL:
                missing.append(what)
        if missing:
            names = [OPENAI_NAMES.get(what, what) for what in missing]
            raise ApiError(400, f"the served model cannot do {', '.join(names)}")
        serialized: bytes = message.SerializeToString()
        return serialized


class Generation:
    """The pieces of all choices of an answer as they come, each with its choice's number."""

    def __init__(self, choices: Sequence[_Choice]):
        self._choices = choices

    @property
    def is_cancelled(self) -> bool:
        return self._choices[0].is_cancelled

    def cancel(self) -> None:
        """Ends the requests on the server; the iteration ends without last pieces."""
        for choice in self._choices:
            choice.cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """Raises the first ApiError; the other choices have been cancelled then."""
        if len(self._choices) == 1:
            async for piece in self._choices[0]:
                yield 0, piece
            return
        arrived: asyncio.Queue[tuple[int, Piece | None]] = asyncio.Queue()
        tasks = [asyncio.create_task(_collect(index, choice, arrived)) for index, choice in enumerate(self._choices)]
        try:
            num_open = len(tasks)
            while num_open:
                index, arrival = await arrived.get()
                if arrival is not None:
                    yield index, arrival
                else:
                    await tasks[index]  # raises what ended it
                    num_open -= 1
        except BaseException:
            self.cancel()
            raise
        finally:
            await asyncio.gather(*tasks, return_exceptions=True)


async def _collect(index: int, choice: _Choice, arrived: asyncio.Queue[tuple[int, Piece | None]]) -> None:
    """None follows the last piece."""
    try:
        async for piece in choice:
            arrived.put_nowait((index, piece))
    finally:
        arrived.put_nowait((index, None))


class _Choice:
    """The pieces of one choice; the last one has a finish reason."""

    def __init__(self, call: Any, max_tokens: int):
        self.is_cancelled = False
        self._call = call
        self._max_tokens = max_tokens
        self._num_tokens = 0

    def cancel(self) -> None:
        self.is_cancelled = True
        self._call.cancel()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Raises ApiError."""
        is_ended, error = False, None
        try:
            async for message in self._call:
                answer = pb.ModelStreamInferResponse.FromString(message)
                if answer.error_message:
                    error = error or _told(answer.error_message)
                    continue  # to the end of the stream: one that is cancelled after its last response is not freed
                piece = self._piece(answer.infer_response)
                is_ended = is_ended or piece.finish_reason is not None
                yield piece
        except grpc.aio.AioRpcError as broken:
            error = error or ApiError(STATUSES.get(broken.code(), 500), broken.details() or broken.code().name)
        except asyncio.CancelledError:
            if not self.is_cancelled:  # this task itself is to end
                raise
            return
        if error is not None:
            raise error
        if not is_ended:
            yield Piece(text="", num_tokens=0, finish_reason=self._reason())

    def _piece(self, response: Any) -> Piece:
        raw = {tensor.name: data for tensor, data in zip(response.outputs, response.raw_output_contents, strict=False)}
        text = _first_text(raw.get("text_output", b""))
        counted = _ints(raw.get("num_output_tokens", b""))
        num_tokens = counted[0] if counted else int(bool(text))
        self._num_tokens += num_tokens
        log_probs = _floats(raw.get("output_log_probs", b""))
        is_final = response.parameters[FINAL].bool_param
        return Piece(
            text=text,
            num_tokens=num_tokens,
            num_input_tokens=next(iter(_ints(raw.get("num_input_tokens", b""))), None),
            log_probs=log_probs[-num_tokens:] if num_tokens else (),
            finish_reason=self._reason() if is_final else None,
        )

    def _reason(self) -> str:
        """The outputs do not say: what is shorter than allowed was stopped."""
        return "length" if self._num_tokens >= self._max_tokens else "stop"


def _values(request: GenerationRequest) -> dict[str, Any]:
    """What differs from the default, and top_p: without it and top_k, TensorRT-LLM decodes greedily."""
    values: dict[str, Any] = {
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        "exclude_input": True,
        "count_input": True,
        "count_output": True,
    }
    if request.is_greedy:
        values["top_k"] = 1  # some releases refuse a temperature of 0
    else:
        values |= {"top_p": request.top_p, "seed": request.seed}
    optional: dict[str, tuple[Any, Any]] = {
        "min_tokens": (request.min_tokens, 0),
        "repetition_penalty": (request.repetition_penalty, 1),
        "stop_words": (request.stop_words, ()),
        "end_id": (request.end_id, None),
        "return_log_probs": (request.return_log_probs, False),
    }
    if not request.is_greedy:
        optional |= {"temperature": (request.temperature, 1), "top_k": (request.top_k, 0)}
    return values | {name: value for name, (value, default) in optional.items() if value != default}


def _raw(what: str, data_type: str, value: Any) -> bytes:
    if data_type == "BYTES":
        data = value.encode("utf-8")
        return struct.pack("<I", len(data)) + data
    try:
        return struct.pack(FORMATS[data_type], value)
    except (struct.error, OverflowError) as error:
        raise ApiError(400, f"{what} is {value}, too large for {data_type}") from error


def _ints(raw: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(raw) // 4}i", raw)


def _floats(raw: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(raw) // 4}f", raw)


def _first_text(raw: bytes) -> str:
    return raw[4 : 4 + struct.unpack_from("<I", raw)[0]].decode("utf-8", "replace") if len(raw) >= 4 else ""


def _told(message: str) -> ApiError:
    status = next((status for pattern, status in MESSAGES if re.search(pattern, message)), 500)
    is_too_long = status == 400 and "positions" in message
    return ApiError(status, message, code=TOO_LONG if is_too_long else None)
