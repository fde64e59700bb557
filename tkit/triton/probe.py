"""Is the model ready, is it the server that was started, does it generate? Asks over HTTP and gRPC, as clients do."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import tritonclient.grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tkit.errors import ServerError
from tkit.specs.server import MODEL_NAME

INSTANCE_PARAMETER = "instance"  # a nonce in config.pbtxt: a stranger on the same port cannot know it
RETRY_S = 0.1
# The servers are this machine's own; a proxy from the environment has no business in between. A client that is made anew
# connects anew.
CHANNEL = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]


def connect_host(host: str) -> str:
    """Where to reach a server that was bound to `host`."""
    return "127.0.0.1" if host == "0.0.0.0" else host


def is_http_ready(host: str, port: int, timeout_s: float) -> bool:
    status, _ = _http_get(host, port, f"/v2/models/{MODEL_NAME}/ready", timeout_s)
    return status == 200


def http_instance(host: str, port: int, timeout_s: float) -> str | None:
    """The start that the ready model on this HTTP port belongs to, "" when it does not say; None while none is ready."""
    if not is_http_ready(host, port, timeout_s):
        return None
    _, config = _http_get(host, port, f"/v2/models/{MODEL_NAME}/config", timeout_s)
    return _instance(config)


def _instance(config: Any) -> str:
    return str(config.get("parameters", {}).get(INSTANCE_PARAMETER, {}).get("string_value", ""))


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


def generate(
    host: str, grpc_port: int, prompt: str, max_tokens: int, timeout_s: float, *, instance: str | None = None
) -> str:
    """The text generated for one streamed gRPC request by the server of that start, or by any.

    Raises ServerError with the server's own message, or when only others answer on the port for `timeout_s`.
    """
    responses: queue.SimpleQueue[Any] = queue.SimpleQueue()
    inputs = [
        _input("text_input", np.array([[prompt.encode()]], dtype=np.object_)),
        _input("max_tokens", np.array([[max_tokens]], dtype=np.int32)),
        _input("stream", np.array([[True]])),
    ]
    with _connected(host, grpc_port, instance, timeout_s) as client:
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


@contextlib.contextmanager
def _connected(
    host: str, port: int, instance: str | None, timeout_s: float
) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    """A connection to the server of that start. It may share the port with the one that it is to replace."""
    deadline = time.monotonic() + timeout_s
    while True:
        with tritonclient.grpc.InferenceServerClient(f"{connect_host(host)}:{port}", channel_args=CHANNEL) as client:
            try:
                config = client.get_model_config(MODEL_NAME, client_timeout=timeout_s, as_json=True)["config"]
                problem = f"is answered by another server: instance {_instance(config)}, not {instance}"
            except InferenceServerException as error:
                config, problem = {}, f"does not answer: {_message(error)}"
            if config and instance in (_instance(config), None):
                yield client
                return
        if time.monotonic() > deadline:
            raise ServerError(f"gRPC port {port} {problem}")
        time.sleep(RETRY_S)


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
