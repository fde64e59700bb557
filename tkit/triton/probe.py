"""Is the model ready, is it the server that was started, does it generate? Asks over HTTP and gRPC, as clients do."""

from __future__ import annotations

import http.client
import json
import queue
from typing import Any

import numpy as np
import tritonclient.grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tkit.errors import ServerError
from tkit.specs.server import MODEL_NAME

INSTANCE_PARAMETER = "instance"  # a nonce in config.pbtxt: a stranger on the same port cannot know it
# The servers are this machine's own; a proxy from the environment has no business in between.
NO_PROXY = [("grpc.enable_http_proxy", 0)]


def connect_host(host: str) -> str:
    """Where to reach a server that was bound to `host`."""
    return "127.0.0.1" if host == "0.0.0.0" else host


def is_http_ready(host: str, port: int, timeout_s: float) -> bool:
    status, _ = _http_get(host, port, f"/v2/models/{MODEL_NAME}/ready", timeout_s)
    return status == 200


def check_instance(host: str, http_port: int, grpc_port: int, instance: str, timeout_s: float) -> None:
    """Both ports answer with the model of this start, not with some other server's."""
    _, body = _http_get(host, http_port, f"/v2/models/{MODEL_NAME}/config", timeout_s)
    with _grpc_client(host, grpc_port) as client:
        try:
            config = client.get_model_config(MODEL_NAME, client_timeout=timeout_s, as_json=True)["config"]
        except InferenceServerException as error:
            raise ServerError(f"gRPC port {grpc_port} does not answer: {_message(error)}") from error
    for what, port, answer in (("HTTP", http_port, body), ("gRPC", grpc_port, config)):
        found = answer.get("parameters", {}).get(INSTANCE_PARAMETER, {}).get("string_value")
        if found != instance:
            raise ServerError(f"{what} port {port} is answered by another server: instance {found}, not {instance}")


def front_instance(host: str, port: int, timeout_s: float) -> str | None:
    """The start that the OpenAI front belongs to; None while none answers there, or is not ready."""
    status, body = _http_get(host, port, "/health", timeout_s)
    return body.get(INSTANCE_PARAMETER) if status == 200 and isinstance(body, dict) else None


def _http_get(host: str, port: int, path: str, timeout_s: float) -> tuple[int, Any]:
    """Status and JSON body; status 0 when nobody answers."""
    connection = http.client.HTTPConnection(connect_host(host), port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        return response.status, json.loads(body) if body else {}
    except (OSError, http.client.HTTPException, ValueError):
        return 0, {}
    finally:
        connection.close()


def _grpc_client(host: str, port: int) -> tritonclient.grpc.InferenceServerClient:
    return tritonclient.grpc.InferenceServerClient(f"{connect_host(host)}:{port}", channel_args=NO_PROXY)


def generate(host: str, grpc_port: int, prompt: str, max_tokens: int, timeout_s: float) -> str:
    """The text generated for one streamed gRPC request; raises ServerError with the server's own message."""
    responses: queue.SimpleQueue[Any] = queue.SimpleQueue()
    inputs = [
        _input("text_input", np.array([[prompt.encode()]], dtype=np.object_)),
        _input("max_tokens", np.array([[max_tokens]], dtype=np.int32)),
        _input("stream", np.array([[True]])),
    ]
    with _grpc_client(host, grpc_port) as client:
        client.start_stream(lambda result, error: responses.put((result, error)), stream_timeout=timeout_s)
        client.async_stream_infer(MODEL_NAME, inputs, enable_empty_final_response=True)
        try:
            texts = _texts(responses, timeout_s)
        except BaseException:
            client.stop_stream(cancel_requests=True)
            raise
        # Not cancelled: 9 of 70 servers whose finished stream was cancelled (0 of 30 without) kept the model loaded when
        # they were to end, until the exit timeout.
        client.stop_stream()
        return "".join(texts)


def _input(name: str, array: np.ndarray) -> tritonclient.grpc.InferInput:
    tensor = tritonclient.grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array)
    return tensor


def _texts(responses: queue.SimpleQueue[Any], timeout_s: float) -> list[str]:
    texts = []
    while True:
        try:
            result, error = responses.get(timeout=timeout_s)
        except queue.Empty:
            raise ServerError(f"no answer to a first request within {timeout_s:.0f} s") from None
        if error is not None:
            raise ServerError(f"the first request failed: {_message(error)}")
        text = result.as_numpy("text_output")
        if text is not None:
            texts.append(text.reshape(-1)[0].decode())
        if result.get_response().parameters["triton_final_response"].bool_param:
            return texts


def _message(error: InferenceServerException) -> str:
    return error.message() or str(error)
