"""Files that are whole or absent, and YAML/JSON that says what is wrong with it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tkit.errors import InputError, did_you_mean

T = TypeVar("T")

_SHORT = reprlib.Repr()  # of a value in a message: YAML's aliases can nest a few lines into gigabytes
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 80, 80

MAX_NAME_BYTES = 200  # file systems take 255; temporary ones have something in front and behind


def write_atomic(path: Path, data: str | bytes) -> None:
    """Writes `path` so that a reader sees the old file or the new one, also after a crash. A pipe or a device, such as
    /dev/stdout, is written to and stays what it is."""
    try:
        content = data.encode() if isinstance(data, str) else data
    except UnicodeEncodeError as error:  # a path whose bytes are no UTF-8, which Python keeps as half a character
        around = error.object[max(error.start - 40, 0) : error.end + 40]
        raise InputError(f"{path}: {around!r} is not UTF-8", hint="rename the file or directory") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    path = Path(os.path.realpath(path))  # what a link leads to is replaced, not the link, unless it leads to itself
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # not the temporary one, of which nobody knows
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Makes an OSError say which file where the system only says what: a full disk, most of all."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def check_writable(directory: Path, hint: str) -> None:
    """Raises InputError where nothing can be made in `directory`, which need not exist yet; makes nothing itself."""
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"{there}: a file, expected a directory", hint=hint)
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{there}: no permission to write there", hint=hint)


def reason_of(error: Exception) -> str:
    """What went wrong, without the path, which the message names already."""
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def sync_directory(directory: Path) -> None:
    """Makes the renames inside `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any) -> str:
    """JSON with stable key order of insertion, dataclasses included; ends with a newline."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=_plain, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} does not belong in a JSON record")


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, to_json(value))


def read_json(path: Path) -> Any:
    """The parsed file. A duplicate key is an error: the parsers of the world disagree on which one counts."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except RecursionError as error:
        raise InputError(f"{path}: not readable as JSON: nested too deeply") from error
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not readable as JSON: {reason_of(error)}") from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for key, value in pairs:
        if key in keys:
            raise ValueError(f'key "{key}" stands twice')
        keys[key] = value
    return keys


def name_problem(name: str) -> str | None:
    """Why a directory cannot be called `name`; None when it can. Those with a dot in front are work in progress."""
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        return f"is {len(os.fsencode(name))} bytes long, expected at most {MAX_NAME_BYTES}"
    if not name.isprintable() or not re.fullmatch(r"[^./][^/]*", name):
        return f"is {name!r}, expected a directory name without a path"
    return None


class _StrictLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        pairs = [
            (self.construct_object(key, deep=True), value.start_mark)
            for key, value in node.value
            if key.tag != "tag:yaml.org,2002:merge"  # `<<: *anchor`: what it brings gives way to the mapping's own keys
        ]
        for index, (key, mark) in enumerate(pairs):
            if key in [earlier for earlier, _ in pairs[:index]]:
                raise yaml.constructor.ConstructorError(None, None, f'key "{key}" stands twice', mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file, a list or a duplicate key is an error."""
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)  # a SafeLoader
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise InputError(f"{path}: not readable as YAML: {place}{error.problem or error.context}") from error
    except RecursionError as error:
        raise InputError(f"{path}: not readable as YAML: nested too deeply") from error
    except (
        yaml.YAMLError,
        OSError,
        ValueError,
    ) as error:  # ValueError: a date like 2026-13-45, bytes that are no UTF-8
        raise InputError(f"{path}: not readable as YAML: {reason_of(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a mapping of keys, found {type(value).__name__}")
    return value


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Builds the dataclass `cls` from plain values; lists every unknown key, wrong type and missing field at once.

    `where` opens each line of the message: `model_configs/l8b.yaml` or `--quant`.
    """
    problems: list[str] = []
    value = _build(cls, values, where, problems)
    if len(problems) == 1:
        raise InputError(problems[0])
    if problems:
        raise InputError(f"{where}: {len(problems)} problems", problems=problems)
    return value


def _build(cls: Any, values: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(values, Mapping):
        problems.append(f"{where}: expected keys, found {_SHORT.repr(values)}")
        return None
    before = len(problems)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            problems.append(f'{where}: unknown key "{key}"{did_you_mean(str(key), fields)}')
            continue
        arguments[key] = _convert(hints[key], value, f"{where}: {key}", problems)
    for name, field in fields.items():
        is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if is_required and name not in values:
            problems.append(f'{where}: key "{name}" is missing')
    if len(problems) > before:
        return None
    try:
        return cls(**arguments)
    except InputError as error:
        problems.extend(f"{where}: {line}" for line in (error.problems or (error.message,)))
        return None


def _convert(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    origin, parameters = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        return _build(hint, value, where, problems)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in parameters:
            return None
        hint = next(parameter for parameter in parameters if parameter is not type(None))
        return _convert(hint, value, where, problems)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            problems.append(f"{where}: expected a list, found {_SHORT.repr(value)}")
            return None
        return tuple(_convert(parameters[0], item, f"{where}[{i}]", problems) for i, item in enumerate(value))
    if origin in (dict, Mapping) or hint in (dict, Mapping) or typing.get_origin(hint) is Mapping:
        if not isinstance(value, Mapping):
            problems.append(f"{where}: expected keys, found {_SHORT.repr(value)}")
            return None
        if not parameters:
            return value
        return {key: _convert(parameters[1], item, f"{where}: {key}", problems) for key, item in value.items()}
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint in (int, float) and isinstance(value, bool)):
        problems.append(f"{where}: expected {hint.__name__}, found {_SHORT.repr(value)}")
        return None
    return value


def read_api_key(path: Path) -> str:
    """The key that a file of `--api-key-file` holds; InputError unless it is one word of plain text."""
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        what = reason_of(error) if isinstance(error, OSError) else "not plain text"
        raise InputError(f"--api-key-file: {path}: {what}") from error
    if not re.fullmatch(r"[!-~]+", key):
        raise InputError(
            f"--api-key-file: {path} holds {len(key.split())} words, expected one",
            hint="the file holds the key and nothing else",
        )
    return key


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
