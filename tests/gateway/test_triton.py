"""What a model of an older container gets and gives, by a stand-in: no inputs and outputs for counts, no seed."""

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
from tkit.gateway.triton import INPUTS, Piece, TritonModel
from tkit.specs.generation import GenerationRequest

MISSING = {"seed", "count_input", "count_output", "min_tokens", "return_log_probs"}


class OldServer(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, outputs: tuple[str, ...]) -> None:
        self.outputs = outputs
        self.requests: list[dict[str, tuple[str, list[int], bytes]]] = []

    async def ModelReady(self, request: Any, context: Any) -> Any:
        return pb.ModelReadyResponse(ready=True)

    async def ModelConfig(self, request: Any, context: Any) -> Any:
        response = pb.ModelConfigResponse()
        response.config.parameters["instance"].string_value = "mine"
        return response

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        response = pb.ModelMetadataResponse()
        for what, (name, data_type) in INPUTS.items():
            if what not in MISSING:
                response.inputs.add(name=name, datatype=data_type, shape=[-1, -1])
        for name in self.outputs:
            response.outputs.add(name=name)
        return response

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            raw = zip(request.inputs, request.raw_input_contents, strict=True)
            self.requests.append({tensor.name: (tensor.datatype, list(tensor.shape), data) for tensor, data in raw})
        for text in ("a", " b", None):  # its end comes alone, without outputs
            response = pb.ModelStreamInferResponse()
            response.infer_response.parameters["triton_final_response"].bool_param = text is None
            if text is not None:
                response.infer_response.outputs.add(name="text_output", datatype="BYTES", shape=[1, 1])
                response.infer_response.raw_output_contents.append(bytes_tensor(text))
            yield response


def bytes_tensor(text: str) -> bytes:
    return struct.pack("<I", len(text)) + text.encode()


async def generate(request: GenerationRequest, *outputs: str, stream: bool = True) -> tuple[list[Piece], OldServer]:
    servicer, server = OldServer(("text_output", *outputs)), grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    model = TritonModel(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", "ensemble", "mine")
    await server.start()
    try:
        await model.connect()
        return [piece async for _, piece in model.generate([request], "id", stream=stream)], servicer
    finally:
        await model.close()
        await server.stop(0)


def test_responses_count_as_tokens_where_the_model_does_not_count() -> None:
    request = GenerationRequest(prompt="x", max_tokens=9, temperature=0.5, top_p=0.9, seed=3, stop_words=("u", "vw"))
    pieces, servicer = asyncio.run(generate(request))
    told = [(piece.text, piece.num_tokens, piece.finish_reason) for piece in pieces]
    assert told == [("a", 1, None), (" b", 1, None), ("", 0, "stop")]
    assert servicer.requests == [
        {
            "text_input": ("BYTES", [1, 1], bytes_tensor("x")),
            "stream": ("BOOL", [1, 1], b"\1"),
            "max_tokens": ("INT32", [1, 1], struct.pack("<i", 9)),
            "temperature": ("FP32", [1, 1], struct.pack("<f", 0.5)),
            "top_p": ("FP32", [1, 1], struct.pack("<f", 0.9)),
            "stop_words": ("BYTES", [1, 2], bytes_tensor("u") + bytes_tensor("vw")),
            "exclude_input_in_output": ("BOOL", [1, 1], b"\1"),
        }
    ]


@pytest.mark.parametrize(("outputs", "stream"), [((), b"\1"), (("num_output_tokens",), b"\0")])
def test_a_whole_answer_comes_at_once_where_the_model_counts(outputs: tuple[str, ...], stream: bytes) -> None:
    _, servicer = asyncio.run(generate(GenerationRequest(prompt="x", max_tokens=9), *outputs, stream=False))
    [request] = servicer.requests
    assert request["stream"] == ("BOOL", [1, 1], stream)


def test_what_the_model_has_no_input_for_is_refused() -> None:
    request = GenerationRequest(prompt="x", max_tokens=9, min_tokens=2, temperature=0, return_log_probs=True)
    with pytest.raises(ApiError, match="the served model cannot do min_tokens, logprobs") as error:
        asyncio.run(generate(request))
    assert error.value.status == 400
