"""One generation request and the chunks that answer it: the border between a server front and the engine behind it."""

from __future__ import annotations

from dataclasses import dataclass

from tkit.errors import InputError

# How the message of a refusal begins, by what has to change: the request, or the moment. The errors of Triton's streams
# have no code that could say so.
INVALID_REQUEST, QUEUE_FULL = "invalid request", "queue full"
MAX_STOP_WORDS = 128  # looked for after every token: a hundred thousand took 0.1 s of each step, from everybody


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """Names and meanings follow TensorRT-LLM's Triton `ensemble`. `temperature` 0 or `top_k` 1 is greedy."""

    prompt: str
    max_tokens: int
    min_tokens: int = 0  # end-of-sequence and stop words are ignored before this many tokens
    temperature: float = 1.0
    top_k: int = 0  # 0 = no limit
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_words: tuple[str, ...] = ()
    end_id: int | None = None  # None = the tokenizer's end of sequence
    exclude_input_in_output: bool = True
    return_log_probs: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.max_tokens < 1:
            problems.append(f"max_tokens is {self.max_tokens}, expected at least 1")
        if not 0 <= self.min_tokens <= max(self.max_tokens, 0):
            problems.append(f"min_tokens is {self.min_tokens}, expected 0 to max_tokens ({self.max_tokens})")
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature is {self.temperature}, expected 0 or more")
        if self.top_k < 0:
            problems.append(f"top_k is {self.top_k}, expected 0 (no limit) or more")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}, expected more than 0, at most 1")
        if not self.repetition_penalty > 0:
            problems.append(f"repetition_penalty is {self.repetition_penalty}, expected more than 0")
        if len(self.stop_words) > MAX_STOP_WORDS:
            problems.append(f"stop_words holds {len(self.stop_words)} words, at most {MAX_STOP_WORDS} are looked for")
        if any(not word for word in self.stop_words):
            problems.append("stop_words holds an empty word")
        if problems:
            raise InputError(INVALID_REQUEST, problems=problems)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What an engine is busy with now."""

    running: int
    waiting: int
    free_slots: int
    kv_tokens: int  # stored
    kv_allocated_tokens: int  # positions there is memory for
    kv_budget_tokens: int  # positions there may ever be memory for
    kv_bytes_per_token: int


@dataclass(frozen=True, kw_only=True)
class GenerationChunk:
    """What one step added. Text deltas concatenate to the whole answer; none ends inside a UTF-8 character.

    Times are nanoseconds of the wall clock, as TensorRT-LLM's perf metrics give them; 0 until they have happened.
    `finish_reason` is set on the last chunk only: "length", "stop", "cancelled" or "error".
    """

    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...] = ()
    num_input_tokens: int
    num_output_tokens: int  # so far
    arrival_ns: int
    first_scheduled_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0
    finish_reason: str | None = None
    error: str | None = None
