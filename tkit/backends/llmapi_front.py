"""`ensemble` in front of TensorRT-LLM's `llmapi` model, so that its clients need to know one surface only.

Triton loads a copy of this file in the container's Python: it imports nothing but numpy and Triton's own module. The model
behind streams the text so far, which leaves here as deltas. A thread per open request waits for its answers.
"""

from __future__ import annotations

import threading
import uuid
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

MODEL = "tensorrt_llm"
CANCEL_PERIOD_S = 0.1
# `ensemble`'s input -> the model's; both of one number or one list
INPUTS = {
    "max_tokens": "sampling_param_max_tokens",
    "temperature": "sampling_param_temperature",
    "top_k": "sampling_param_top_k",
    "top_p": "sampling_param_top_p",
    "frequency_penalty": "sampling_param_frequency_penalty",
    "presence_penalty": "sampling_param_presence_penalty",
    "seed": "sampling_param_seed",
    "stop_words": "sampling_param_stop",
    "stream": "streaming",
    "return_perf_metrics": "sampling_param_return_perf_metrics",
    "return_log_probs": "return_cumulative_logprob",
}
# Inputs that the model has no word for -> values that ask for nothing; any other is refused.
NEUTRAL = {
    "repetition_penalty": (1.0,),
    "beam_width": (1,),
    "num_return_sequences": (1,),
    "return_context_logits": (False,),
    "return_generation_logits": (False,),
}
# The rest changes nothing for one sequence (`pad_id`, `length_penalty`), or asks for counts, which no answer carries.
TIMES = ("arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns")
# the model's output -> `ensemble`'s
OUTPUTS = {"cumulative_logprob": "cum_log_probs", **{name: name for name in TIMES}}


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self._open: dict[str, Any] = {}  # request id -> response sender
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                inputs = _read(request)
            except ValueError as error:
                _refuse(sender, f"invalid request: {error}", pb_utils.TritonError.INVALID_ARG)
                continue
            request_id = uuid.uuid4().hex
            with self._lock:
                self._open[request_id] = sender
            threading.Thread(target=self._answer, args=(request_id, sender, inputs), daemon=True).start()

    def finalize(self) -> None:
        self._ended.set()
        self._watcher.join(timeout=5)

    def _answer(self, request_id: str, sender: Any, inputs: list[Any]) -> None:
        try:
            problem = self._stream(request_id, sender, inputs)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        with self._lock:  # before the last response: asked about a request that has it, the server crashes
            self._open.pop(request_id, None)
        if problem is None:
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        else:
            _refuse(sender, problem, pb_utils.TritonError.INTERNAL)

    def _stream(self, request_id: str, sender: Any, inputs: list[Any]) -> str | None:
        """Sends what the model answers, but for the end of it; returns what the model complains of."""
        names = ["text_output", *OUTPUTS]
        request = pb_utils.InferenceRequest(
            model_name=MODEL, request_id=request_id, inputs=inputs, requested_output_names=names
        )
        so_far = ""
        for response in request.exec(decoupled=True):
            if response.has_error():
                return str(response.error().message())
            outputs = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
            if "text_output" not in outputs:
                continue  # the final response is empty
            text = outputs.pop("text_output").reshape(-1)[0].decode()
            # A model that sends deltas is understood as well: they do not begin with what came before.
            delta = text[len(so_far) :] if text.startswith(so_far) else text
            so_far = so_far + delta
            sender.send(_response(delta, outputs))
        return None

    def _watch(self) -> None:
        """Tells the model of clients that left: a request of the same id that says stop."""
        while not self._ended.wait(CANCEL_PERIOD_S):
            with self._lock:
                gone = [request_id for request_id, sender in self._open.items() if sender.is_cancelled()]
                for request_id in gone:
                    del self._open[request_id]
            for request_id in gone:
                inputs = [
                    pb_utils.Tensor("text_input", np.array([b""], np.object_)),
                    pb_utils.Tensor("stop", np.array([True])),
                ]
                stop = pb_utils.InferenceRequest(
                    model_name=MODEL, request_id=request_id, inputs=inputs, requested_output_names=["text_output"]
                )
                for _ in stop.exec(decoupled=True):
                    pass


def _read(request: Any) -> list[Any]:
    """The model's inputs; raises ValueError with everything that it cannot do."""
    given = {tensor.name(): tensor.as_numpy().reshape(-1) for tensor in request.inputs()}
    problems = [
        f"{name} is {given[name][0]}: the PyTorch backend's Triton model has no such input"
        for name, values in NEUTRAL.items()
        if name in given and given[name][0] not in values
    ]
    if any(word for word in given.get("bad_words", ())):
        problems.append("bad_words: the PyTorch backend's Triton model has no such input")
    if given["max_tokens"][0] < 1:
        problems.append(f"max_tokens is {given['max_tokens'][0]}, expected at least 1")
    if problems:
        raise ValueError("; ".join(problems))
    echo = given.get("exclude_input_in_output", np.array([True]))
    inputs = [
        pb_utils.Tensor("text_input", given["text_input"]),
        pb_utils.Tensor("sampling_param_exclude_input_from_output", echo),
    ]
    for name, model_name in INPUTS.items():
        if name in given and not (name == "stop_words" and not any(given[name])):
            inputs.append(pb_utils.Tensor(model_name, given[name]))
    return inputs


def _response(delta: str, outputs: dict[str, np.ndarray]) -> Any:
    tensors = [pb_utils.Tensor("text_output", np.array([[delta.encode()]], np.object_))]
    for name, array in outputs.items():
        if array.dtype != np.object_:
            tensors.append(pb_utils.Tensor(OUTPUTS[name], array.reshape(1, -1)))
    return pb_utils.InferenceResponse(tensors)


def _refuse(sender: Any, message: str, code: int) -> None:
    error = pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
    sender.send(error, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
