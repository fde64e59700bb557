"""Time to first token under load: requests arrive, wait, are prefilled and decoded, step by step.

Continuous batching as TensorRT-LLM and vLLM do it: every step decodes one token of all running sequences and prefills as many
waiting prompts as fit into `max_num_tokens` (the last one in chunks); a prompt is admitted when the KV cache has room.
Between arrivals and completions all steps are alike, so the simulation jumps from one event to the next: its cost grows with
the number of requests, not with their tokens. Knows seconds; no model and no GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Served:
    """Seconds, one per request, in order of arrival."""

    ttft: Floats
    tpot: Floats
    duration_s: float

    def percentile(self, share: float) -> float:
        return float(np.percentile(self.ttft, share))


def lengths(mean_or_max: int, spread: float, num_requests: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Uniform in [(1 - spread) x, x], as the public benchmark scripts draw them."""
    low = max(int(round((1 - spread) * mean_or_max)), 1)
    return rng.integers(low, max(mean_or_max, low) + 1, num_requests)


def simulate(
    step_s: Callable[[int], float],
    prompt_s: Callable[[float], float],
    isl: NDArray[np.int64],
    osl: NDArray[np.int64],
    *,
    concurrency: int | None = None,
    arrivals_s: Floats | None = None,
    max_batch: int,
    max_num_tokens: int = 8192,
) -> Served:
    """A closed loop of `concurrency` clients, each sending its next request when the last has ended, or given arrival times.

    `step_s(batch)` is a decode step, `prompt_s(tokens)` what so many prompt tokens add to it.
    """
    num_requests = len(isl)
    arrived, first, ended = np.zeros(num_requests), np.zeros(num_requests), np.zeros(num_requests)
    waiting: deque[int] = deque()
    running: list[tuple[int, int]] = []  # (step at which it ends, request), a heap
    upcoming = 0  # the next request that has not arrived
    now, step = 0.0, 0
    if concurrency is not None:
        waiting.extend(range(min(concurrency, num_requests)))
        upcoming = len(waiting)
    left = 0.0  # prompt tokens of waiting[0] that earlier steps have not done
    while waiting or running or (arrivals_s is not None and upcoming < num_requests):
        if arrivals_s is not None:
            if not waiting and not running:
                now = max(now, float(arrivals_s[upcoming]))
            while upcoming < num_requests and arrivals_s[upcoming] <= now:
                arrived[upcoming] = arrivals_s[upcoming]
                waiting.append(upcoming)
                upcoming += 1
        budget, tokens = float(max_num_tokens), 0.0
        started: list[int] = []
        while waiting and budget > 0 and len(running) + len(started) < max_batch:
            head = left or float(isl[waiting[0]])
            taken = min(head, budget)
            budget -= taken
            tokens += taken
            left = head - taken
            if left > 0:
                break
            started.append(waiting.popleft())
        batch, steps = len(running), 1
        duration = (step_s(batch) if batch else 0.0) + (prompt_s(tokens) if tokens else 0.0)
        if not tokens:  # all alike until somebody ends or arrives
            steps = running[0][0] - step
            if arrivals_s is not None and upcoming < num_requests:
                steps = min(steps, max(int((arrivals_s[upcoming] - now) / duration) + 1, 1))
        now += steps * duration
        step += steps
        for request in started:
            first[request] = now
            heappush(running, (step + int(osl[request]) - 1, request))
        while running and running[0][0] <= step:
            _, request = heappop(running)
            ended[request] = now
            if concurrency is not None and upcoming < num_requests:
                arrived[upcoming] = now
                waiting.append(upcoming)
                upcoming += 1
    return Served(
        ttft=first - arrived,
        tpot=(ended - first) / np.maximum(osl - 1, 1),
        duration_s=now,
    )


def poisson(rate: float, num_requests: int, rng: np.random.Generator) -> Floats:
    return np.cumsum(rng.exponential(1 / rate, num_requests))
