"""Continuous batching over a transformers model: requests in from any thread, text deltas out of one.

Each step reads at most `prefill_chunk` prompt tokens, one request at a time, then gives every request whose prompt has
been read its next token in one forward pass. Who runs is the scheduler's business, where keys and values lie the
cache's, which token comes the sampler's, what text it makes the text stream's; this module runs the thread and the
model between them. It knows no server and no protocol.

A request that fails takes no other with it, except those computed in the same forward pass. When the device itself
no longer answers, every request ends with "error" and `submit` says why.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from tkit.cores import usable_cores
from tkit.errors import InputError, ServerError
from tkit.runtime.cache import SlotCache
from tkit.runtime.forward import forward, kv_bytes_per_token, max_positions
from tkit.runtime.load import load_model
from tkit.runtime.sampling import Draw, Sampler, sample
from tkit.runtime.scheduler import Generation, Prefill, QueueFull, Scheduler
from tkit.runtime.text import Decoder, TextStream, decode
from tkit.specs.generation import EngineStats, GenerationChunk, GenerationRequest

__all__ = ["Engine", "EngineStats", "QueueFull", "RequestHandle"]

OnChunk = Callable[[GenerationChunk], None]

# Half a million tokens of the demo model, 8 thousand of a Llama 8B in float32.
CPU_KV_BYTES = 2 * 1024**3
# Of what is free once the weights are there; the rest is for activations, logits and the allocator's gaps.
CUDA_KV_SHARE = 0.8

log = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class _Request(Generation):
    request: GenerationRequest
    on_chunk: OnChunk
    end_id: int | None
    sampler: Sampler
    text: TextStream
    arrival_ns: int
    first_scheduled_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0
    echo: str = ""  # the prompt, when it belongs in front of the first delta


@dataclass(frozen=True)
class RequestHandle:
    _request: _Request = field(repr=False)
    _wake: Callable[[], None] = field(repr=False)

    def cancel(self) -> None:
        """Ends the request within a step; its last chunk says "cancelled". Nothing happens when it has ended."""
        self._request.is_cancelled = True
        self._wake()


class Engine:
    """`kv_cache_bytes` bounds the cache (default: 2 GiB on the CPU, up to 80 % of what is free on CUDA); it grows with use.

    `num_threads` are torch's, in this process; by default one less than there are cores, because OpenMP's threads spin
    while they wait: on two cores with anything else running, two of them were up to 30 times slower than one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        max_batch_size: int = 32,
        max_queue_size: int = 256,
        prefill_chunk: int = 512,
        kv_cache_bytes: int | None = None,
        num_threads: int | None = None,
    ):
        sizes = {"max_batch_size": max_batch_size, "max_queue_size": max_queue_size, "prefill_chunk": prefill_chunk}
        if problems := [f"{name} is {size}, expected at least 1" for name, size in sizes.items() if size < 1]:
            raise InputError("invalid engine options", problems=problems)
        config = model.config.get_text_config()
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.num_vocab: int = config.vocab_size
        self.max_positions = max_positions(config)
        self.prefill_chunk = prefill_chunk
        self.num_threads = num_threads or max(1, usable_cores() - 1)
        self._decoder = Decoder.of(tokenizer)
        self._longest_token = max(map(len, tokenizer.get_vocab()))  # in characters
        self._kv_bytes_per_token = kv_bytes_per_token(model)
        budget = min(
            (kv_cache_bytes or _default_kv_bytes(model, self._kv_bytes_per_token)) // self._kv_bytes_per_token,
            max_batch_size * self.max_positions,
        )
        self._cache = SlotCache(num_layers=config.num_hidden_layers, max_rows=max_batch_size, budget_tokens=budget)
        self._scheduler: Scheduler[_Request] = Scheduler(
            max_batch_size=max_batch_size, max_queue_size=max_queue_size, kv_budget_tokens=budget
        )
        self._changed = threading.Condition()  # guards the scheduler and the two flags below
        self._is_closing = False
        self._failure: str | None = None
        self._tokenizer_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="tkit-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls, engine_dir: Path, device: str = "auto", max_batch_size: int = 32, max_queue_size: int = 256, **options: Any
    ) -> Engine:
        """The engine of a built directory; `options` as in the constructor."""
        model, _ = load_model(engine_dir, device)
        tokenizer = AutoTokenizer.from_pretrained(engine_dir / "tokenizer")
        return cls(model, tokenizer, max_batch_size=max_batch_size, max_queue_size=max_queue_size, **options)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, request: GenerationRequest, on_chunk: OnChunk) -> RequestHandle:
        """Queues the request. `on_chunk` is called from the engine's thread, in order; the last has a finish_reason.

        Raises InputError when the request can never run, QueueFull when too many wait, ServerError when the engine has
        ended. An `on_chunk` that raises cancels its request.
        """
        arrival_ns = time.time_ns()
        prompt_ids = self._encode(request)
        end_id = self.tokenizer.eos_token_id if request.end_id is None else request.end_id
        if end_id is not None and not 0 <= end_id < self.num_vocab:
            end_id = None  # -1 by convention: nothing ends the text but its length and its stop words
        queued = _Request(
            prompt_ids=prompt_ids,
            max_tokens=request.max_tokens,
            request=request,
            on_chunk=on_chunk,
            end_id=end_id,
            sampler=Sampler(request, end_id, prompt_ids, self.num_vocab),
            text=TextStream(self._decoder, request.stop_words, request.min_tokens),
            arrival_ns=arrival_ns,
            echo="" if request.exclude_input_in_output else decode(self.tokenizer, prompt_ids),
        )
        with self._changed:
            if self._failure or self._is_closing:
                raise ServerError(self._failure or "the engine is closed")
            self._scheduler.add(queued)
            self._changed.notify()
        return RequestHandle(queued, self._wake)

    def stats(self) -> EngineStats:
        with self._changed:
            running = self._scheduler.running
            return EngineStats(
                running=len(running),
                waiting=len(self._scheduler.waiting),
                free_slots=self._scheduler.max_batch_size - len(running),
                kv_tokens=sum(request.num_cached for request in running),
                kv_allocated_tokens=self._cache.allocated_tokens,
                kv_budget_tokens=self._scheduler.kv_budget_tokens,
                kv_bytes_per_token=self._kv_bytes_per_token,
            )

    def close(self) -> None:
        """Ends the thread; what runs or waits is cancelled."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _encode(self, request: GenerationRequest) -> list[int]:
        if not request.prompt:
            raise InputError("the prompt is empty")
        if len(request.prompt) > self.max_positions * self._longest_token:
            # Refused unread: encoding takes a second per megabyte, and other requests wait for it.
            raise InputError(
                f"the prompt has {len(request.prompt)} characters, the model has {self.max_positions} positions",
                hint="shorten the prompt",
            )
        # Chat templates write the first token out; the tokenizer must not put a second one before it.
        bos = self.tokenizer.bos_token
        add_special_tokens = not (bos and request.prompt.startswith(bos))
        with self._tokenizer_lock:
            prompt_ids: list[int] = self.tokenizer.encode(request.prompt, add_special_tokens=add_special_tokens)
        length = len(prompt_ids) + request.max_tokens
        if not prompt_ids:
            raise InputError("the prompt has no token")
        if max(prompt_ids) >= self.num_vocab:
            raise InputError(f"the tokenizer gives token {max(prompt_ids)}, the model has {self.num_vocab}")
        if length > self.max_positions:
            raise InputError(
                f"{len(prompt_ids)} prompt tokens + max_tokens {request.max_tokens} = {length}, "
                f"the model has {self.max_positions} positions",
                hint="ask for fewer tokens, or shorten the prompt",
            )
        if not self._scheduler.fits_alone(length):
            raise InputError(
                f"{len(prompt_ids)} prompt tokens + max_tokens {request.max_tokens} = {length}, "
                f"the KV cache holds {self._scheduler.kv_budget_tokens}",
                hint=f"one token takes {self._kv_bytes_per_token} bytes; serve with a larger kv_cache_bytes",
            )
        return prompt_ids

    # The engine's thread from here on.

    def _run(self) -> None:
        torch.set_num_threads(self.num_threads)
        try:
            with torch.inference_mode():
                while self._has_work():
                    self._step()
        except Exception as error:
            log.exception("the engine has failed")
            with self._changed:
                self._failure = f"the engine has failed: {_described(error)}"
        with self._changed:
            self._is_closing = True
            left = [*self._scheduler.running, *self._scheduler.waiting]
            self._scheduler.running.clear()
            self._scheduler.waiting.clear()
        self._cache.release()
        for request in left:
            self._deliver(request, "error" if self._failure else "cancelled", error=self._failure)

    def _has_work(self) -> bool:
        """Waits for it; False when the engine is to end."""
        with self._changed:
            while not self._is_closing and not self._scheduler.running and not self._scheduler.waiting:
                self._cache.release()
                self._changed.wait()
            return not self._is_closing

    def _step(self) -> None:
        with self._changed:
            cancelled = self._scheduler.cancelled()
        for request in cancelled:
            self._finish(request, "cancelled")
        tokens_left = self.prefill_chunk
        while tokens_left:
            with self._changed:
                prefill = self._scheduler.next_prefill(tokens_left)
            if prefill is None:
                break
            tokens_left -= prefill.end - prefill.start
            self._prefill(prefill)
        if batch := self._scheduler.decoding():
            self._decode(batch)

    def _prefill(self, prefill: Prefill[_Request]) -> None:
        request = prefill.generation
        request.first_scheduled_ns = request.first_scheduled_ns or time.time_ns()
        try:
            tokens = torch.tensor([request.prompt_ids[prefill.start : prefill.end]])  # (1, tokens)
            positions = torch.arange(prefill.start, prefill.end)[None]  # (1, tokens)
            logits = self._forward(tokens, positions, first_row=prefill.row, length=prefill.end)
            request.num_cached = prefill.end
            draws = sample(logits, [request.sampler]) if request.is_prefilled else []
        except Exception as error:
            self._fail([request], error)
            return
        for draw in draws:
            self._accept(request, draw)

    def _decode(self, batch: Sequence[_Request]) -> None:
        try:
            tokens = torch.tensor([[request.output_ids[-1]] for request in batch])  # (rows, 1)
            lengths = [request.num_cached for request in batch]
            logits = self._forward(tokens, torch.tensor(lengths)[:, None], first_row=0, length=max(lengths) + 1)
            for request in batch:
                request.num_cached += 1
            draws = sample(logits, [request.sampler for request in batch])
        except Exception as error:
            self._fail(batch, error)
            return
        for request, draw in zip(batch, draws, strict=True):
            self._accept(request, draw)

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor, *, first_row: int, length: int) -> torch.Tensor:
        running = self._scheduler.running
        self._cache.reserve(len(running), max(length, *(request.num_cached for request in running)))
        return forward(self.model, self._cache, tokens, positions, first_row=first_row, length=length)

    def _accept(self, request: _Request, draw: Draw | None) -> None:
        if draw is None:
            self._finish(request, "error", error="the model gave logits that are not numbers")
            return
        request.output_ids.append(draw.token)
        request.last_token_ns = time.time_ns()
        request.first_token_ns = request.first_token_ns or request.last_token_ns
        reason = None
        try:
            if draw.token == request.end_id:
                text, reason = "", "stop"
            else:
                text = request.text.feed(draw.token)
                if len(request.output_ids) == request.max_tokens:
                    reason = "length"
                if request.text.is_stopped:
                    reason = "stop"
        except Exception as error:
            self._fail([request], error)
            return
        if reason:
            self._finish(request, reason, text=text, draw=draw)
        else:
            self._deliver(request, None, text=text, draw=draw)

    def _fail(self, requests: Sequence[_Request], error: Exception) -> None:
        log.error("%d request(s) failed", len(requests), exc_info=error)
        for request in requests:
            self._finish(request, "error", error=_described(error))
        self._check_device()

    def _check_device(self) -> None:
        """A device that has failed for good, as CUDA has after an assert, fails here again, outside any request."""
        torch.zeros(1, device=self.model.device).sum().item()

    def _finish(
        self, request: _Request, reason: str, *, text: str = "", draw: Draw | None = None, error: str | None = None
    ) -> None:
        """Frees the request's row, then says so."""
        with self._changed:
            row = self._scheduler.running.index(request) if request in self._scheduler.running else None
            moves = self._scheduler.remove(request)
        if row is not None:
            self._cache.clear(row)
        for move in moves:
            self._cache.move(move.source, move.target, move.length)
        self._deliver(request, reason, text=text, draw=draw, error=error)

    def _deliver(
        self,
        request: _Request,
        reason: str | None,
        *,
        text: str = "",
        draw: Draw | None = None,
        error: str | None = None,
    ) -> None:
        if reason and reason != "error":
            try:
                text += request.text.flush()
            except Exception as failure:
                log.exception("a request failed at its end")
                reason, error = "error", _described(failure)
        text, request.echo = request.echo + text, ""
        chunk = GenerationChunk(
            text=text,
            token_ids=(draw.token,) if draw else (),
            log_probs=(draw.log_prob,) if draw and draw.log_prob is not None else (),
            num_input_tokens=len(request.prompt_ids),
            num_output_tokens=len(request.output_ids),
            arrival_ns=request.arrival_ns,
            first_scheduled_ns=request.first_scheduled_ns,
            first_token_ns=request.first_token_ns,
            last_token_ns=request.last_token_ns if reason else 0,
            finish_reason=reason,
            error=error,
        )
        try:
            request.on_chunk(chunk)
        except Exception:
            log.exception("on_chunk failed; its request is cancelled")
            request.is_cancelled = True


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _default_kv_bytes(model: PreTrainedModel, kv_bytes_per_token: int) -> int:
    """On CUDA it leaves room for what attention makes of one layer's cache: keys and values for every query head."""
    if model.device.type != "cuda":
        return CPU_KV_BYTES
    config = model.config.get_text_config()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    repeated = 2 * config.num_attention_heads * head_size * model.dtype.itemsize  # of one layer, per token
    free, _ = torch.cuda.mem_get_info(model.device)
    return int(free * CUDA_KV_SHARE * kv_bytes_per_token / (kv_bytes_per_token + repeated))
