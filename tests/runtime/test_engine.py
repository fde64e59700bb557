from __future__ import annotations

import copy
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from tkit.errors import InputError, ServerError
from tkit.runtime.engine import Engine, QueueFull, RequestHandle
from tkit.specs.generation import GenerationChunk, GenerationRequest

TIMEOUT_S = 60


class Answer:
    """Collects the chunks of one request. `at` maps a number of tokens to what to do when they are there."""

    def __init__(self, at: dict[int, Callable[[Answer], None]] | None = None):
        self.chunks: list[GenerationChunk] = []
        self.handle: RequestHandle | None = None
        self.at = dict(at or {})
        self.ended = threading.Event()

    def __call__(self, chunk: GenerationChunk) -> None:
        self.chunks.append(chunk)
        if action := self.at.pop(chunk.num_output_tokens, None):
            action(self)
        if chunk.finish_reason:
            self.ended.set()

    def wait(self) -> Answer:
        assert self.ended.wait(TIMEOUT_S), f"no last chunk after {len(self.chunks)} chunks"
        assert [chunk.finish_reason is None for chunk in self.chunks] == [True] * (len(self.chunks) - 1) + [False]
        return self

    @property
    def last(self) -> GenerationChunk:
        return self.chunks[-1]

    @property
    def reason(self) -> str | None:
        return self.chunks[-1].finish_reason if self.chunks else None

    @property
    def token_ids(self) -> list[int]:
        return [token_id for chunk in self.chunks for token_id in chunk.token_ids]

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)


def request(prompt: str = "The king said", max_tokens: int = 10, **parameters: Any) -> GenerationRequest:
    parameters.setdefault("temperature", 0.0)
    parameters.setdefault("end_id", -1)
    return GenerationRequest(prompt=prompt, max_tokens=max_tokens, **parameters)


def submit(engine: Engine, *requests: GenerationRequest, **options: Any) -> list[Answer]:
    answers = []
    for each in requests:
        answers.append(answer := Answer(**options))
        answer.handle = engine.submit(each, answer)
    return answers


def run(engine: Engine, *requests: GenerationRequest, **options: Any) -> list[Answer]:
    return [answer.wait() for answer in submit(engine, *requests, **options)]


@torch.inference_mode()
def generated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, max_tokens: int, end_id: int | None = None
) -> list[int]:
    """What transformers generates greedily, alone."""
    prompt_ids = torch.tensor([tokenizer.encode(prompt)])
    output = model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=end_id,
        pad_token_id=0,
    )
    return output[0, prompt_ids.shape[1] :].tolist()


@pytest.fixture
def engine(llama: PreTrainedModel, byte_level: PreTrainedTokenizerFast) -> Iterator[Engine]:
    with Engine(llama, byte_level) as engine:
        yield engine


def decoded(tokenizer: PreTrainedTokenizerFast, token_ids: list[int]) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=True)


def mixed_requests(corpus: list[str], num: int) -> list[GenerationRequest]:
    """Prompts of 4 to 300 tokens, answers of 1 to 40, in no order."""
    pick = random.Random(0)
    text = " ".join(corpus)
    return [request(text[pick.randrange(20) :][: pick.randrange(3, 250)], pick.randrange(1, 41)) for _ in range(num)]


@pytest.fixture(scope="module")
def expected(
    llama: PreTrainedModel, byte_level: PreTrainedTokenizerFast, corpus: list[str]
) -> list[tuple[GenerationRequest, list[int]]]:
    """32 mixed requests and transformers' answers."""
    return [
        (each, generated(llama, byte_level, each.prompt, each.max_tokens)) for each in mixed_requests(corpus, 32)
    ]  # fmt: skip


@pytest.mark.parametrize("num", [1, 16, 32])
@pytest.mark.parametrize("prefill_chunk", [512, 37])
def test_greedy_tokens_are_transformers_whatever_runs_beside(
    llama: PreTrainedModel,
    byte_level: PreTrainedTokenizerFast,
    expected: list[tuple[GenerationRequest, list[int]]],
    num: int,
    prefill_chunk: int,
) -> None:
    with Engine(llama, byte_level, prefill_chunk=prefill_chunk) as engine:
        for start in range(0, len(expected), num):
            some = expected[start : start + num]
            answers = run(engine, *(each for each, _ in some))
            for answer, (each, token_ids) in zip(answers, some, strict=True):
                assert answer.token_ids == token_ids
                assert (answer.reason, answer.last.num_output_tokens) == ("length", each.max_tokens)


def test_requests_that_come_and_go_leave_the_others_tokens_alone(
    llama: PreTrainedModel, byte_level: PreTrainedTokenizerFast, expected: list[tuple[GenerationRequest, list[int]]]
) -> None:
    """Fewer rows than requests, cancels at random, a cache too small for all: rows move, prompts wait, memory is redone."""
    pick = random.Random(1)
    bytes_per_token = 2 * 3 * 2 * 16 * 4
    with Engine(llama, byte_level, max_batch_size=7, prefill_chunk=50, kv_cache_bytes=1200 * bytes_per_token) as engine:
        answers, allocated = [], []
        for each, _ in expected * 2:
            cancel_at = pick.randrange(1, 80)
            actions: dict[int, Callable[[Answer], None]] = {
                cancel_at: lambda answer: answer.handle.cancel(),  # type: ignore[union-attr]
                5: lambda _: allocated.append(engine.stats().kv_allocated_tokens),
            }
            answers.append(answer := Answer(at=actions))
            answer.handle = engine.submit(each, answer)
        for answer, (each, token_ids) in zip(answers, expected * 2, strict=True):
            answer.wait()
            if answer.reason == "cancelled":
                assert len(answer.token_ids) < each.max_tokens
                assert answer.token_ids == token_ids[: len(answer.token_ids)]
            else:
                assert (answer.token_ids, answer.reason) == (token_ids, "length")
        reasons = [answer.reason for answer in answers]
        assert min(reasons.count("cancelled"), reasons.count("length")) > 10
        assert 0 < max(allocated) <= 1200
        assert engine.stats().kv_budget_tokens == 1200


@pytest.mark.parametrize("joins_at", [240, 265])
def test_a_request_that_joins_when_the_cache_is_nearly_full_leaves_the_other_its_tokens(
    llama: PreTrainedModel, byte_level: PreTrainedTokenizerFast, corpus: list[str], joins_at: int
) -> None:
    """The cache must hold both, not only what the joining one has read so far, nor only what decodes by then."""
    first, second = request("T", 300), request(" ".join(corpus), 10)
    num_prompt = len(byte_level.encode(second.prompt))
    assert 100 < num_prompt <= 300 and len(byte_level.encode(first.prompt)) < 10
    joined = Answer()
    with Engine(llama, byte_level, prefill_chunk=4, kv_cache_bytes=2 * 384 * 768) as engine:
        (answer,) = run(engine, first, at={joins_at: lambda _: engine.submit(second, joined)})
        joined.wait()
    assert answer.token_ids == generated(llama, byte_level, first.prompt, 300)
    assert joined.token_ids == generated(llama, byte_level, second.prompt, 10)


FAMILIES = {
    "sliding window": (MistralConfig, {"sliding_window": 16}),
    "both kinds of layers": (
        Qwen3Config,
        {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "use_sliding_window": True,
            "sliding_window": 9,
        },
    ),
    "soft-capped, eager": (Gemma2Config, {"sliding_window": 16, "attn_implementation": "eager"}),
    "learned positions": (GPT2Config, {"n_positions": 1024}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_with_other_masks_and_positions(
    make_model: Callable[..., PreTrainedModel], byte_level: PreTrainedTokenizerFast, corpus: list[str], name: str
) -> None:
    config_class, sizes = FAMILIES[name]
    model = make_model(config_class, **sizes)
    requests = [request((" ".join(corpus) * 9)[:length], 12) for length in (5, 90, 1800, 40, 3)]
    assert len(byte_level.encode(requests[2].prompt)) > 512, "more than torch's CPU attention takes at a time"
    with Engine(model, byte_level, prefill_chunk=128) as engine:
        for answer, each in zip(run(engine, *requests), requests, strict=True):
            assert answer.token_ids == generated(model, byte_level, each.prompt, each.max_tokens)


def test_text_is_what_the_tokens_say_behind_the_prompt(
    tokenizer: PreTrainedTokenizerFast, make_model: Callable[..., PreTrainedModel]
) -> None:
    model = make_model(vocab_size=len(tokenizer))
    if bytes_ := [index for token, index in tokenizer.get_vocab().items() if token.startswith("<0x")]:
        # Runs of byte tokens that are not UTF-8 differ, and have their own tests.
        model.lm_head.register_forward_hook(
            lambda module, arguments, logits: logits.index_fill(-1, torch.tensor(bytes_), -torch.inf)
        )
    prompt_ids = tokenizer.encode("The king said")
    with Engine(model, tokenizer) as engine:
        requests = [request(max_tokens=60, temperature=2.0, seed=seed) for seed in range(8)]
        for answer in run(engine, *requests):
            whole = decoded(tokenizer, [*prompt_ids, *answer.token_ids])
            assert answer.text == whole[len(decoded(tokenizer, prompt_ids)) :]
        (echo,) = run(engine, request(max_tokens=60, exclude_input_in_output=False))
        assert echo.text == decoded(tokenizer, [*prompt_ids, *echo.token_ids])


def test_end_of_sequence_ends_the_answer_and_is_not_in_its_text(
    engine: Engine, llama: PreTrainedModel, byte_level: PreTrainedTokenizerFast
) -> None:
    tokens = generated(llama, byte_level, "The king said", 30)
    end_id = next(token for index, token in enumerate(tokens) if index > 5 and token not in tokens[:index])
    (answer,) = run(engine, request(max_tokens=30, end_id=end_id))
    assert answer.token_ids == generated(llama, byte_level, "The king said", 30, end_id)
    assert (answer.reason, answer.token_ids[-1]) == ("stop", end_id)
    assert answer.text == decoded(byte_level, tokens[: len(answer.token_ids) - 1])
    (longer,) = run(engine, request(max_tokens=30, min_tokens=28, end_id=end_id))
    assert len(longer.token_ids) >= 28 and end_id not in longer.token_ids[:28]


def test_the_tokenizers_end_of_sequence_counts_unless_it_is_to_be_ignored(
    llama: PreTrainedModel, byte_level: PreTrainedTokenizerFast
) -> None:
    tokens = generated(llama, byte_level, "The king said", 10)
    end_id = next(token for token in tokens if token != tokens[0])
    tokenizer = copy.deepcopy(byte_level)
    tokenizer.eos_token = byte_level.convert_ids_to_tokens(end_id)
    with Engine(llama, tokenizer) as engine:
        stopped, ignored = run(engine, request(end_id=None), request(end_id=-1))
    assert (stopped.reason, stopped.token_ids) == ("stop", tokens[: tokens.index(end_id) + 1])
    assert (ignored.reason, len(ignored.token_ids)) == ("length", 10)


def test_a_stop_word_ends_the_answer_before_itself(
    engine: Engine, llama: PreTrainedModel, byte_level: PreTrainedTokenizerFast
) -> None:
    whole = decoded(byte_level, generated(llama, byte_level, "The king said", 30))
    middle = len(whole) // 2
    word = whole[middle : middle + 6]
    (answer,) = run(engine, request(max_tokens=30, stop_words=("not in it", word)))
    assert (answer.reason, answer.text) == ("stop", whole[: whole.find(word)])
    assert len(answer.token_ids) < 30


def test_the_same_seed_gives_the_same_answer_whatever_runs_beside(engine: Engine) -> None:
    mine = request(max_tokens=30, temperature=1.5, top_k=50, top_p=0.95, repetition_penalty=1.2, seed=7)
    (alone,) = run(engine, mine)
    beside = [request("x" * (1 + 5 * seed), 25, temperature=1.0, seed=seed) for seed in range(20)]
    answers = run(engine, *beside[:10], mine, *beside[10:])
    assert answers[10].token_ids == alone.token_ids
    (other,) = run(engine, request(max_tokens=30, temperature=1.5, seed=8))
    assert other.token_ids != alone.token_ids


def test_log_probs_come_with_their_tokens_when_asked_for(
    engine: Engine, llama: PreTrainedModel, byte_level: PreTrainedTokenizerFast
) -> None:
    asked, not_asked = run(engine, request(return_log_probs=True, temperature=0.7, top_k=3), request())
    prompt_ids = byte_level.encode("The king said")
    with torch.inference_mode():
        logits = llama(torch.tensor([[*prompt_ids, *asked.token_ids]])).logits[0].log_softmax(-1)
    expected = [logits[len(prompt_ids) - 1 + step, token].item() for step, token in enumerate(asked.token_ids)]
    log_probs = [log_prob for chunk in asked.chunks for log_prob in chunk.log_probs]
    assert log_probs == pytest.approx(expected, abs=1e-4)
    assert not any(chunk.log_probs for chunk in not_asked.chunks)


def test_times_and_counts_tell_what_happened(engine: Engine, byte_level: PreTrainedTokenizerFast) -> None:
    before = time.time_ns()
    (answer,) = run(engine, request(max_tokens=5))
    last = answer.last
    assert before <= last.arrival_ns <= last.first_scheduled_ns <= last.first_token_ns < last.last_token_ns
    assert last.last_token_ns <= time.time_ns()
    assert [chunk.num_output_tokens for chunk in answer.chunks] == [1, 2, 3, 4, 5]
    assert [chunk.last_token_ns for chunk in answer.chunks[:-1]] == [0] * 4
    assert {chunk.num_input_tokens for chunk in answer.chunks} == {len(byte_level.encode("The king said"))}


def test_a_prompt_that_writes_out_the_first_token_does_not_get_it_twice(
    engine: Engine, byte_level: PreTrainedTokenizerFast
) -> None:
    plain, written = run(engine, request("hello"), request("<s>hello"))
    assert plain.last.num_input_tokens == written.last.num_input_tokens == len(byte_level.encode("hello"))
    assert plain.token_ids == written.token_ids


def test_a_long_prompt_is_read_while_others_go_on(
    llama: PreTrainedModel, byte_level: PreTrainedTokenizerFast, corpus: list[str]
) -> None:
    long = request((" ".join(corpus) * 9)[:700], 1)
    num_pieces = -(-len(byte_level.encode(long.prompt)) // 32)
    order: list[str] = []
    with Engine(llama, byte_level, prefill_chunk=32) as engine:
        late = Answer(at={1: lambda _: order.append("late")})
        early = Answer(at={2: lambda _: engine.submit(long, late)})
        for step in range(3, 101):
            early.at[step] = lambda _: order.append("early")
        engine.submit(request(max_tokens=100), early)
        early.wait()
        late.wait()
    assert num_pieces > 5
    assert order.index("late") == num_pieces - 1


# Cancelling, refusing, failing, closing


def test_cancelling_ends_a_request_within_a_step_and_frees_its_row(engine: Engine) -> None:
    answer, other = run(engine, request(max_tokens=500), request(), at={3: lambda answer: answer.handle.cancel()})
    assert (answer.reason, len(answer.token_ids), answer.last.error) == ("cancelled", 3, None)
    assert answer.last.last_token_ns >= answer.last.first_token_ns > 0
    assert other.reason == "cancelled"
    answer.handle.cancel()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.free_slots, stats.kv_tokens) == (0, 0, 32, 0)


def test_a_waiting_request_can_be_cancelled(llama: PreTrainedModel, byte_level: PreTrainedTokenizerFast) -> None:
    with Engine(llama, byte_level, max_batch_size=1) as engine:
        first, second = submit(engine, request(max_tokens=900), request())
        second.handle.cancel()
        second.wait()
        assert (second.reason, second.token_ids, second.last.first_scheduled_ns) == ("cancelled", [], 0)
        assert first.reason is None
        first.handle.cancel()
        first.wait()


def test_a_full_queue_is_refused_and_has_room_later(
    llama: PreTrainedModel, byte_level: PreTrainedTokenizerFast
) -> None:
    with Engine(llama, byte_level, max_batch_size=1, max_queue_size=2) as engine:
        (running,) = submit(engine, request(max_tokens=900))
        while not engine.stats().kv_tokens:
            time.sleep(0.001)
        waiting = submit(engine, request(), request())
        with pytest.raises(QueueFull, match="2 requests wait and 1 run"):
            engine.submit(request(), Answer())
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.free_slots) == (1, 2, 0)
        running.handle.cancel()
        assert [answer.wait().reason for answer in waiting] == ["length", "length"]


@pytest.mark.parametrize(
    ("each", "message"),
    [
        (request(""), "the prompt is empty"),
        (request("x" * 1_000_000), "the prompt has 1000000 characters, the model has 1024 positions"),
        (request("hello", 1020), r"5 prompt tokens \+ max_tokens 1020 = 1025, the model has 1024 positions"),
        (request("hello", 508), r"5 prompt tokens \+ max_tokens 508 = 513, the KV cache holds 600\n.*768 bytes"),
    ],
)
def test_what_can_never_run_is_refused_at_once(
    llama: PreTrainedModel, byte_level: PreTrainedTokenizerFast, each: GenerationRequest, message: str
) -> None:
    with Engine(llama, byte_level, kv_cache_bytes=600 * 768) as engine:
        with pytest.raises(InputError, match=message):
            engine.submit(each, Answer())
        submit(engine, request("hello", 507))  # one token less is accepted


def test_a_prompt_with_tokens_the_model_does_not_know_is_refused(
    make_model: Callable[..., PreTrainedModel], byte_level: PreTrainedTokenizerFast
) -> None:
    with (
        Engine(make_model(vocab_size=100), byte_level) as engine,
        pytest.raises(InputError, match="the tokenizer gives token .*, the model has 100"),
    ):
        engine.submit(request(), Answer())


def test_invalid_sizes_are_listed(llama: PreTrainedModel, byte_level: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="max_batch_size is 0(.|\n)*prefill_chunk is -1"):
        Engine(llama, byte_level, max_batch_size=0, prefill_chunk=-1)


@pytest.fixture
def failing(llama: PreTrainedModel) -> Iterator[Callable[[Callable[[torch.Tensor], bool]], None]]:
    """failing(when): the model raises while `when` says so of its input (rows, tokens)."""
    hooks = []

    def fail(when: Callable[[torch.Tensor], bool]) -> None:
        def hook(module: torch.nn.Module, arguments: Any, named: dict[str, Any]) -> None:
            if when(named["input_ids"]):
                raise RuntimeError("no more memory")

        hooks.append(llama.register_forward_pre_hook(hook, with_kwargs=True))

    yield fail
    for hook in hooks:
        hook.remove()


Failing = Callable[[Callable[[torch.Tensor], bool]], None]


def test_a_prompt_that_fails_takes_no_other_request_with_it(
    engine: Engine, failing: Failing, byte_level: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    (bad_token,) = byte_level.encode("Z", add_special_tokens=False)
    good = request(max_tokens=20)
    (alone,) = run(engine, good)
    failing(lambda input_ids: bool((input_ids == bad_token).any()) and input_ids.shape[1] > 1)
    before, bad, after = run(engine, good, request("Zed"), good)
    assert (bad.reason, bad.last.error, bad.token_ids) == ("error", "RuntimeError: no more memory", [])
    assert before.token_ids == after.token_ids == alone.token_ids
    assert "no more memory" in caplog.text, "the operator sees where"


def test_a_step_that_fails_ends_the_requests_in_it_and_the_engine_goes_on(engine: Engine, failing: Failing) -> None:
    good = request(max_tokens=20)
    (alone,) = run(engine, good)
    calls = []
    failing(lambda input_ids: input_ids.shape == (3, 1) and not calls.append(1) and len(calls) == 2)
    together = run(engine, *[good] * 3)
    assert [answer.reason for answer in together] == ["error"] * 3
    assert all(answer.last.error == "RuntimeError: no more memory" for answer in together)
    assert run(engine, good)[0].token_ids == alone.token_ids
    assert engine.stats().free_slots == 32


def test_numbers_that_are_none_fail_their_request_and_do_not_stay_in_its_row(
    llama: PreTrainedModel, byte_level: PreTrainedTokenizerFast, make_model: Callable[..., PreTrainedModel]
) -> None:
    model = make_model()
    (bad_token,) = byte_level.encode("Z", add_special_tokens=False)
    model.model.embed_tokens.weight.data[bad_token] = float("nan")
    long, good = request("The king said to the people that he would go", 20), request(max_tokens=20)
    with Engine(model, byte_level) as engine:
        (alone,) = run(engine, good)
        # The last takes the row of the one that failed, and the first makes attention look beyond its end.
        first, bad, last = run(engine, long, request("Zed" * 30, 50), good)
        assert (bad.reason, bad.last.error) == ("error", "the model gave logits that are not numbers")
        assert (first.reason, last.reason) == ("length", "length")
        assert last.token_ids == alone.token_ids


def test_a_device_that_no_longer_answers_ends_everything_and_says_so(
    llama: PreTrainedModel,
    byte_level: PreTrainedTokenizerFast,
    failing: Failing,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def dead(self: Engine) -> None:
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(Engine, "_check_device", dead)
    failing(lambda input_ids: input_ids.shape == (2, 1))
    with Engine(llama, byte_level, max_batch_size=2) as engine:
        answers = run(engine, *[request(max_tokens=20)] * 4)
        assert [answer.reason for answer in answers] == ["error"] * 4
        assert answers[3].last.error == "the engine has failed: RuntimeError: device-side assert triggered"
        with pytest.raises(ServerError, match="device-side assert triggered"):
            engine.submit(request(), Answer())


def test_a_callback_that_raises_cancels_its_request_only(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    def broken(answer: Answer) -> None:
        raise OSError("the client has gone")

    (bad,) = submit(engine, request(max_tokens=200), at={2: broken})
    (good,) = run(engine, request(max_tokens=20))
    assert good.reason == "length"
    bad.wait()
    assert (bad.reason, len(bad.token_ids)) == ("cancelled", 2)
    assert "the client has gone" in caplog.text


def test_a_tokenizer_that_fails_fails_its_request_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tkit.runtime import text

    feed = text.TextStream.feed

    def broken(self: text.TextStream, token_id: int) -> str:
        if self.stop_words == ("bad",):
            raise UnicodeError("no such character")
        return feed(self, token_id)

    monkeypatch.setattr(text.TextStream, "feed", broken)
    bad, good = run(engine, request(stop_words=("bad",)), request())
    assert (bad.reason, bad.last.error) == ("error", "UnicodeError: no such character")
    assert good.reason == "length"


def test_closing_cancels_what_runs_and_waits_and_ends_the_thread(
    llama: PreTrainedModel, byte_level: PreTrainedTokenizerFast
) -> None:
    engine = Engine(llama, byte_level, max_batch_size=2)
    answers = submit(engine, *[request(max_tokens=900)] * 4)
    while not answers[0].chunks:
        time.sleep(0.001)
    engine.close()
    assert [answer.wait().reason for answer in answers] == ["cancelled"] * 4
    assert not any(thread.name == "tkit-engine" for thread in threading.enumerate())
    engine.close()
    with pytest.raises(ServerError, match="the engine is closed"):
        engine.submit(request(), Answer())


def test_closing_from_within_a_callback_does_not_wait_for_itself(
    llama: PreTrainedModel, byte_level: PreTrainedTokenizerFast
) -> None:
    engine = Engine(llama, byte_level)
    returned = []
    (answer,) = run(engine, request(max_tokens=900), at={2: lambda _: returned.append(engine.close())})
    assert (answer.reason, returned) == ("cancelled", [None])
    engine.close()


def test_memory_is_given_back_when_nothing_runs(engine: Engine) -> None:
    used = []
    run(engine, request(), at={5: lambda _: used.append(engine.stats())})
    assert used[0].kv_allocated_tokens == 128
    assert 0 < used[0].kv_tokens <= 128
    deadline = time.monotonic() + TIMEOUT_S
    while engine.stats().kv_allocated_tokens:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_its_thread_count_is_what_was_asked_for(llama: PreTrainedModel, byte_level: PreTrainedTokenizerFast) -> None:
    seen = []
    with Engine(llama, byte_level, num_threads=3) as engine:
        run(engine, request(), at={1: lambda _: seen.append(torch.get_num_threads())})
    torch.set_num_threads(1)
    assert seen == [3]


def test_a_built_engine_is_loaded_and_answers_as_its_source(
    make_llama: Callable[..., Path], tkit: Callable[..., Result], tmp_path: Path
) -> None:
    source = make_llama()
    built = tkit("build", source, "--tp", "2", "--quant", "none")
    assert built.exit_code == 0, built.stderr
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with Engine.load(tmp_path / built.stdout.splitlines()[-1], device="cpu", max_batch_size=4) as engine:
        (answer,) = run(engine, request(max_tokens=20))
        assert engine.stats().free_slots == 4
    assert answer.token_ids == generated(model, tokenizer, "The king said", 20)
