from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tkit.checkpoints.reader import open_source, read_header
from tkit.errors import InputError
from tkit.runtime.bits import to_torch


def parts(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), "b": torch.ones(4, dtype=torch.float32)}, path)
    return path


def test_reads_what_the_library_wrote(good):
    with open_source(good.parent) as source:
        assert source.entries["a"].shape == (2, 3)
        assert torch.equal(to_torch(source.read("a"), "BF16"), torch.arange(6, dtype=torch.bfloat16).reshape(2, 3))
        assert torch.equal(to_torch(source.read("b"), "F32"), torch.ones(4))


def wrong_shape(header, data):
    header["a"]["shape"] = [2, 4]
    return header, data


def overlapping(header, data):
    header["a"]["data_offsets"] = [4, 16]
    return header, data


def unknown_dtype(header, data):
    header["a"]["dtype"] = "F4"
    return header, data


def duplicate_key(header, data):
    text = json.dumps(header)
    return (text[:-1] + ', "a": ' + json.dumps(header["a"]) + "}").encode(), data


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda header, data: (header, data[:-1]), "the header describes 28 bytes of data, the file holds 27"),
        (lambda header, data: (header, data + b"x"), "the header describes 28 bytes of data, the file holds 29"),
        (lambda header, data: (b"{not json", data), "unreadable safetensors header"),
        (lambda header, data: (b"\xff\xfe", data), "unreadable safetensors header"),
        (wrong_shape, r"a: BF16 \(2, 4\) needs 16 bytes, the header gives 12"),
        (overlapping, "a: starts at byte 4 of the data, expected 16"),
        (unknown_dtype, "a: malformed entry"),
        (duplicate_key, 'key "a" stands twice'),
    ],
)
def test_a_spoiled_file_is_refused_by_its_header(good, spoil, message):
    write(good, *spoil(*parts(good)))
    with pytest.raises(InputError, match=message) as error:
        open_source(good.parent)
    assert str(good) in str(error.value)


@pytest.mark.parametrize("size", [0, 7, 8, 40])
def test_a_cut_file_is_refused(good, size):
    good.write_bytes(good.read_bytes()[:size])
    with pytest.raises(InputError, match="safetensors"):
        read_header(good)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, r'shard "../model.safetensors" points outside'),
        ({"weight_map": {"a": "model-00001.safetensors"}}, "shard model-00001.safetensors is missing"),
        ({"weight_map": {}}, '"weight_map" is empty'),
    ],
)
def test_an_index_that_lies_is_refused(good, index, message):
    (good.parent / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        open_source(good.parent)


def test_a_tensor_in_two_shards_is_named(good):
    other = good.with_name("model-2.safetensors")
    other.write_bytes(good.read_bytes())
    index = {"weight_map": {"a": good.name, "b": other.name}}
    (good.parent / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="a stands in model-2.safetensors and in model.safetensors"):
        open_source(good.parent)


def test_pickled_weights_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="pytorch_model.bin would run code when loaded"):
        open_source(tmp_path)
