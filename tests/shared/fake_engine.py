"""An engine without a model: it repeats the prompt's words, one token every `gap_s`, for as many requests as it may.

Same interface as `tkit.runtime.engine`. Prompts that begin with `!` make it misbehave in a named way.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tkit.errors import InputError, ServerError
from tkit.specs.generation import EngineStats, GenerationChunk, GenerationRequest


class QueueFull(ServerError):
    pass


@dataclass(eq=False)
class Handle:
    request: GenerationRequest
    on_chunk: Callable[[GenerationChunk], None]
    arrival_ns: int
    words: list[str]
    num_tokens: int = 0
    first_token_ns: int = 0
    is_cancelled: bool = False

    def cancel(self) -> None:
        self.is_cancelled = True


class FakeEngine:
    max_tokens = 4096

    def __init__(self, *, gap_s: float = 0.0, max_batch_size: int = 32, max_queue_size: int = 256):
        self._gap_s = gap_s
        self._max_open = max_batch_size + max_queue_size
        self._open: list[Handle] = []
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, on_chunk: Callable[[GenerationChunk], None]) -> Handle:
        if request.max_tokens > self.max_tokens:
            problem = f"max_tokens is {request.max_tokens}, at most {self.max_tokens}"
            raise InputError("invalid request", problems=[problem])
        words = request.prompt.split() or ["-"]
        with self._changed:
            if len(self._open) >= self._max_open:
                raise QueueFull(f"queue full: {len(self._open)} requests")
            handle = Handle(request, on_chunk, time.time_ns(), words)
            self._open.append(handle)
            self._changed.notify()
        return handle

    def stats(self) -> EngineStats:
        """As if each open request ran and each token lay in the cache."""
        handles = list(self._open)
        return EngineStats(
            running=len(handles), waiting=0, free_slots=self._max_open - len(handles),
            kv_tokens=sum(len(handle.words) + handle.num_tokens for handle in handles), kv_allocated_tokens=0,
            kv_budget_tokens=1000, kv_bytes_per_token=4,
        )  # fmt: skip

    def close(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._open or self._is_closing)
                handles = list(self._open)
            if not handles:
                return
            time.sleep(self._gap_s)
            for handle in handles:
                if self._step(handle):
                    with self._changed:
                        self._open.remove(handle)

    def _step(self, handle: Handle) -> bool:
        """One token for one request; true when it was the last."""
        request = handle.request
        if handle.is_cancelled or self._is_closing:
            self._emit(handle, "", (), "cancelled")
            return True
        if handle.words[0] == "!silent":
            return False
        if handle.words[0] == "!error" and handle.num_tokens == 2:
            self._emit(handle, "", (), "error", error="the fake engine was asked to fail")
            return True
        word = next(itertools.islice(itertools.cycle(handle.words), handle.num_tokens, None))
        handle.num_tokens += 1
        handle.first_token_ns = handle.first_token_ns or time.time_ns()
        is_stop = word in request.stop_words
        is_end = word == "</s>" and request.end_id is None
        is_last = is_stop or is_end or handle.num_tokens == request.max_tokens
        reason = ("stop" if is_stop or is_end else "length") if is_last else None
        echo = "" if request.exclude_input_in_output or handle.num_tokens > 1 else f"{request.prompt} "
        self._emit(handle, echo + ("" if is_end else f"{word} "), (handle.num_tokens,), reason)
        return is_last

    def _emit(
        self, handle: Handle, text: str, token_ids: tuple[int, ...], finish_reason: str | None, error: str | None = None
    ) -> None:
        handle.on_chunk(
            GenerationChunk(
                text=text,
                token_ids=token_ids,
                log_probs=(-0.5,) * len(token_ids) if handle.request.return_log_probs else (),
                num_input_tokens=len(handle.words),
                num_output_tokens=handle.num_tokens,
                arrival_ns=handle.arrival_ns,
                first_scheduled_ns=handle.arrival_ns,
                first_token_ns=handle.first_token_ns,
                last_token_ns=time.time_ns() if handle.num_tokens else 0,
                finish_reason=finish_reason,
                error=error,
            )
        )
