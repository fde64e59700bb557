"""Malformed models: each is refused by `tkit build` with one clear error, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import MODELS
from safetensors.torch import load_file, save_file

import tkit.stages.build as build_stage
from tkit.architectures.config import spec_from_hf, trtllm_config
from tkit.architectures.moves import plan_moves
from tkit.checkpoints.reader import TensorFiles
from tkit.errors import InputError
from tkit.files import sha256_file, to_json
from tkit.specs.parallel import Parallel
from tkit.specs.precision import Precision

UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"  # (128, 64) and (64, 128)


@pytest.fixture
def model(make_llama, tmp_path) -> Path:
    return Path(shutil.copytree(make_llama(), tmp_path / "model"))


def assert_refused(tkit: Callable[..., Any], model: Path, *messages: str, exit_code: int = 2) -> None:
    result = tkit("build", model)
    assert result.exit_code == exit_code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert (result.stdout, result.stderr.count("error: ")) == ("", 1)
    for message in messages:
        assert message in result.stderr
    assert not Path("engines").exists() or list(Path("engines").iterdir()) == []


# --- the weight file ---


def rewrite_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Keeps the data; `change` edits the header or returns its bytes."""

    def spoil(path: Path) -> None:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        changed = change(header)
        text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return spoil


def rewrite_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: None if path.write_bytes(change(path.read_bytes())) else None


def rewrite_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return spoil


def move_to_gap(header: dict[str, Any]) -> None:
    """The last tensor overlaps the one before it by two bytes."""
    last = max((entry for name, entry in header.items() if name != "__metadata__"), key=lambda e: e["data_offsets"])
    last["data_offsets"] = [offset - 2 for offset in last["data_offsets"]]


def twice(header: dict[str, Any]) -> bytes:
    return (json.dumps(header)[:-1] + f', "{UP}": {json.dumps(header[UP])}' + "}").encode()


def half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.float16)


BAD_WEIGHTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (rewrite_bytes(lambda data: b""), "not a safetensors file: 0 bytes"),
    "seven bytes": (rewrite_bytes(lambda data: data[:7]), "not a safetensors file: 7 bytes"),
    "header past the end": (
        rewrite_bytes(lambda data: len(data).to_bytes(8, "little") + data[8:]),
        "not a safetensors file",
    ),
    "header of 2^63 bytes": (
        rewrite_bytes(lambda data: (2**63).to_bytes(8, "little") + data[8:]),
        "header length 9223372036854775808",
    ),
    "header is not JSON": (rewrite_header(lambda header: b"{nonsense"), "unreadable safetensors header"),
    "header is not UTF-8": (rewrite_header(lambda header: b'{"\xff": 1}'), "unreadable safetensors header"),
    "header is a list": (rewrite_header(lambda header: b"[]"), "unreadable safetensors header: a list"),
    "header nested without end": (rewrite_header(lambda header: b"[" * 99999), "unreadable safetensors header"),
    "one byte short": (rewrite_bytes(lambda data: data[:-1]), "bytes of data, the file holds"),
    "one byte long": (rewrite_bytes(lambda data: data + b"\0"), "bytes of data, the file holds"),
    "tensors overlap": (rewrite_header(move_to_gap), "starts at byte"),
    "offsets and shape disagree": (
        rewrite_header(lambda header: header[UP].update(shape=[128, 63])),
        f"{UP}: BF16 (128, 63) needs 16128 bytes, the header gives 16384",
    ),
    "negative offset": (
        rewrite_header(lambda header: header[UP].update(data_offsets=[-16384, 0])),
        f"{UP}: malformed entry",
    ),
    "unknown dtype": (rewrite_header(lambda header: header[UP].update(dtype="BF15")), f"{UP}: malformed entry"),
    "shape beyond any memory": (
        rewrite_header(lambda header: header[UP].update(shape=[2**40, 2**40])),
        "(1099511627776, 1099511627776) needs",
    ),
    "NaN": (
        rewrite_tensors(lambda tensors: tensors[UP][3].fill_(float("nan"))),
        f"{UP}: 64 of 8192 values are NaN or infinite in bfloat16",
    ),
    "zeros": (
        rewrite_tensors(lambda tensors: [tensors[name].zero_() for name in (UP, DOWN)]),
        f"  - {UP}: all 8192 values are zero\n",
    ),
    "missing tensor": (rewrite_tensors(lambda tensors: tensors.pop(UP)), f"{UP} is missing, expected (128, 64)"),
    "another dtype of that size": (
        rewrite_tensors(lambda tensors: tensors.update({UP: half(tensors[UP])})),
        f"{UP} is F16, 29 others are BF16",
    ),
    "integers of that size": (
        rewrite_tensors(lambda tensors: tensors.update({UP: tensors[UP].view(torch.int16)})),
        f"{UP} is I16, expected one of BF16, F16, F32",
    ),
    "another shape of that size": (
        rewrite_tensors(lambda tensors: tensors.update({UP: tensors[UP].reshape(64, 128)})),
        f"{UP} is (64, 128), config.json promises (128, 64)",
    ),
    "duplicate key": (rewrite_header(twice), f'key "{UP}" stands twice'),
    "surplus tensor": (
        rewrite_tensors(lambda tensors: tensors.update({"model.layers.3.mlp.up_proj.weight": tensors[UP].clone()})),
        "model.layers.3.mlp.up_proj.weight (128, 64) has no place in this architecture",
    ),
}


@pytest.mark.parametrize("damage", BAD_WEIGHTS)
def test_a_bad_weight_file_is_refused(tkit, model, damage):
    spoil, message = BAD_WEIGHTS[damage]
    spoil(model / "model.safetensors")
    assert_refused(tkit, model, message)


def test_every_unusable_tensor_of_a_layer_is_listed(tkit, model):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP][0, 0] = float("inf")
        tensors[DOWN].zero_()

    rewrite_tensors(spoil)(model / "model.safetensors")
    assert_refused(tkit, model, f"{UP}: 1 of 8192 values are NaN", f"{DOWN}: all 8192 values are zero", "--allow-zeros")


def test_zeros_that_are_meant_can_be_built(tkit, model):
    rewrite_tensors(lambda tensors: tensors[UP].zero_())(model / "model.safetensors")
    result = tkit("build", model, "--allow-zeros")
    assert result.exit_code == 0, result.output
    stored = load_file(Path(result.stdout.strip()) / "checkpoint" / "rank0.safetensors")
    assert not stored["transformer.layers.1.mlp.gate.weight"].any()


def test_zero_biases_are_ordinary(tkit, make_llama):
    assert tkit("build", make_llama(attention_bias=True, mlp_bias=True)).exit_code == 0


# --- the index and the files themselves ---


def shard(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")


def write_index(model: Path, index: Any) -> None:
    text = index if isinstance(index, str) else json.dumps(index)
    (model / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {UP: "model-00002-of-00002.safetensors"}}, "shard model-00002-of-00002.safetensors is missing"),
        ({"weight_map": {UP: "../secret.safetensors"}}, 'shard "../secret.safetensors" points outside'),
        ({"weight_map": {UP: "/etc/passwd"}}, 'shard "/etc/passwd" points outside'),
        ({"weight_map": {UP: ".."}}, "outside"),
        ({"weight_map": {UP: "."}}, 'shard "." points outside'),
        ({"weight_map": {UP: "a\0b"}}, "points outside"),
        ({"weight_map": {UP: 3}}, "shard 3 is missing"),
        ({"weight_map": {}}, '"weight_map" is empty'),
        ({"weight_map": []}, '"weight_map" is empty'),
        ([], '"weight_map" is empty'),
        ("{", "not readable as JSON"),
        ("[" * 99999, "not readable as JSON"),
    ],
)
def test_an_index_that_lies_is_refused(tkit, model, index, message):
    shard(model)
    write_index(model, index)
    assert_refused(tkit, model, message)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_link_out_of_the_model_is_refused(tkit, model, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    (model / name).rename(elsewhere)
    (model / name).symlink_to(elsewhere)
    assert_refused(tkit, model, f"{name}: a link to {elsewhere}, outside {model}")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_is_refused_and_not_waited_for(tkit, model, name):
    (model / name).unlink()
    os.mkfifo(model / name)
    assert_refused(tkit, model, f"{name}: not a regular file")


def test_a_device_and_a_link_to_nowhere_are_refused(tkit, model):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("/dev/zero")
    assert_refused(tkit, model, "model.safetensors: a link to /dev/zero, outside")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(model / "gone")
    assert_refused(tkit, model, f"model.safetensors: a link to {model}/gone, which does not exist")


def test_a_link_within_the_model_is_ordinary(tkit, model, tmp_path):
    (model / "model.safetensors").rename(model / "weights")
    (model / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(model)
    assert tkit("build", tmp_path / "link").exit_code == 0


@pytest.fixture
def cached(model, tmp_path) -> Path:
    """The snapshot of a model as the Hugging Face cache keeps it."""
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "0123abc"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in model.iterdir():
        blob = blobs / sha256_file(path)
        path.rename(blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_the_hub_cache_is_ordinary(tkit, cached):
    assert tkit("build", cached).exit_code == 0


def test_a_flipped_bit_in_the_hub_cache_is_found(tkit, cached):
    blob = (cached / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1000] ^= 1
    blob.write_bytes(data)
    assert_refused(tkit, cached, "model.safetensors: sha256 is ", f"the hub's is {blob.name[:12]}...")


def pickle_weights(model: Path, num_shards: int = 1) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    if num_shards == 1:
        torch.save(tensors, model / "pytorch_model.bin")
        return
    shards = {
        f"pytorch_model-{n + 1:05d}-of-{num_shards:05d}.bin": list(tensors)[n::num_shards] for n in range(num_shards)
    }
    for file, names in shards.items():
        torch.save({name: tensors[name] for name in names}, model / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("options", [[], ["--allow-pickle"]])
def test_what_a_pickle_would_run_is_not_run(tkit, model, tmp_path, options):
    marker = tmp_path / "ran"
    (model / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil(marker)}, model / "pytorch_model.bin")
    result = tkit("build", model, *options)
    assert result.exit_code == 2
    assert ("Weights only load failed" if options else "pytorch_model.bin would run code when loaded") in result.stderr
    assert options or "--allow-pickle" in result.stderr
    assert not marker.exists()


@pytest.mark.parametrize("num_shards", [1, 2])
def test_pickled_weights_that_are_allowed_give_the_same_checkpoint(tkit, model, num_shards):
    plain = Path(tkit("build", model).stdout.strip())
    pickle_weights(model, num_shards)
    result = tkit("build", model, "--allow-pickle", "--json")
    assert result.exit_code == 0, result.output
    card = json.loads(result.stdout)
    rank = "checkpoint/rank0.safetensors"
    assert (Path("engines") / card["name"] / rank).read_bytes() == (plain / rank).read_bytes()
    assert card["command"].endswith("--allow-pickle") and "pickled" in card["notes"][0]
    assert card["source"]["files"].keys() >= {path.name for path in model.glob("*.bin")}


def test_every_unreadable_pickle_is_listed(tkit, model):
    pickle_weights(model, 3)
    shards = sorted(model.glob("pytorch_model-*.bin"))
    shards[0].write_bytes(shards[0].read_bytes()[:1000])
    torch.save([torch.zeros(1)], shards[1])
    torch.save({"model.norm.weight": "text"}, shards[2])
    result = tkit("build", model, "--allow-pickle")
    assert result.exit_code == 2
    for problem in (
        f"{shards[0].name}: ",
        f"{shards[1].name}: holds a list",
        f"{shards[2].name}: model.norm.weight is str",
    ):
        assert problem in result.stderr


# --- config.json ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausalML"]}, 'did you mean "LlamaForCausalLM"?'),
        ({"architectures": "LlamaForCausalLM"}, 'no "architectures" entry'),
        ({"architectures": []}, 'no "architectures" entry'),
        ({"num_attention_heads": 3}, "num_heads 3 is not a multiple of num_kv_heads 2"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3', expected int"),
        ({"num_hidden_layers": 10**30}, "expected at most 10000"),
        ({"hidden_size": True}, "hidden_size is True, expected int"),
        ({"hidden_size": -64}, "config.json: LlamaForCausalLM: sizes contradict each other\n  - hidden_size is -64, "),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected float"),
        ({"rms_norm_eps": -1}, "norm_epsilon is -1.0, expected at least 0"),
        ({"rms_norm_eps": 10**400}, "expected float"),
        ({"initializer_range": float("nan")}, "initializer_range is nan, expected float"),
        ({"task_specific": {"x": [float("inf")]}}, "task_specific.x.0 is inf, expected float"),
        ({"hidden_act": ["silu"]}, "hidden_act is ['silu'], expected str"),
        ({"hidden_act": "cubic"}, "hidden_act is 'cubic', expected one of"),
        ({"rope_parameters": {"rope_type": "spiral"}}, 'unknown rope_type "spiral"'),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_parameters.rope_theta is '1e4', expected float"),
        ({"rope_scaling": 8}, "rope_scaling is 8, expected keys"),
        ({"architectures": ["EvilModel"], "auto_map": {"AutoModel": "evil.Model"}}, 'unknown architecture "EvilModel"'),
        ({"text_config": {"auto_map": {"AutoModel": "evil.Model"}}}, "text_config.auto_map asks to run code"),
        ({"trust_remote_code": True}, "trust_remote_code asks to run code"),
        ({"vision_config": {"inner": [{"trust_remote_code": True}]}}, "vision_config.inner.0.trust_remote_code asks"),
        ({"quantization_config": {"quant_method": "awq"}}, "group_size is None"),
        ({"quantization_config": {"quant_method": "awq", "group_size": 64}}, "every layer is in 16 bits"),
        ({"quantization_config": {"quant_method": ["awq"]}}, "unknown quant_method"),
        ({"quantization_config": "awq"}, "quantization_config is 'awq', expected keys"),
        ({"vocab_size": 4097}, "model.embed_tokens.weight is (4096, 64), config.json promises (4097, 64)"),
    ],
)
def test_a_config_that_cannot_be_is_refused(tkit, model, change, message):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **change}))
    assert_refused(tkit, model, message)


def test_code_beside_a_known_architecture_is_ignored(tkit, model, tmp_path):
    """Phi-3.5 and Falcon 7B name code in auto_map; their classes are built in."""
    marker = tmp_path / "ran"
    (model / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (model / "config.json").write_text(json.dumps(config))
    result = tkit("build", model, "--format", "both", "--json")
    assert result.exit_code == 0, result.output
    card = json.loads(result.stdout)
    assert "auto_map was ignored: LlamaForCausalLM is built in" in card["notes"][0]
    assert "auto_map" not in json.loads((Path("engines") / card["name"] / "hf" / "config.json").read_text())
    assert json.loads(tkit("validate", "--windows", "1", "--json").stdout)["kl"] == 0.0
    assert not marker.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not readable as JSON"),
        (b"[]", "expected a mapping of keys, found list"),
        (b'{"hidden_size": 1, "hidden_size": 2}', 'key "hidden_size" stands twice'),
        (b"\xff\xfe", "not readable as JSON"),
        (b"[" * 99999, "not readable as JSON"),
    ],
)
def test_a_config_that_is_no_config_is_refused(tkit, model, text, message):
    (model / "config.json").write_bytes(text)
    assert_refused(tkit, model, f"{model}/config.json: ", message)


ODD_VALUES = [None, "x", [], [None], {"a": 1}, -1, 0, 1.5, True, 10**400, float("nan")]


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2-moe", "gemma3", "phi3-longrope", "gptj", "falcon-new"])
def test_no_value_of_any_key_is_a_crash(name):
    architecture, arguments = MODELS[name]
    config = getattr(transformers, architecture).config_class(**arguments).to_dict()
    config |= {"architectures": [architecture], "dtype": "bfloat16"}
    for key in (*config, "rope_scaling", "rope_theta"):
        for value in ODD_VALUES:
            try:
                spec = spec_from_hf({**config, key: value}, "config.json")
                plan_moves(spec, Precision.of("none"), Parallel(tp_size=2))
                to_json(trtllm_config(spec, Precision.of("none"), Parallel(tp_size=2)))
            except InputError:
                pass


# --- the tokenizer ---


@pytest.mark.parametrize("text", ["", "[]", "{}", "not JSON"])
def test_a_tokenizer_that_is_none_is_refused(tkit, model, text):
    (model / "tokenizer.json").write_text(text)
    assert_refused(tkit, model, f"{model}/tokenizer.json: the tokenizer does not load")


# --- while it is read ---


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_that_changes_during_the_build_publishes_nothing(tkit, model, monkeypatch, name):
    convert = build_stage.convert

    def convert_and_touch(*arguments: Any, **options: Any) -> Any:
        converted = convert(*arguments, **options)
        (model / name).write_bytes((model / name).read_bytes())
        return converted

    monkeypatch.setattr(build_stage, "convert", convert_and_touch)
    assert_refused(tkit, model, "the model changed while it was read", f"  - {name} was written to or replaced\n")


def test_a_file_that_is_cut_during_the_build_publishes_nothing(tkit, model, monkeypatch):
    read = TensorFiles.read

    def cut_and_read(self: TensorFiles, name: str) -> Any:
        if name == UP:
            os.truncate(model / "model.safetensors", 9000)
        return read(self, name)

    monkeypatch.setattr(TensorFiles, "read", cut_and_read)
    assert_refused(tkit, model, f"ended while {UP} was read")
