"""Engine directories by path, by name and by age; cards and files that are not what they say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from fake_backend import write_engine

from tkit.errors import InputError
from tkit.stages.engines import complete_engines, find_engine, read_card, verify_files


def test_newest_engine_is_the_default(tmp_path: Path) -> None:
    write_engine(tmp_path / "b-old", created="2026-01-01T00:00:00Z")
    write_engine(tmp_path / "a-new", created="2026-03-01T00:00:00Z")
    (tmp_path / "c-unfinished").mkdir()
    write_engine(tmp_path / ".tmp-d-1", created="2026-05-01T00:00:00Z")
    assert find_engine(None, tmp_path) == tmp_path / "a-new"
    assert [path.name for path in complete_engines(tmp_path)] == ["a-new", "b-old"]


def test_engine_by_name_and_by_directory(tmp_path: Path) -> None:
    write_engine(tmp_path / "tiny")
    assert find_engine("tiny", tmp_path) == tmp_path / "tiny"
    assert find_engine(str(tmp_path / "tiny"), tmp_path / "elsewhere") == tmp_path / "tiny"


def test_no_engine_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        find_engine(None, tmp_path / "engines")
    assert str(error.value) == f"no engine in {tmp_path}/engines\nhint: build one: tkit build"


def test_unknown_engine_names_the_near_one(tmp_path: Path) -> None:
    write_engine(tmp_path / "demo-int8")
    with pytest.raises(InputError) as error:
        find_engine("demo-int4", tmp_path)
    assert str(error.value) == (
        f'no engine "demo-int4" (did you mean "demo-int8"?)\nhint: engines in {tmp_path}: demo-int8'
    )


def test_unfinished_engine_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    with pytest.raises(InputError, match="tiny: not a complete engine, it holds no engine.json"):
        find_engine("tiny", tmp_path)


def test_card_of_another_schema(tmp_path: Path) -> None:
    write_engine(tmp_path, schema="tkit.engine/9")
    with pytest.raises(InputError, match="schema is 'tkit.engine/9', this tkit reads \"tkit.engine/1\""):
        read_card(tmp_path)


def test_a_torn_card_says_how_to_go_on_without_it(tmp_path: Path) -> None:
    write_engine(tmp_path / "whole")
    write_engine(tmp_path / "torn")
    (tmp_path / "torn" / "engine.json").write_text("{")
    for engine in (None, "torn"):
        with pytest.raises(InputError) as error:
            read_card(find_engine(engine, tmp_path))
        assert error.value.message.startswith(f"{tmp_path}/torn/engine.json: not readable as JSON")
        assert error.value.hint == f"name another engine, or remove {tmp_path}/torn and build it again"


@pytest.mark.parametrize("facts", [3, {}, {"bytes": 7}, {"bytes": "7", "sha256": "0"}])
def test_card_whose_files_are_none(tmp_path: Path, facts: object) -> None:
    write_engine(tmp_path)
    values = json.loads((tmp_path / "engine.json").read_text())
    (tmp_path / "engine.json").write_text(json.dumps({**values, "files": {"a": facts}}))
    with pytest.raises(InputError, match="files: a: expected"):
        read_card(tmp_path)


def test_card_survives_the_file(tmp_path: Path) -> None:
    card = write_engine(tmp_path / "tiny")
    assert dataclasses.asdict(read_card(tmp_path / "tiny")) == dataclasses.asdict(card)


def test_files_that_are_not_as_built(tmp_path: Path) -> None:
    good = write_engine(tmp_path / "tiny")
    verify_files(tmp_path / "tiny", good)
    facts = good.files["checkpoint/rank0.safetensors"]
    card = dataclasses.replace(good, files={**good.files, "gone": facts, "../outside": facts, "checkpoint": facts})
    (tmp_path / "tiny" / "checkpoint" / "rank0.safetensors").write_bytes(b"weightz")
    with pytest.raises(InputError) as error:
        verify_files(tmp_path / "tiny", card)
    assert error.value.message == f"{tmp_path}/tiny: 4 of 4 files are not as built"
    names = [problem.split(":")[0] for problem in error.value.problems]
    assert names == ["checkpoint/rank0.safetensors", "gone", "../outside", "checkpoint"]
    assert error.value.problems[1:] == ("gone: missing", "../outside: path leaves the engine directory",
                                        "checkpoint: missing")  # fmt: skip
    assert "the card says" in error.value.problems[0]
