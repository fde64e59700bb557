"""The inputs that each kind of model gets, by a stand-in that answers as TensorRT-LLM's LLM API model does: with all of
the text so far, and with a finish reason."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from tkit.gateway.errors import ApiError
from tkit.gateway.triton import LLM_API, Piece, TritonModel
from tkit.specs.generation import GenerationRequest

TEXTS = ["a", "a b", "a b c", "a b c"]


class LlmApiServer(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self) -> None:
        self.requests: list[dict[str, tuple[str, list[int], bytes]]] = []

    async def ModelReady(self, request: Any, context: Any) -> Any:
        return pb.ModelReadyResponse(ready=True)

    async def ModelConfig(self, request: Any, context: Any) -> Any:
        response = pb.ModelConfigResponse()
        response.config.parameters["instance"].string_value = "mine"
        return response

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        response = pb.ModelMetadataResponse()
        for name, data_type in LLM_API.values():
            response.inputs.add(name=name, datatype=data_type, shape=[-1])
        return response

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            raw = zip(request.inputs, request.raw_input_contents, strict=True)
            self.requests.append({tensor.name: (tensor.datatype, list(tensor.shape), data) for tensor, data in raw})
        for index, text in enumerate(TEXTS):
            response = pb.ModelStreamInferResponse()
            add_text(response, "text_output", text)
            if index == len(TEXTS) - 1:
                add_text(response, "finish_reason", "stop")
            yield response


def add_text(response: Any, name: str, text: str) -> None:
    response.infer_response.outputs.add(name=name, datatype="BYTES", shape=[1])
    response.infer_response.raw_output_contents.append(bytes_tensor(text))


def bytes_tensor(text: str) -> bytes:
    return struct.pack("<I", len(text)) + text.encode()


async def generate(request: GenerationRequest) -> tuple[list[Piece], LlmApiServer]:
    servicer, server = LlmApiServer(), grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    model = TritonModel(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", "ensemble", "mine")
    await server.start()
    try:
        await model.connect()
        return [piece async for piece in model.generate(request, "id")], servicer
    finally:
        await model.close()
        await server.stop(0)


def test_a_model_of_the_llm_api() -> None:
    request = GenerationRequest(prompt="x", max_tokens=9, temperature=0.5, top_p=0.9, seed=3, stop_words=("u", "vw"))
    pieces, servicer = asyncio.run(generate(request))
    assert [(piece.text, piece.num_tokens, piece.finish_reason) for piece in pieces] == [
        ("a", 1, None), (" b", 1, None), (" c", 1, None), ("", 0, "stop"),
    ]  # fmt: skip
    assert servicer.requests == [
        {
            "text_input": ("BYTES", [1], bytes_tensor("x")),
            "streaming": ("BOOL", [1], b"\1"),
            "sampling_param_max_tokens": ("INT32", [1], struct.pack("<i", 9)),
            "sampling_param_temperature": ("FP32", [1], struct.pack("<f", 0.5)),
            "sampling_param_top_p": ("FP32", [1], struct.pack("<f", 0.9)),
            "sampling_param_seed": ("UINT64", [1], struct.pack("<Q", 3)),
            "sampling_param_stop": ("BYTES", [2], bytes_tensor("u") + bytes_tensor("vw")),
            "sampling_param_exclude_input_from_output": ("BOOL", [1], b"\1"),
            "return_finish_reason": ("BOOL", [1], b"\1"),
        }
    ]


def test_what_the_model_has_no_input_for_is_refused() -> None:
    request = GenerationRequest(prompt="x", max_tokens=9, min_tokens=2, temperature=0, return_log_probs=True)
    with pytest.raises(ApiError, match="the served model cannot do min_tokens, return_log_probs") as error:
        asyncio.run(generate(request))
    assert error.value.status == 400
