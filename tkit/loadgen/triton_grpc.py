"""Triton's ModelStreamInfer with the inputs and outputs of TensorRT-LLM's `ensemble`: one RPC per request.

Requests are serialized before the load and answers parsed after it. Reading goes on to the end of the RPC, so the final
response needs no search.
"""

from __future__ import annotations

import asyncio
import struct
from array import array
from collections.abc import Iterable
from typing import Any

from tritonclient.grpc import service_pb2 as pb

from tkit.errors import ServerError
from tkit.loadgen.exchange import Answer, Exchange
from tkit.loadgen.http import grpc_address
from tkit.loadgen.http2 import GrpcConnections
from tkit.loadgen.token_counts import TokenEnds, added_tokens, tokens_of_texts
from tkit.loadgen.triton import refuse_unless_streaming, request_inputs, token_source

SERVICE = "/inference.GRPCInferenceService/"
FINAL = "triton_final_response"
ERROR_START = b"\x0a"  # how a ModelStreamInferResponse begins that carries error_message (field 1)

# Requests go round the connections: one TCP stream has one flow-control window and one sender at a time on either side.
CONNECTIONS = 4

FORMATS = {"INT32": "<i", "BOOL": "<?", "FP32": "<f", "UINT64": "<Q"}


class TritonGrpcClient:
    def __init__(self, url: str, model: str, token_ends: TokenEnds | None):
        address = grpc_address(url)
        self.url = str(address)
        self.model = model
        self.token_source = "tokenizer"
        self.identity: dict[str, Any] = {}
        self._token_ends = token_ends
        self._input_ranks: dict[str, int] = {}
        self._grpc = GrpcConnections(address, CONNECTIONS)

    async def open(self, timeout_s: float) -> None:
        try:
            await self._read_model(timeout_s)
        except (OSError, TimeoutError) as error:
            reason = str(error) or f"no answer within {timeout_s:.3g} s"
            raise ServerError(
                f"{self.url}: no Triton server answers over gRPC: {reason}",
                hint="start one with tkit serve, or give its gRPC address: --url HOST:PORT",
            ) from error

    async def is_ready(self, timeout_s: float) -> bool:
        try:
            answer = await self._ask("ModelReady", timeout_s)
        except (OSError, TimeoutError):
            return False
        return bool(answer.ready)

    async def close(self) -> None:
        self._grpc.close()

    async def _ask(self, method: str, timeout_s: float) -> Any:
        """A method without arguments, or with the model's name as the only one."""
        request, response = getattr(pb, f"{method}Request"), getattr(pb, f"{method}Response")
        message = request(name=self.model) if "name" in request.DESCRIPTOR.fields_by_name else request()
        exchange = Exchange(index=0, request=message.SerializeToString(), isl=0, osl=0)
        async with asyncio.timeout(timeout_s):
            await self._grpc.call(SERVICE + method, exchange)
        if exchange.error is not None or not exchange.messages:
            raise ConnectionError(exchange.detail or "no message")
        return response.FromString(exchange.messages[0])

    async def _read_model(self, timeout_s: float) -> None:
        server = await self._ask("ServerMetadata", timeout_s)
        if not (await self._ask("ModelReady", timeout_s)).ready:
            hint = "name the served model: --model NAME"
            raise ServerError(f'{self.url}: model "{self.model}" is not ready', hint=hint)
        metadata = await self._ask("ModelMetadata", timeout_s)
        config = (await self._ask("ModelConfig", timeout_s)).config
        self._input_ranks = {tensor.name: len(tensor.shape) for tensor in metadata.inputs}
        is_decoupled = config.model_transaction_policy.decoupled
        refuse_unless_streaming(self.url, self.model, self._input_ranks, is_decoupled=is_decoupled)
        outputs = [tensor.name for tensor in metadata.outputs]
        self.token_source = token_source(self._input_ranks, outputs)
        self.identity = {
            "server": server.name,
            "version": server.version,
            "extensions": list(server.extensions),
            "model": self.model,
            "model_versions": list(metadata.versions),
            "platform": metadata.platform,
            "inputs": list(self._input_ranks),
            "outputs": outputs,
            "parameters": {key: value.string_value for key, value in sorted(config.parameters.items())},
        }

    def request(self, name: str, prompt: str, osl: int, seed: int) -> bytes:
        message = pb.ModelInferRequest(model_name=self.model, id=name)
        # Where the model ends a stream apart from its last token, only an empty final response tells that it is whole.
        message.parameters["triton_enable_empty_final_response"].bool_param = True
        for tensor, (data_type, value) in request_inputs(self._input_ranks, prompt, osl, seed).items():
            message.inputs.add(name=tensor, datatype=data_type, shape=[1] * self._input_ranks[tensor])
            message.raw_input_contents.append(_raw(data_type, value))
        return message.SerializeToString()

    async def perform(self, exchange: Exchange) -> None:
        await self._grpc.call(SERVICE + "ModelStreamInfer", exchange)
        if exchange.error is None:
            _conclude(exchange)
            if exchange.error is None and self.token_source == "server_usage":
                _drop_uniform(exchange)

    def answer(self, exchange: Exchange) -> Answer:
        if exchange.is_uniform:
            (first,) = _responses(exchange.messages)
            counts = array("q", [1]) * exchange.osl
            return Answer(isl=first.num_input_tokens, token_ns=exchange.times[: exchange.osl], token_counts=counts)
        try:
            responses = _responses(exchange.messages)
        except ValueError as error:
            exchange.fail("unreadable", str(error))
            return Answer(isl=None, token_ns=array("q"), token_counts=array("q"))
        counts = self._token_counts(responses, exchange.osl)
        carrying = [(when, count) for when, count in zip(exchange.times, counts, strict=True) if count]
        isl = [response.num_input_tokens for response in responses if response.num_input_tokens is not None]
        return Answer(
            isl=isl[0] if isl else None,
            token_ns=array("q", [when for when, _ in carrying]),
            token_counts=array("q", [count for _, count in carrying]),
        )

    def _token_counts(self, responses: list[_Response], osl: int) -> array[int]:
        """Tokens that each response adds."""
        if self.token_source == "server_usage":
            counts = [response.num_output_tokens for response in responses]
            if any(counts):
                return array("q", added_tokens(counts, osl))
            if any(response.text for response in responses):
                self.token_source = "tokenizer"
        return array("q", tokens_of_texts([response.text for response in responses], self._token_ends))


class _Response:
    """The few fields that matter, out of one ModelStreamInferResponse."""

    __slots__ = ("error", "is_final", "num_input_tokens", "num_output_tokens", "text")

    def __init__(self, message: bytes):
        stream_response = pb.ModelStreamInferResponse.FromString(message)
        response = stream_response.infer_response
        self.error: str | None = stream_response.error_message or None
        self.is_final = FINAL in response.parameters and response.parameters[FINAL].bool_param
        raw = {
            output.name: contents
            for output, contents in zip(response.outputs, response.raw_output_contents, strict=False)
        }
        self.num_input_tokens = _int32(raw.get("num_input_tokens"))
        self.num_output_tokens = _int32(raw.get("num_output_tokens"))
        self.text = _first_text(raw.get("text_output", b""))


def _responses(messages: Iterable[bytes]) -> list[_Response]:
    try:
        return [_Response(message) for message in messages]
    except Exception as error:  # protobuf's DecodeError has no stable home
        raise ValueError(f"not a ModelStreamInferResponse: {error}") from error


def _conclude(exchange: Exchange) -> None:
    """Names what went wrong in a stream that the transport calls complete."""
    try:
        last = _responses(exchange.messages[-1:])
    except ValueError as error:
        exchange.fail("unreadable", str(error))
        return
    if last and last[0].error is not None:
        exchange.fail("server", last[0].error)
    elif not last or not last[0].is_final:
        exchange.fail("truncated", f"ended after {len(exchange.messages)} responses, none of them final")


def _drop_uniform(exchange: Exchange) -> None:
    """Forgets the messages of a request that streamed token by token: times alone hold a long point in memory.

    Told from the number of messages and from the first and last count, as parsing each would delay other requests.
    """
    messages, osl = exchange.messages, exchange.osl
    if not osl <= len(messages) <= osl + 1 or any(message.startswith(ERROR_START) for message in messages):
        return
    try:
        first, last, final = _responses((messages[0], messages[osl - 1], messages[-1]))
    except ValueError:
        return
    counts_add_up = first.num_output_tokens == 1 and last.num_output_tokens in (1, osl)
    if final.is_final and counts_add_up and (len(messages) == osl or not final.num_output_tokens):
        exchange.messages = [messages[0]]
        exchange.is_uniform = True


def _raw(data_type: str, value: Any) -> bytes:
    if data_type == "BYTES":
        data = value.encode("utf-8")
        return struct.pack("<I", len(data)) + data
    return struct.pack(FORMATS[data_type], value)


def _int32(raw: bytes | None) -> int | None:
    return struct.unpack_from("<i", raw)[0] if raw and len(raw) >= 4 else None


def _first_text(raw: bytes) -> str:
    return raw[4 : 4 + struct.unpack_from("<I", raw)[0]].decode("utf-8", "replace") if len(raw) >= 4 else ""
