from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tkit.errors import InputError
from tkit.files import check_writable, from_mapping, read_json, read_yaml, write_atomic


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 1
    ratio: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    many: tuple[Inner, ...] = ()
    maybe: int | None = None
    named: Mapping[str, str] = field(default_factory=dict)


def test_nested_values_become_dataclasses():
    values = {"name": "a", "inner": {"size": 3, "ratio": 2}, "many": [{"size": 4}], "maybe": None}
    assert from_mapping(Outer, values, "x") == Outer(name="a", inner=Inner(size=3, ratio=2.0), many=(Inner(size=4),))


def test_every_problem_is_listed_with_its_place():
    with pytest.raises(InputError) as error:
        values = {
            "nam": "a",
            "inner": {"sise": 3},
            "many": [{"size": "x"}, 5],
            "maybe": True,
            "named": {"a": None, "b": "c"},
        }
        from_mapping(Outer, values, "file.yaml")
    assert set(error.value.problems) == {
        'file.yaml: unknown key "nam" (did you mean "name"?)',
        'file.yaml: key "name" is missing',
        'file.yaml: inner: unknown key "sise" (did you mean "size"?)',
        "file.yaml: many[0]: size: expected int, found 'x'",
        "file.yaml: many[1]: expected keys, found 5",
        "file.yaml: maybe: expected int, found True",
        "file.yaml: named: a: expected str, found None",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", 'key "a" stands twice'),
        ("- 1\n- 2\n", "expected a mapping"),
        ("", "expected a mapping"),
        ("a: [1\n", "not readable as YAML"),
        ("a: !!python/object/apply:os.system [true]\n", "not readable as YAML"),
        ("a: 1\nb:\n\tc: 1\n", "line 3, column 1: found character '\\\\t' that cannot start any token$"),
        ("{" * 2000, "nested too deeply"),
        ("a: 2026-13-45\n", "month must be in 1..12"),
    ],
)
def test_bad_yaml_is_named(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_yaml(path)
    assert "x.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"), [('{"a": 1, "a": 2}', 'key "a" stands twice'), ("{", "not readable as JSON")]
)
def test_bad_json_is_named(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_json(path)


def test_a_mapping_may_merge_another_and_keeps_its_own_keys(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")
    assert read_yaml(path)["b"] == {"x": 1, "y": 3}


def test_a_value_of_any_size_is_named_in_a_line():
    nest: object = "x"
    for _ in range(30):  # 2^30 strings, were they written out
        nest = [nest, nest]
    with pytest.raises(InputError) as error:
        from_mapping(Outer, {"name": nest, "inner": nest}, "x")
    assert len(str(error.value)) < 500


def test_one_problem_is_the_message():
    with pytest.raises(InputError) as error:
        from_mapping(Outer, {"name": "a", "maybe": "x"}, "file.yaml")
    assert str(error.value) == "file.yaml: maybe: expected int, found 'x'"


def test_where_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine").chmod(0o500)
    check_writable(tmp_path / "a" / "b", "unused")
    with pytest.raises(InputError, match="/file: a file, expected a directory\nhint: choose another"):
        check_writable(tmp_path / "file" / "a" / "b", "choose another")
    if not os.access(tmp_path / "mine", os.W_OK):  # root may write everywhere
        with pytest.raises(InputError, match="/mine: no permission to write there\nhint: choose another"):
            check_writable(tmp_path / "mine" / "a", "choose another")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]


def test_a_file_that_cannot_be_written_is_named_and_not_the_temporary_one(tmp_path):
    with pytest.raises(OSError) as error:
        write_atomic(Path("/proc/no.json"), "text")
    assert error.value.filename == "/proc/no.json"


def test_a_pipe_is_written_to_and_a_link_is_followed(tmp_path):
    reader, writer = os.pipe()
    write_atomic(Path(f"/dev/fd/{writer}"), "text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    os.close(writer)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "file")
    write_atomic(link, "text")
    assert link.is_symlink() and (tmp_path / "file").read_text() == "text"
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    write_atomic(loop, "text")
    assert loop.read_text() == "text"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "card.json"
    write_atomic(path, "old")
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["card.json"]
