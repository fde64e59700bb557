"""What requests ask: lengths, what they have in common, and the same bytes in any process."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from tkit.errors import InputError
from tkit.loadgen.profiles import Shape, resolve_profile
from tkit.loadgen.prompts import CharacterPrompts, PromptMaker
from tkit.loadgen.workload import Workload, make_workload
from tkit.specs.recipe import SweepRecipe

PLACE = (8, 4, 1)
CONVERSATIONS: list[dict[str, Any]] = [
    {"conversations": [{"from": "human", "value": f" word{' ba' * i}"}, {"from": "gpt", "value": " word" * (i + 1)},
                       {"from": "human", "value": "more"}]}
    for i in range(20)
] + [
    {"conversations": [{"from": "gpt", "value": "unasked"}]},
    {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": " ce"},
                  {"role": "assistant", "content": " word word"}]},
    {"prompt": " di", "output_tokens": 7},
]  # fmt: skip
TRACE = [
    {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 3]},
    {"timestamp": 250, "input_length": 1500, "output_length": 6, "hash_ids": [1, 2, 4]},
    {"timestamp": 250, "input_length": 600, "output_length": 7, "hash_ids": [9, 2]},
    {"timestamp": 4000, "input_length": 1100, "output_length": 8, "hash_ids": [1, 2, 3]},
]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def workload(
    tokenizer_dir: Path | None, dataset: Path | None = None, *, seed: int = 0, room: int | None = None
) -> Workload:
    return make_workload((Shape(isl=40, osl=8),), dataset, tokenizer_dir, seed, room)


def ids(tokenizer_dir: Path, text: str) -> list[int]:
    return Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).encode(text).ids


def num_common(first: list[int], second: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_a_share_of_the_prompt_is_common(tokenizer_dir: Path, share: float) -> None:
    """All prompts have the exact length; any two are equal so far, and no further."""
    maker = PromptMaker(tokenizer_dir, 0)
    shape = Shape(isl=200, osl=8, prefix_share=share)
    prompts = [ids(tokenizer_dir, maker.ask(shape, place, i, 0).prompt) for place in ((1,), (2,)) for i in range(10)]
    assert {len(prompt) for prompt in prompts} == {200}
    common = [num_common(prompts[0], prompt) for prompt in prompts[1:]]
    assert min(common) >= round(share * 199)
    assert max(common) <= round(share * 199) + 4


def test_lengths_are_spread_evenly(tokenizer_dir: Path) -> None:
    maker = PromptMaker(tokenizer_dir, 0)
    asks = [maker.ask(Shape(isl=50, osl=100, spread=0.8), PLACE, i, 0) for i in range(1000)]
    isl, osl = np.array([ask.isl for ask in asks]), np.array([ask.osl for ask in asks])
    assert (isl.min(), isl.max(), osl.min(), osl.max()) == (40, 50, 80, 100)
    assert isl.mean() == pytest.approx(45, abs=0.4) and osl.mean() == pytest.approx(90, abs=0.8)
    assert abs(np.corrcoef(isl, osl)[0, 1]) < 0.1
    assert all(len(ids(tokenizer_dir, ask.prompt)) == ask.isl for ask in asks[:20])


def test_characters_need_no_tokenizer() -> None:
    prompts = CharacterPrompts(0)
    for num_characters in (1, 2, 7, 512):
        text = prompts.prompt(num_characters, *PLACE, 0)
        assert len(text) == num_characters and text == text.strip() and text.isascii()
    asks = [prompts.ask(Shape(isl=400, osl=8, unit="characters", prefix_share=0.25), PLACE, i, 0) for i in range(50)]
    assert len({ask.prompt[100:116] for ask in asks}) == 50
    assert {ask.prompt[:100] for ask in asks} == {asks[0].prompt[:100]}
    assert {(ask.isl, ask.osl) for ask in asks} == {(None, 8)}
    assert workload(None).source.token_ends is None


def test_conversations(tokenizer_dir: Path, tmp_path: Path) -> None:
    """The first question and as many tokens as its answer has; each once before any comes again."""
    path = write_lines(tmp_path / "share gpt.jsonl", CONVERSATIONS)
    made = workload(tokenizer_dir, path)
    asks = [made.source.ask(made.shapes[0], PLACE, i, 0) for i in range(44)]
    expected = {(f" word{' ba' * i}", i + 1) for i in range(20)} | {(" ce", 2), (" di", 7)}
    assert {(ask.prompt, ask.osl) for ask in asks[:22]} == expected
    assert {(ask.prompt, ask.osl) for ask in asks[22:]} == expected
    assert [ask.prompt for ask in asks[:22]] != [ask.prompt for ask in asks[22:]]
    assert all(ask.isl == len(ids(tokenizer_dir, ask.prompt)) for ask in asks)
    assert made.source.ask(made.shapes[0], PLACE, 0, 3).isl == (asks[0].isl or 0) + 3
    assert made.identity["dataset"] == {
        "name": "share gpt", "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "requests": 22, "left_out": 1,
    }  # fmt: skip
    assert (str(made.shapes[0]), made.shapes[0].osl) == ("share_gpt", round(np.mean([osl for _, osl in expected])))
    small = workload(tokenizer_dir, path, room=12)
    assert small.identity["dataset"]["left_out"] > 10
    as_array = tmp_path / "array.json"
    as_array.write_text(json.dumps(CONVERSATIONS))
    assert workload(tokenizer_dir, as_array).identity["dataset"]["requests"] == 22


def test_conversations_without_a_tokenizer(tmp_path: Path) -> None:
    told = write_lines(tmp_path / "told.jsonl", [{"prompt": "abcd", "output_tokens": 3}])
    made = workload(None, told)
    ask = made.source.ask(made.shapes[0], PLACE, 0, 0)
    assert (ask.prompt, ask.isl, ask.osl) == ("abcd", None, 3)
    assert (made.shapes[0].isl, made.shapes[0].unit) == (4, "characters")
    with pytest.raises(InputError, match="how many tokens its answers have takes a tokenizer"):
        workload(None, write_lines(tmp_path / "untold.jsonl", CONVERSATIONS))


def test_a_trace_has_its_lengths_its_times_and_its_common_blocks(tokenizer_dir: Path, tmp_path: Path) -> None:
    made = workload(tokenizer_dir, write_lines(tmp_path / "trace.jsonl", TRACE))
    assert made.timestamps == (0.0, 0.25, 0.25, 4.0)
    asks = [made.source.ask(made.shapes[0], PLACE, i, 0) for i in range(8)]
    tokens = [ids(tokenizer_dir, ask.prompt) for ask in asks]
    assert [(len(prompt), ask.isl, ask.osl) for prompt, ask in zip(tokens, asks, strict=True)] == [
        (entry["input_length"], entry["input_length"], entry["output_length"]) for entry in TRACE * 2
    ]
    assert 1018 <= num_common(tokens[0], tokens[1]) <= 1030, "two blocks of 512, but for tokens that merge between them"
    assert num_common(tokens[0], tokens[2]) < 6
    assert asks[0].prompt == asks[3].prompt
    elsewhere = ids(tokenizer_dir, made.source.ask(made.shapes[0], (8, 4, 2), 0, 0).prompt)
    assert num_common(tokens[0], elsewhere) < 6, "another repeat finds nothing in a prefix cache"
    assert workload(tokenizer_dir, tmp_path / "trace.jsonl", room=1200).timestamps == (0.0, 0.25, 4.0)


def test_entries_of_a_trace_without_hash_ids_have_nothing_in_common(tokenizer_dir: Path, tmp_path: Path) -> None:
    bare = [{key: value for key, value in entry.items() if key != "hash_ids"} for entry in TRACE]
    made = workload(tokenizer_dir, write_lines(tmp_path / "bare.jsonl", bare))
    tokens = [ids(tokenizer_dir, made.source.ask(made.shapes[0], PLACE, i, 0).prompt) for i in range(4)]
    assert [len(prompt) for prompt in tokens] == [1100, 1500, 600, 1100]
    assert max(num_common(tokens[i], tokens[j]) for i in range(4) for j in range(i)) < 6


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["{"], "entry 1: not JSON: "),
        ([json.dumps({"text": "x"})], "entry 1: no 'messages'"),
        (["[1]"], "entry 1: "),
        ([json.dumps({"prompt": "x"})], "entry 1: a prompt with neither completion nor output_tokens"),
        ([json.dumps({"prompt": "x", "output_tokens": 0})], "entry 1: output_tokens is 0, expected a whole number"),
        (
            [json.dumps(TRACE[0]), json.dumps({"prompt": "x", "completion": "y"})],
            "1 entries of a trace and 1 conversations",
        ),
        ([json.dumps(TRACE[3]), json.dumps(TRACE[0])], "entry 2: earlier than the one before"),
        (
            [json.dumps(TRACE[0] | {"hash_ids": [1]})],
            "entry 1: 1 hash_ids for 1100 tokens, expected 3 of 512 tokens each",
        ),
        ([], "no request in it"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, tokenizer_dir: Path, lines: list[str], problem: str) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(InputError) as caught:
        workload(tokenizer_dir, path)
    assert any(line.startswith(problem) for line in caught.value.problems), caught.value.problems


def test_the_first_of_many_problems_are_told(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text("{\n" * 50)
    with pytest.raises(InputError) as caught:
        workload(None, path)
    assert (len(caught.value.problems), caught.value.problems[-1]) == (6, "and 45 more")


SENT = """
import dataclasses, hashlib, sys
from pathlib import Path
from tkit.loadgen.profiles import Shape, find_profile
from tkit.loadgen.point import Place
from tkit.loadgen.session import Session
from tkit.loadgen.workload import make_workload
shapes = (Shape(isl=40, osl=8, prefix_share=0.5, spread=0.5), Shape(isl=24, osl=4))
for dataset in (None, *map(Path, sys.argv[2:])):
    for seed in (3, 4):
        made = make_workload(shapes, dataset, Path(sys.argv[1]), seed, None)
        profile = dataclasses.replace(find_profile("quick"), shapes=made.shapes)
        session = Session("openai", "127.0.0.1:9", "model", prompts=made.source, profile=profile, seed=seed)
        digest = hashlib.sha256()
        for shape in made.shapes:
            session._e2e_s[shape, 0] = 0.1
            for place in (Place(shape=shape, concurrency=4, repeat=1), Place(shape=shape, rate=3.5, repeat=2)):
                for exchange in (session._closed(place) if place.rate is None else session._open(place))[1]:
                    digest.update(exchange.request + str(exchange.scheduled_ns).encode())
        print(digest.hexdigest())
"""


def test_equal_seeds_send_equal_bytes_from_two_processes(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Every byte of every request of closed and open loops, and when it is due: synthetic, conversations, trace."""
    files = [write_lines(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate((CONVERSATIONS, TRACE))]

    def digests(hash_seed: str) -> list[str]:
        command = [sys.executable, "-c", SENT, str(tokenizer_dir), *map(str, files)]
        environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONHASHSEED": hash_seed}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()

    first = digests("1")
    assert len(set(first)) == 6, "two seeds of three kinds"
    assert digests("2") == first


def test_shapes_say_what_they_are() -> None:
    recipe = SweepRecipe(shapes=("512/64",), isl_chars=True, prefix_shares=(0.0, 0.25), spread=0.5)
    first, second = resolve_profile(recipe).shapes
    assert [str(first), str(second)] == ["512c/64-spread0.5", "512c/64-shared25-spread0.5"]
    assert second.slug == "512cx64-shared25-spread0.5"


def test_what_does_not_go_together() -> None:
    with pytest.raises(InputError) as caught:
        resolve_profile(SweepRecipe(dataset="x", shapes=("8/8",), prefix_shares=(1.0,), spread=0.0, isl_chars=True))
    assert caught.value.problems == (
        "prefix share is 1, expected 0 to less than 1 each",
        "spread is 0, expected more than 0, at most 1",
        "shapes given, but the data set tells its own lengths",
        "prefix shares given, but the data set tells its own lengths",
        "isl_chars given, but the data set tells its own lengths",
    )
    with pytest.raises(InputError, match="arrivals is trace, but there is no data set"):
        resolve_profile(SweepRecipe(arrivals="trace"))
    with pytest.raises(InputError, match="arrivals is poisson, but there is no rate"):
        resolve_profile(SweepRecipe(arrivals="poisson"))
