"""The model that Triton's Python backend loads for the reference engine. Imported only inside the backend's process.

    execute (Triton's thread)  ->  engine.submit           returns at once
    engine thread              ->  queue of chunks         never waits for Triton
    delivery thread            ->  response senders        the only one that talks to open requests

A response costs a round trip through shared memory (0.1 ms), which would stall every sequence of the batch if the
engine's thread paid it. The delivery thread also asks, every CANCEL_PERIOD_S, whether clients have gone, so that a
request still waiting for its first token is given up as soon as one that streams.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import triton_python_backend_utils as pb_utils

from tkit.backends.requests import Answer, EnsembleRequest, read_request
from tkit.errors import InputError
from tkit.specs.generation import INVALID_REQUEST, EngineStats, GenerationChunk, GenerationRequest
from tkit.units import NS_PER_S

CANCEL_PERIOD_S = 0.1  # TensorRT-LLM's cancellation_check_period_ms
PARENT_PERIOD_S = 0.5
LOCK_HELD_S = 30.0
SECONDS_BUCKETS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0]


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        server_pid = os.getppid()
        threading.Thread(target=_die_with_server, args=(server_pid,), daemon=True).start()
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        self._metrics = _Metrics(server_pid)
        self._engine, self._queue_full = self.load_engine(parameters)
        _check_that_it_generates(self._engine)
        self._chunks: queue.SimpleQueue[tuple[_Stream, GenerationChunk | None] | None] = queue.SimpleQueue()
        self._delivery = threading.Thread(target=self._deliver, name="delivery", daemon=True)
        self._delivery.start()

    def load_engine(self, parameters: dict[str, str]) -> tuple[Any, type[Exception]]:
        """The engine, and the exception with which it refuses a request when its queue is full."""
        from tkit.runtime.engine import Engine, QueueFull

        engine = Engine.load(
            Path(parameters["engine_dir"]),
            device=parameters["device"],
            max_batch_size=int(parameters["max_batch_size"]),
            max_queue_size=int(parameters["max_queue_size"]),
        )
        return engine, QueueFull

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._submit(request, sender)
            except InputError as error:
                self._refuse(sender, _one_line(error), pb_utils.TritonError.INVALID_ARG)
            except self._queue_full as error:
                self._refuse(sender, str(error), pb_utils.TritonError.UNAVAILABLE)
            except Exception as error:
                pb_utils.Logger.log_error(f"request failed: {error!r}")
                self._refuse(sender, f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)

    def finalize(self) -> None:
        self._engine.close()
        self._chunks.put(None)
        self._delivery.join(timeout=5)

    def _submit(self, request: Any, sender: Any) -> None:
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        parsed = read_request(inputs, json.loads(request.parameters() or "{}"))
        stream = _Stream(parsed, sender, self._metrics)
        stream.handle = self._engine.submit(parsed.generation, lambda chunk: self._chunks.put((stream, chunk)))
        self._chunks.put((stream, None))

    def _refuse(self, sender: Any, message: str, code: int) -> None:
        self._metrics.finished("refused")
        error = pb_utils.TritonError(message, code)
        sender.send(pb_utils.InferenceResponse(error=error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _deliver(self) -> None:
        """Sends chunks as they come and looks for clients that left, until the queue says None."""
        open_streams: set[_Stream] = set()
        next_look = time.monotonic() + CANCEL_PERIOD_S
        is_ended = False
        while not is_ended:
            wait_s = next_look - time.monotonic()
            if wait_s <= 0:
                for stream in open_streams:
                    stream.cancel_if_abandoned()
                self._metrics.load(self._engine.stats())
                next_look = time.monotonic() + CANCEL_PERIOD_S
                continue
            items = self._arrived(wait_s)
            is_ended = None in items
            # All responses are made before the first is sent: one by one, each would find Python's lock taken and the
            # processor's caches full of the model, and would stop the engine for as long.
            made = [(stream, stream.prepared(chunk) if chunk else None) for stream, chunk in filter(None, items)]
            for stream, send in made:
                if send is not None:
                    send()
                if stream.is_closed:
                    open_streams.discard(stream)
                else:
                    open_streams.add(stream)

    def _arrived(self, timeout_s: float) -> list[tuple[_Stream, GenerationChunk | None] | None]:
        """All that waits in the queue; when it is empty, what comes first within that time."""
        items = []
        with contextlib.suppress(queue.Empty):
            items.append(self._chunks.get(timeout=timeout_s))
            while True:
                items.append(self._chunks.get_nowait())
        return items


class _Stream:
    """One open request. Triton gets its FINAL with the last chunk, or with the first that cannot be sent."""

    def __init__(self, request: EnsembleRequest, sender: Any, metrics: _Metrics):
        self.handle: Any = None  # set before the delivery thread hears of the stream
        self.is_closed = False
        self._answer = Answer(request)
        self._tensors: dict[str, tuple[np.ndarray, Any]] = {}
        self._sender = sender
        self._metrics = metrics

    def prepared(self, chunk: GenerationChunk) -> Callable[[], None]:
        """Makes the response to a chunk; what is returned sends it."""
        try:
            return partial(self._send, chunk, self._response(chunk))
        except Exception as error:
            pb_utils.Logger.log_error(f"response could not be made: {error!r}")
            return partial(self._close, chunk, is_sent=False)

    def _send(self, chunk: GenerationChunk, response: Any) -> None:
        if self.is_closed:
            return
        is_last, is_sent = chunk.finish_reason is not None, False
        try:
            if response is not None:
                self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0)
            is_sent = True
        except Exception as error:
            pb_utils.Logger.log_error(f"response could not be sent: {error!r}")
        finally:
            if is_last or not is_sent:
                self._close(chunk, is_sent)

    def cancel_if_abandoned(self) -> None:
        if self._sender.is_cancelled():
            self.handle.cancel()  # the engine answers with a last chunk

    def _close(self, chunk: GenerationChunk, is_sent: bool) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        if not is_sent:
            try:
                self._sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            except Exception as error:
                pb_utils.Logger.log_error(f"request could not be closed: {error!r}")
            if chunk.finish_reason is None:
                self.handle.cancel()
        self._metrics.finished(str(chunk.finish_reason) if is_sent else "error", chunk)

    def _response(self, chunk: GenerationChunk) -> Any:
        if chunk.finish_reason == "error":
            message = chunk.error or "the engine gave the request up"
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INTERNAL))
        if chunk.finish_reason == "cancelled":
            return pb_utils.InferenceResponse(error=pb_utils.TritonError("cancelled", pb_utils.TritonError.CANCELLED))
        arrays = self._answer.outputs(chunk)
        if arrays is None:
            return None
        return pb_utils.InferenceResponse([self._tensor(name, array) for name, array in arrays.items()])

    def _tensor(self, name: str, array: np.ndarray) -> Any:
        """An array that is the last response's own keeps its tensor, and its place in shared memory."""
        last, tensor = self._tensors.get(name, (None, None))
        if array is not last:
            tensor = pb_utils.Tensor(name, array)
            self._tensors[name] = array, tensor
        return tensor


def _check_that_it_generates(engine: Any) -> None:
    """Fails the load of an engine that cannot generate: the server then never opens a port."""
    chunks: queue.SimpleQueue[GenerationChunk] = queue.SimpleQueue()
    engine.submit(GenerationRequest(prompt="Hello", max_tokens=1, top_k=1), chunks.put)
    while (chunk := chunks.get()).finish_reason is None:
        pass
    if chunk.finish_reason == "error":
        raise RuntimeError(f"the engine gave no first token: {chunk.error}")


def _die_with_server(server_pid: int) -> None:
    """Left to itself this process outlives a killed server, with its memory and GPU. (A parent-death signal would not
    do: it comes when the server's thread that started this process ends, which may be at any time.)

    Whoever asks the server something waits for it with Python's lock held, and a server killed just then never answers:
    then this thread never runs again, and faulthandler's, which needs no lock, ends the process.
    """
    while os.getppid() == server_pid:
        faulthandler.dump_traceback_later(LOCK_HELD_S, exit=True)
        time.sleep(PARENT_PERIOD_S)
    os._exit(1)


def _one_line(error: InputError) -> str:
    told = error.problems or (error.message,)
    return f"{INVALID_REQUEST}: {'; '.join(told)}"


class _Metrics:
    """On Triton's metrics port. Triton's own counters end with execute(), before the first token, and call a cancelled
    request a success.

    Each update is a question to the server that is waited for with Python's lock held: asking a dead server would keep
    this process from noticing that it is dead.
    """

    def __init__(self, server_pid: int) -> None:
        self._server_pid = server_pid
        family = pb_utils.MetricFamily
        counter, gauge, histogram = family.COUNTER, family.GAUGE, family.HISTOGRAM
        families = {
            name: family(name=f"tkit_{name}", description=description, kind=kind)
            for name, description, kind in (
                ("requests_total", "Requests by how they ended", counter),
                ("tokens_total", "Tokens of ended requests", counter),
                ("open_requests", "Requests that run or wait", gauge),
                ("kv_cache_tokens", "Tokens in the KV cache, and how many it may ever hold", gauge),
                ("resident_memory_bytes", "Memory of the engine's process, in whole MiB", gauge),
                ("queue_seconds", "Arrival to the first step of its prompt", histogram),
                ("time_to_first_token_seconds", "Arrival to first token", histogram),
                ("time_per_output_token_seconds", "Mean gap between the tokens of a request", histogram),
                ("request_seconds", "Arrival to last token", histogram),
            )
        }
        self._families = families  # a metric works only as long as its family exists
        self._outcomes: dict[str, Any] = {}
        self._input_tokens = families["tokens_total"].Metric(labels={"kind": "input"})
        self._output_tokens = families["tokens_total"].Metric(labels={"kind": "output"})
        self._gauges = {
            "running": families["open_requests"].Metric(labels={"state": "running"}),
            "waiting": families["open_requests"].Metric(labels={"state": "waiting"}),
            "kv_tokens": families["kv_cache_tokens"].Metric(labels={"kind": "stored"}),
            "kv_budget_tokens": families["kv_cache_tokens"].Metric(labels={"kind": "limit"}),
            "resident_bytes": families["resident_memory_bytes"].Metric(labels={}),
        }
        self._process = psutil.Process()
        self._values = dict.fromkeys(self._gauges, 0)
        self._seconds = {
            name: family.Metric(labels={}, buckets=SECONDS_BUCKETS)
            for name, family in families.items()
            if name.endswith("_seconds")
        }

    def load(self, stats: EngineStats) -> None:
        """`stats` has a field for every gauge but the memory."""
        values = {**dataclasses.asdict(stats), "resident_bytes": self._process.memory_info().rss >> 20 << 20}
        for name, gauge in self._gauges.items():
            value = values[name]
            if value != self._values[name] and os.getppid() == self._server_pid:
                self._values[name] = value
                gauge.set(value)

    def finished(self, outcome: str, chunk: GenerationChunk | None = None) -> None:
        if os.getppid() != self._server_pid:
            return
        if outcome not in self._outcomes:
            self._outcomes[outcome] = self._families["requests_total"].Metric(labels={"outcome": outcome})
        self._outcomes[outcome].increment(1)
        if chunk is None:
            return
        self._input_tokens.increment(chunk.num_input_tokens)
        self._output_tokens.increment(chunk.num_output_tokens)
        if chunk.first_scheduled_ns:
            self._observe("queue_seconds", chunk.first_scheduled_ns - chunk.arrival_ns)
        if chunk.first_token_ns:
            self._observe("time_to_first_token_seconds", chunk.first_token_ns - chunk.arrival_ns)
            self._observe("request_seconds", chunk.last_token_ns - chunk.arrival_ns)
        if chunk.num_output_tokens > 1:
            span_ns = chunk.last_token_ns - chunk.first_token_ns
            self._observe("time_per_output_token_seconds", span_ns / (chunk.num_output_tokens - 1))

    def _observe(self, name: str, duration_ns: float) -> None:
        self._seconds[name].observe(duration_ns / NS_PER_S)
