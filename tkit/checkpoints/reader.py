"""Reads Hugging Face safetensors checkpoints: headers first, then one tensor at a time.

Format: 8 bytes little-endian header length, JSON header {name: {dtype, shape, data_offsets}}, data.
https://github.com/huggingface/safetensors#format. Reads with pread, not mmap: a file truncated while mapped kills the
process instead of raising.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tkit.checkpoints.tensors import ITEM_BYTES, raw_bytes, raw_dtype
from tkit.errors import InputError
from tkit.files import read_json, reason_of, unique_keys

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
SINGLE_FILE = "model.safetensors"
INDEX_FILE = f"{SINGLE_FILE}.index.json"  # the shards of a model that is not one file
HF_QUANT_CONFIG = "hf_quant_config.json"
PICKLED_FILE = "pytorch_model.bin"  # likewise


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies. `offset` counts from the start of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, checked against each other and the file's size. Reads no data."""
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise InputError(f"{path}: not a regular file")  # opening a pipe would wait for ever
        size = facts.st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise InputError(f"{path}: not a safetensors file: {size} bytes, header length {length}")
            header = json.loads(file.read(length), object_pairs_hook=unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: unreadable safetensors header: {reason_of(error)}") from error
    if not isinstance(header, dict):
        raise InputError(f"{path}: unreadable safetensors header: a {type(header).__name__}, not a mapping")
    header.pop("__metadata__", None)
    entries, problems, spans = {}, [], []
    for name, value in header.items():
        if not _is_entry(value):
            problems.append(f"{name}: malformed entry {str(value)[:100]}")
            continue
        dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        entry = TensorEntry(path, dtype, shape, 8 + length + start)
        if entry.num_bytes != stop - start:
            problems.append(f"{name}: {dtype} {shape} needs {entry.num_bytes} bytes, the header gives {stop - start}")
        entries[name] = entry
        spans.append((start, stop, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            problems.append(f"{name}: starts at byte {start} of the data, expected {end}")
        end = stop
    if end != size - 8 - length:
        problems.append(f"the header describes {end} bytes of data, the file holds {size - 8 - length}")
    if problems:
        raise InputError(f"{path}: the header contradicts the file", problems=problems)
    return entries


def _is_entry(value: Any) -> bool:
    """Whether a header entry has a known dtype, a shape and two offsets, all whole numbers."""
    if not isinstance(value, dict) or not isinstance(value.get("dtype"), str) or value["dtype"] not in ITEM_BYTES:
        return False
    shape, offsets = value.get("shape"), value.get("data_offsets")
    return _are_sizes(shape) and isinstance(offsets, list) and len(offsets) == 2 and _are_sizes(offsets)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


class TensorFiles:
    """Tensors by name, whatever number of safetensors files they lie in.

    Memory: one tensor at a time, the one being read.
    """

    def __init__(self, directory: Path, entries: Mapping[str, TensorEntry]):
        self.directory = directory
        self.entries = entries
        self._descriptors: dict[Path, int] = {}

    @property
    def files(self) -> list[Path]:
        return sorted({entry.file for entry in self.entries.values()})

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries.values())

    def read(self, name: str) -> np.ndarray:
        """The raw bits of one tensor, in its shape."""
        entry = self.entries[name]
        raw = np.empty(entry.shape, raw_dtype(entry.dtype))
        buffer = raw_bytes(raw)
        done = 0
        while done < len(buffer):
            count = os.preadv(self._descriptor(entry.file), [buffer[done:]], entry.offset + done)
            if count == 0:
                raise InputError(f"{entry.file}: ended while {name} was read; did another program change it?")
            done += count
        return raw

    def _descriptor(self, path: Path) -> int:
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        return self._descriptors[path]

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json` of a Hugging Face model. What ModelOpt says in a file of its own, its group size for one, is added to
    the `quantization_config`."""
    path, quant_config = directory / "config.json", directory / HF_QUANT_CONFIG
    if not path.is_file():
        raise InputError(
            f"{path}: no such file", hint="name a model's directory: config.json, *.safetensors and its tokenizer"
        )
    config = _mapping(path)
    in_config = config.get("quantization_config") or {"quant_method": "modelopt"}
    is_modelopt = isinstance(in_config, dict) and in_config.get("quant_method") == "modelopt"
    if is_modelopt and quant_config.exists():
        in_file = _mapping(quant_config).get("quantization")
        if not isinstance(in_file, dict):
            raise InputError(f'{quant_config}: no "quantization" with keys in it')
        config["quantization_config"] = {**in_file, **in_config}
    return config


def _mapping(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a mapping of keys, found {type(value).__name__}")
    return value


def open_source(directory: Path) -> TensorFiles:
    """The tensors of a Hugging Face model directory under their own names. Reads headers only."""
    entries: dict[str, TensorEntry] = {}
    problems = []
    for path in weight_files(directory):
        try:
            header = read_header(path)
        except InputError as error:
            problems.append(str(error))
            continue
        problems += [
            f"{name} stands in {entries[name].file.name} and in {path.name}" for name in header if name in entries
        ]
        entries.update(header)
    if problems:
        raise InputError(
            f"{directory}: unreadable checkpoint", problems=problems, hint="copy or download these files again"
        )
    return TensorFiles(directory, entries)


def open_ranks(directory: Path, world_size: int) -> TensorFiles:
    """The tensors of all `rank{r}.safetensors` in `directory`, named `{rank}/{name}`."""
    entries = {}
    for rank in range(world_size):
        for name, entry in read_header(directory / f"rank{rank}.safetensors").items():
            entries[f"{rank}/{name}"] = entry
    return TensorFiles(directory, entries)


def check_model_files(directory: Path, names: Iterable[str]) -> None:
    """Raises InputError listing those of the files `names` in `directory` that are no regular files of that model:
    devices, pipes, and links that lead out of it.

    The Hugging Face cache links from `snapshots/<commit>` to `blobs` beside it: that is within the model.
    """
    model = directory.parent.parent if directory.parent.name == "snapshots" else directory
    root = Path(os.path.realpath(model))
    problems = []
    for name in names:
        path = directory / name
        target = Path(os.path.realpath(path))
        if not os.path.lexists(path):
            continue
        if not target.exists():
            problems.append(f"{name}: a link to {target}, which does not exist")
        elif not target.is_relative_to(root):
            problems.append(f"{name}: a link to {target}, outside {root}")
        elif not target.is_file():
            problems.append(f"{name}: not a regular file")
    if problems:
        raise InputError(
            f"{directory}: files that are not the model's own",
            problems=problems,
            hint="put the files themselves there, or name the directory in which they lie",
        )


def file_signature(path: Path) -> tuple[int, ...]:
    """What changes when a file is written to or another takes its place."""
    facts = path.stat()
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def weight_files(directory: Path, single: str = SINGLE_FILE) -> list[Path]:
    """The files that `single`'s index names, or `single`. Raises InputError listing what is not there or leads out."""
    index_file = f"{single}.index.json"
    check_model_files(directory, (index_file, single))
    index_path = directory / index_file
    if not index_path.exists():
        if (directory / single).exists():
            return [directory / single]
        others = sorted(path.name for path in directory.glob("*.bin")) if directory.is_dir() else []
        pickled = f"; {', '.join(others[:3])} would run code when loaded" if others else ""
        raise InputError(
            f"{directory}: no weights: neither {single} nor {index_file}{pickled}",
            hint="tkit reads safetensors; download the model's *.safetensors files or convert it with transformers"
            + (", or read its tensors and nothing else with --allow-pickle" if others else ""),
        )
    index = read_json(index_path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f'{index_path}: "weight_map" is empty, expected the file of every tensor')
    problems = []
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or "\0" in name:
            problems.append(f'shard "{name}" points outside the model directory')
        elif not (directory / name).exists():
            problems.append(f"shard {name} is missing")
    if problems:
        raise InputError(f"{index_path}: the index does not match the directory", problems=problems)
    check_model_files(directory, names)
    return [directory / name for name in names]
