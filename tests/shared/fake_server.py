"""A small gRPC server that speaks as Triton does, one model per way of behaving: `python fake_server.py ENGINE_DIR`.

Prints its port and serves until its standard input closes. Answers are paced, 20 ms to the first token and 1 ms between.
Every model but the silent one answers a client's probes; it remembers nothing of earlier requests.
"""

from __future__ import annotations

import asyncio
import os
import struct
import sys
from collections.abc import AsyncIterator

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2 as pb

TTFT_S, ITL_S = 0.020, 0.001
INPUTS = {
    "text_input": "BYTES", "max_tokens": "INT32", "min_tokens": "INT32", "end_id": "INT32", "stream": "BOOL",
    "top_k": "INT32", "temperature": "FP32", "exclude_input_in_output": "BOOL", "return_num_output_tokens": "BOOL",
}  # fmt: skip
MODELS = {
    "ensemble", "truncated", "stalled", "silent", "failing", "overloaded", "short", "dying", "garbled", "coalescing",
    "deltas", "so_far", "sluggish", "dripping", "unary", "not_ready", "untypical",
    "promising",
}  # fmt: skip
WITHOUT_COUNT_OUTPUT = {"deltas", "so_far"}
WITHOUT_COUNTS = {*WITHOUT_COUNT_OUTPUT, "promising"}
DELTA_COUNTS = {"coalescing"}


def response(text: str, num_output_tokens: int | None, *, is_final: bool) -> bytes:
    message = pb.ModelStreamInferResponse()
    answer = message.infer_response
    answer.parameters["triton_final_response"].bool_param = is_final
    data = text.encode()
    answer.outputs.add(name="text_output", datatype="BYTES", shape=[1, 1])
    answer.raw_output_contents.append(struct.pack("<I", len(data)) + data)
    if num_output_tokens is not None:
        answer.outputs.add(name="num_output_tokens", datatype="INT32", shape=[1, 1])
        answer.raw_output_contents.append(struct.pack("<i", num_output_tokens))
    return message.SerializeToString()


def failure(text: str) -> bytes:
    message = pb.ModelStreamInferResponse(error_message=text)
    message.infer_response.parameters["triton_final_response"].bool_param = True
    return message.SerializeToString()


def asked_tokens(request: pb.ModelInferRequest) -> int:
    names = [tensor.name for tensor in request.inputs]
    return struct.unpack("<i", request.raw_input_contents[names.index("max_tokens")])[0]


class FakeTriton:
    def __init__(self, engine_dir: str):
        self.engine_dir = engine_dir

    async def stream(self, data: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        request = pb.ModelInferRequest.FromString(data)
        model, asked = request.model_name, asked_tokens(request)
        is_probe, index = "probe" in request.id, int(request.id.rpartition("-")[2])
        if model == "silent":
            await asyncio.sleep(3600)
        if model == "overloaded" and not is_probe:
            yield failure("Exceeds maximum queue size")
            return
        await asyncio.sleep(TTFT_S * (50 if model == "sluggish" and not is_probe and index >= 8 else 1))
        step = 4 if model == "coalescing" else 1
        for done in range(0, asked, step):
            if done == asked // 2 and not is_probe:
                match model:
                    case "truncated":
                        return
                    case "stalled":
                        await asyncio.sleep(3600)
                    case "failing":
                        yield failure("out of memory")
                        return
                    case "garbled":
                        yield b"\xff\xff\xff"
                        return
                    case "short":
                        yield response("", done, is_final=True)
                        return
                    case "dying" if index >= 4:
                        os._exit(9)
            tokens = min(step, asked - done)
            text = " word" * (done + tokens if model == "so_far" else tokens)
            count = None if model in WITHOUT_COUNTS else tokens if model in DELTA_COUNTS else done + tokens
            yield response(text, count, is_final=done + tokens == asked)
            await asyncio.sleep(ITL_S * (100 if model == "dripping" and not is_probe else 1))

    async def server_metadata(self, data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return pb.ServerMetadataResponse(name="fake", version="0.0").SerializeToString()

    async def model_ready(self, data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        name = pb.ModelReadyRequest.FromString(data).name
        return pb.ModelReadyResponse(ready=name in MODELS and name != "not_ready").SerializeToString()

    async def model_metadata(self, data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        name = pb.ModelMetadataRequest.FromString(data).name
        answer = pb.ModelMetadataResponse(name=name, versions=["1"], platform="python")
        for tensor, data_type in INPUTS.items():
            answer.inputs.add(name="prompt" if (name, tensor) == ("untypical", "text_input") else tensor,
                              datatype=data_type, shape=[-1, 1])  # fmt: skip
        for tensor, data_type in (("text_output", "BYTES"), ("num_output_tokens", "INT32")):
            if tensor == "text_output" or name not in WITHOUT_COUNT_OUTPUT:
                answer.outputs.add(name=tensor, datatype=data_type, shape=[-1, 1])
        return answer.SerializeToString()

    async def model_config(self, data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        answer = pb.ModelConfigResponse()
        name = pb.ModelConfigRequest.FromString(data).name
        answer.config.model_transaction_policy.decoupled = name != "unary"
        answer.config.parameters["engine_dir"].string_value = self.engine_dir
        answer.config.parameters["device"].string_value = "cpu"
        return answer.SerializeToString()


async def main(engine_dir: str) -> None:
    fake = FakeTriton(engine_dir)
    server = grpc.aio.server()
    methods = {
        "ModelStreamInfer": grpc.unary_stream_rpc_method_handler(fake.stream),
        "ServerMetadata": grpc.unary_unary_rpc_method_handler(fake.server_metadata),
        "ModelReady": grpc.unary_unary_rpc_method_handler(fake.model_ready),
        "ModelMetadata": grpc.unary_unary_rpc_method_handler(fake.model_metadata),
        "ModelConfig": grpc.unary_unary_rpc_method_handler(fake.model_config),
    }
    handler = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods)
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
