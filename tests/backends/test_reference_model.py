"""The model inside a real Triton, as clients see it: gRPC streams, HTTP, errors, cancellation, admission, metrics."""

from __future__ import annotations

import http.client
import json
import queue
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from fake_backend import OPEN, ROWS, metrics, write_engine
from tritonclient.utils import np_to_triton_dtype
from waiting import wait_until

from tkit.backends.table import BACKENDS
from tkit.errors import ServerError
from tkit.report.telemetry import SERVER
from tkit.specs.server import ServeOptions, ServerRecord
from tkit.stages.serve import running_server
from tkit.triton import probe

# One second to exit: a gRPC request that Triton itself refuses keeps the model loaded until that time is over.
OPTIONS = ServeOptions(
    http_port=0,
    grpc_port=0,
    metrics_port=0,
    openai_port=0,
    max_batch_size=4,
    max_queue_size=4,
    timeout_s=120,
    exit_timeout_s=1,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerRecord]:
    directory = tmp_path_factory.mktemp("engines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, "fake", ROWS["fake"])
        write_engine(directory / "tiny")
        with running_server(directory / "tiny", OPTIONS, engines_dir=directory) as record:
            yield record


def post(server: ServerRecord, path: str, body: Any) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=60)
    data = body if isinstance(body, bytes) else json.dumps({"text_input": "a b c", "max_tokens": 4, **body})
    connection.request("POST", f"/v2/models/ensemble/{path}", data)
    response = connection.getresponse()
    answer = response.status, response.read().decode()
    connection.close()
    return answer


def events(body: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in body.split("\n\n") if line]


class GrpcStream:
    """One gRPC request; iterating gives (outputs, error) until the final response."""

    def __init__(self, server: ServerRecord, **inputs: Any):
        self._responses: queue.Queue[Any] = queue.Queue()
        self.client = triton.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
        self.client.start_stream(lambda result, error: self._responses.put((result, error)), stream_timeout=60)
        inputs = {"text_input": b"a b c", "max_tokens": np.int32(4), "stream": True, **inputs}
        tensors = [_tensor(*item) for item in inputs.items()]
        self.client.async_stream_infer("ensemble", tensors, enable_empty_final_response=True)

    def __iter__(self) -> Iterator[tuple[dict[str, Any], str | None]]:
        while True:
            result, error = self._responses.get(timeout=60)
            if error is not None:
                yield {}, error.message()
                return
            response = result.get_response()
            yield {tensor.name: result.as_numpy(tensor.name).reshape(-1).tolist() for tensor in response.outputs}, None
            if response.parameters["triton_final_response"].bool_param:
                return

    def close(self) -> None:
        self.client.stop_stream(cancel_requests=True)
        self.client.close()


def _tensor(name: str, value: Any) -> triton.InferInput:
    array = np.array([[value]], dtype=np.object_ if isinstance(value, bytes) else None)
    tensor = triton.InferInput(name, [1, 1], np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array)
    return tensor


def grpc(server: ServerRecord, **inputs: Any) -> list[tuple[dict[str, Any], str | None]]:
    stream = GrpcStream(server, **inputs)
    try:
        return list(stream)
    finally:
        stream.close()


def test_grpc_stream_gives_a_response_per_token(server: ServerRecord) -> None:
    responses = grpc(server, return_num_output_tokens=True)
    texts = (b"a ", b"b ", b"c ", b"a ")
    assert responses == [({"text_output": [text], "num_output_tokens": [1]}, None) for text in texts]


def test_grpc_without_stream_gives_one_response(server: ServerRecord) -> None:
    started = time.time_ns()
    [(outputs, error)] = grpc(
        server, stream=False, exclude_input_in_output=False, return_num_input_tokens=True,
        return_num_output_tokens=True, return_log_probs=True, return_perf_metrics=True,
    )  # fmt: skip
    assert error is None
    times = [outputs.pop(f"{name}_time_ns")[0] for name in ("arrival", "first_scheduled", "first_token", "last_token")]
    in_order = [started, *times, time.time_ns()]
    assert in_order == sorted(in_order)
    assert outputs == {
        "text_output": [b"a b c a b c a "],
        "num_input_tokens": [3],
        "num_output_tokens": [4],
        "cum_log_probs": [-2.0],
        "output_log_probs": [-0.5] * 4,
    }


def test_http_stream_and_single_answer(server: ServerRecord) -> None:
    status, body = post(server, "generate_stream", {"stream": True})
    assert (status, [event["text_output"] for event in events(body)]) == (200, ["a ", "b ", "c ", "a "])
    status, body = post(server, "generate", {"stop_words": ["b"], "temperature": 1, "bad_words": "", "id": "7"})
    assert (status, json.loads(body)["text_output"]) == (200, "a b ")


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"max_tokens": 0}, 400, "invalid request: max_tokens is 0, expected at least 1"),
        ({"max_tokens": 99999999999}, 400, "invalid request: max_tokens is 1215752191, at most 4096"),
        ({"beam_width": 4}, 400, "invalid request: beam_width is 4, this server supports only 1"),
        ({"temprature": 1}, 400, 'invalid request: unknown parameter "temprature" (did you mean "temperature"?)'),
        ({"top_p": 2.0, "top_k": -3}, 400, "top_k is -3, expected 0 (no limit) or more; top_p is 2.0"),
        ({"max_tokens": "many"}, 500, "attempt to access JSON non-signed-integer as signed-integer"),
        ({"text_input": ["a", "b"]}, 400, "text_input"),
        (b'{"max_tokens": 4}', 400, "missing required input(s) ['text_input']"),
        (b"{", 500, "failed to parse the request JSON"),
    ],
)
def test_a_bad_request_is_told_why(server: ServerRecord, body: Any, status: int, message: str) -> None:
    answer = post(server, "generate", body)
    assert answer[0] == status
    assert message in json.loads(answer[1])["error"]


def test_grpc_errors_name_the_input(server: ServerRecord) -> None:
    assert grpc(server, max_tokens=np.int32(-1)) == [({}, "invalid request: max_tokens is -1, expected at least 1")]
    [(_, error)] = grpc(server, text_input=b"\xff\xfe")
    assert error == "invalid request: text_input is not UTF-8: invalid start byte at byte 0"
    [(_, error)] = grpc(server, lora_task_id=np.uint64(1))
    assert "lora_task_id" in str(error)


def test_an_engine_error_ends_the_stream_with_its_message(server: ServerRecord) -> None:
    responses = grpc(server, text_input=b"!error")
    assert [error for _, error in responses] == [None, None, "the fake engine was asked to fail"]


def test_a_large_body_is_served(server: ServerRecord) -> None:
    status, body = post(server, "generate", {"text_input": "word " * 2_000_000, "max_tokens": 1})
    assert (status, json.loads(body)["text_output"]) == (200, "word ")


def test_a_body_in_more_pieces_than_the_default_stack_holds_is_served(server: ServerRecord) -> None:
    start = b'{"text_input": "a", "max_tokens": 1'
    with socket.create_connection(("127.0.0.1", server.http_port), timeout=60) as connection:
        head = "POST /v2/models/ensemble/generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode() + b"%x\r\n%s\r\n" % (len(start), start))
        connection.sendall(b"1\r\n \r\n" * 550_000 + b"1\r\n}\r\n0\r\n\r\n")
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert json.loads(response.read())["text_output"] == "a "


def test_requests_beyond_the_queue_are_refused_and_the_others_finish(server: ServerRecord) -> None:
    streams = [GrpcStream(server, max_tokens=np.int32(600)) for _ in range(8)]
    first = [next(iter(stream)) for stream in streams]  # all eight are in
    assert post(server, "generate", {}) == (400, '{"error":"queue full: 8 requests"}')
    assert grpc(server) == [({}, "queue full: 8 requests")]
    finished = [list(stream) for stream in streams]
    for stream in streams:
        stream.close()
    assert [len(responses) for responses in finished] == [599] * 8
    assert all(error is None for _, error in first)


def test_reports_know_the_names_of_its_metrics(server: ServerRecord) -> None:
    told = metrics(server)
    for quantity, sources in SERVER.items():
        source = sources[0]
        for labels in filter(None, (source.labels, source.of)):
            assert f"{source.metric}{{{labels}}}" in told, quantity
        assert any(name.startswith(source.metric) for name in told), quantity


@pytest.mark.parametrize("prompt", [b"a b", b"!silent"])
def test_a_client_that_leaves_frees_its_slot(server: ServerRecord, prompt: bytes) -> None:
    cancelled = metrics(server).get('tkit_requests_total{outcome="cancelled"}', 0)
    stream = GrpcStream(server, text_input=prompt, max_tokens=np.int32(4000))
    assert wait_until(lambda: metrics(server)[OPEN] == 1)
    assert metrics(server)['tkit_kv_cache_tokens{kind="stored"}'] > 0
    assert 50e6 < metrics(server)["tkit_resident_memory_bytes"] < 5e9
    stream.close()
    assert wait_until(lambda: metrics(server)[OPEN] == 0)
    assert wait_until(lambda: metrics(server)['tkit_kv_cache_tokens{kind="stored"}'] == 0)
    assert wait_until(lambda: metrics(server).get('tkit_requests_total{outcome="cancelled"}') == cancelled + 1)


def test_an_http_client_that_leaves_frees_its_slot(server: ServerRecord) -> None:
    with socket.create_connection(("127.0.0.1", server.http_port), timeout=60) as connection:
        body = json.dumps({"text_input": "a", "max_tokens": 4000, "stream": True})
        head = f"POST /v2/models/ensemble/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall((head + body).encode())
        assert connection.makefile("rb").readline() == b"HTTP/1.1 200 OK\r\n"
        assert wait_until(lambda: metrics(server)[OPEN] == 1)
    assert wait_until(lambda: metrics(server)[OPEN] == 0)


def test_metrics_count_what_ended(server: ServerRecord) -> None:
    refused = 'tkit_requests_total{outcome="refused"}'
    before = metrics(server)
    post(server, "generate", {"max_tokens": 7})
    post(server, "generate", {"max_tokens": 0})
    assert wait_until(lambda: metrics(server).get(refused, 0) > before.get(refused, 0))
    after = metrics(server)
    grown = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    assert grown['tkit_requests_total{outcome="length"}'] == 1
    assert grown[refused] == 1
    assert grown['tkit_tokens_total{kind="output"}'] == 7
    assert grown["tkit_time_to_first_token_seconds_count"] == grown["tkit_queue_seconds_count"] == 1
    assert after['tkit_kv_cache_tokens{kind="limit"}'] == 1000
    assert grown["tkit_time_per_output_token_seconds_sum"] >= 0.01  # the fake engine paces by 10 ms


def test_management_interfaces_are_closed(server: ServerRecord) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=30)
    for method, path in (
        ("POST", "/v2/repository/index"),
        ("POST", "/v2/repository/models/ensemble/unload"),
        ("GET", "/v2/systemsharedmemory/status"),
        ("GET", "/v2/logging"),
    ):
        connection.request(method, path)
        response = connection.getresponse()
        assert (response.status, b"restricted" in response.read()) == (403, True), path
    connection.close()
    client = triton.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
    with pytest.raises(Exception, match="restricted"):
        client.get_system_shared_memory_status()
    client.close()


def test_a_stranger_is_not_taken_for_the_server(server: ServerRecord) -> None:
    with pytest.raises(ServerError, match=r"gRPC port \d+ is answered by another server: instance .*, not mine"):
        probe.generate("127.0.0.1", server.grpc_port, "x y", 3, 1, instance="mine")


def test_the_smoke_generation_reports_the_servers_words(server: ServerRecord) -> None:
    port, own = server.grpc_port, probe.http_instance("127.0.0.1", server.http_port, 30)
    assert probe.generate("127.0.0.1", port, "x y", 3, 30, instance=own) == "x y x "
    with pytest.raises(ServerError, match="the first request failed: the fake engine was asked to fail"):
        probe.generate("127.0.0.1", port, "!error", 3, 30)
    with pytest.raises(ServerError, match="Deadline|no answer"):
        probe.generate("127.0.0.1", port, "!silent", 3, 0.3)


def test_idle_server_holds_one_region_of_its_own_name(server: ServerRecord) -> None:
    assert list(Path("/dev/shm").glob(f"tkit{server.pid}_*"))
