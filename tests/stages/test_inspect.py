"""`tkit inspect`, typed as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tkit.stages.inspect import kind_of
from tkit.units import format_bytes

WIDE = {
    "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
}  # fmt: skip


@pytest.fixture
def engine(tkit, make_llama, tmp_path) -> Path:
    return tmp_path / tkit("build", make_llama(), "--tp", "2", "--pp", "2").stdout.strip()


def test_the_card_the_sizes_and_the_tensors_are_shown(tkit, engine):
    result = tkit("inspect")
    assert (result.exit_code, result.stderr) == (0, "")
    card, sizes, first, last = result.stdout.rstrip("\n").split("\n\n")
    facts = json.loads((engine / "engine.json").read_text())
    lines = card.splitlines()
    assert lines[0] == str(engine)
    assert lines[1:7] == [
        "architecture  LlamaForCausalLM",
        "dtype         bfloat16",
        "quantization  none",
        "KV cache      bfloat16",
        "layout        tp 2, pp 2: 4 GPUs",
        "parameters    0.6 M",
    ]
    assert f"command       {facts['command']}" in lines
    on_disk = [(engine / "checkpoint" / f"rank{rank}.safetensors").stat().st_size for rank in range(4)]
    assert [line.split("  ")[-1].strip() for line in sizes.splitlines()[2:]] == [
        *map(format_bytes, on_disk), format_bytes(sum(on_disk)),
    ]  # fmt: skip
    assert [line.rsplit("  ", 1)[0].rstrip() for line in sizes.splitlines()] == [
        "sizes",
        "file   embedding  attention       mlp   norms   lm_head",
        "rank0   524.3 kB    24.6 kB   49.2 kB   512 B       0 B",
        "rank1   524.3 kB    24.6 kB   49.2 kB   512 B       0 B",
        "rank2        0 B    12.3 kB   24.6 kB   384 B  262.1 kB",
        "rank3        0 B    12.3 kB   24.6 kB   384 B  262.1 kB",
        "all       1.0 MB    73.7 kB  147.5 kB  1.8 kB  524.3 kB",
    ]
    assert first == (
        "tensors of each of rank0, rank1\n"
        "tensor                                         dtype      shape  count     bytes\n"
        "transformer.vocab_embedding.weight             BF16   4096 x 64      1  524.3 kB\n"
        "transformer.layers.0-1.input_layernorm.weight  BF16          64      2     256 B\n"
        "transformer.layers.0-1.attention.qkv.weight    BF16     64 x 64      2   16.4 kB\n"
        "transformer.layers.0-1.attention.dense.weight  BF16     64 x 32      2    8.2 kB\n"
        "transformer.layers.0-1.post_layernorm.weight   BF16          64      2     256 B\n"
        "transformer.layers.0-1.mlp.fc.weight           BF16     64 x 64      2   16.4 kB\n"
        "transformer.layers.0-1.mlp.gate.weight         BF16     64 x 64      2   16.4 kB\n"
        "transformer.layers.0-1.mlp.proj.weight         BF16     64 x 64      2   16.4 kB"
    )
    assert last.splitlines()[0] == "tensors of each of rank2, rank3"
    assert last.splitlines()[-1].split() == ["lm_head.weight", "BF16", "2048", "x", "64", "1", "262.1", "kB"]


def test_the_record_holds_every_tensor(tkit, engine):
    record = json.loads(tkit("inspect", engine, "--json").stdout)
    assert record["card"] == json.loads((engine / "engine.json").read_text())
    assert [file["name"] for file in record["files"]] == [f"checkpoint/rank{rank}.safetensors" for rank in range(4)]
    for file in record["files"]:
        tensors = load_file(engine / file["name"])
        assert {tensor["name"]: (tensor["shape"], tensor["bytes"]) for tensor in file["tensors"]} == {
            name: (list(tensor.shape), tensor.nbytes) for name, tensor in tensors.items()
        }
        assert file["bytes"] == (engine / file["name"]).stat().st_size
        assert sum(file["kinds"].values()) == sum(tensor.nbytes for tensor in tensors.values())
    assert record["kinds"]["embedding"] == 2 * 4096 * 64 * 2
    assert record["kinds"]["lm_head"] == 4096 * 64 * 2
    assert record["kinds"]["other"] == 0


def test_quantized_layers_show_codes_and_scales(tkit, make_llama):
    tkit("build", make_llama(**WIDE), "--quant", "int4_awq", "--calib-samples", "2", "--calib-len", "16")
    output = tkit("inspect").stdout
    assert "quantization  int4_awq (W4A16_AWQ)\n" in output
    assert "transformer.layers.0-2.mlp.fc.weights_scaling_factor" in output
    assert "I8" in output and " scales " in output


def test_a_hugging_face_directory_is_shown_by_its_config(tkit, make_llama):
    directory = make_llama()
    result = tkit("inspect", directory)
    assert (result.exit_code, result.stderr) == (0, "")
    facts, sizes, tensors = result.stdout.rstrip("\n").split("\n\n")
    num_params = sum(tensor.numel() for tensor in load_file(directory / "model.safetensors").values())
    assert facts.splitlines() == [
        str(directory),
        "format        Hugging Face checkpoint, no engine card",
        "architecture  LlamaForCausalLM",
        "dtype         bfloat16",
        "quantization  none",
        "layers        3",
        f"parameters    {num_params / 1e6:.1f} M",
        "context       512 tokens",
        "vocabulary    4096 tokens",
        f"weights       {format_bytes(2 * num_params)}",
    ]
    assert sizes.splitlines()[2].startswith("model  ")
    assert "model.layers.0-2.self_attn.q_proj.weight" in tensors
    record = json.loads(tkit("inspect", directory, "--json").stdout)
    assert record["card"] is None and record["checkpoint"]["num_params"] == num_params


def test_checkpoints_of_every_kind_say_what_they_are_quantized_in(tkit, make_llama):
    result = tkit("build", make_llama(**WIDE), "--quant", "fp8", "--tp", "2", "--format", "both", "--calib-len", "16")
    engine = Path(result.stdout.strip())
    unified = tkit("inspect", engine / "hf").stdout
    assert "format        Hugging Face checkpoint, no engine card\n" in unified
    assert "quantization  ModelOpt, FP8" in unified
    trtllm = tkit("inspect", engine / "checkpoint").stdout
    assert "format        TensorRT-LLM checkpoint, no engine card\n" in trtllm
    assert "quantization  FP8\nlayout        tp 2, pp 1: 2 GPUs\n" in trtllm
    num_params = {line for text in (unified, trtllm) for line in text.splitlines() if line.startswith("parameters")}
    assert len(num_params) == 1


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"architectures": ["NoSuchModel"], "model_type": "none"}, "NoSuchModel"),
        ({"architecture": "LlamaForCausalLM"}, "not a TensorRT-LLM config: KeyError('dtype')"),
    ],
)
def test_what_cannot_be_inspected_is_named(tkit, tmp_path, config, problem):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if "architecture" in config:
        (tmp_path / "rank0.safetensors").touch()
    result = tkit("inspect", tmp_path)
    assert (result.exit_code, result.stdout) == (2, "") and problem in result.stderr, result.stderr


def test_every_tensor_on_request(tkit, engine):
    lines = tkit("inspect", "--tensors").stdout.splitlines()
    names = [line.split()[0] for line in lines if line.startswith("transformer.layers.")]
    assert "transformer.layers.1.mlp.fc.weight" in names
    assert not any("-" in name for name in names)


def test_a_damaged_file_is_named(tkit, engine):
    (engine / "checkpoint" / "rank1.safetensors").write_bytes(b"nonsense")
    (engine / "checkpoint" / "rank2.safetensors").unlink()
    result = tkit("inspect")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "rank1.safetensors: not a safetensors file: 8 bytes" in result.stderr
    assert "rank2.safetensors: unreadable safetensors header: No such file" in result.stderr
    assert result.stderr.endswith("hint: tkit verify checks every file\n")


def test_files_of_many_ranks_stand_in_order(tkit, engine):
    """rank10 after rank9."""
    card = json.loads((engine / "engine.json").read_text())
    name = "checkpoint/rank0.safetensors"
    for rank in range(4, 12):
        copy = f"checkpoint/rank{rank}.safetensors"
        (engine / copy).write_bytes((engine / name).read_bytes())
        card["files"][copy] = card["files"][name]
    (engine / "engine.json").write_text(json.dumps(card))
    record = json.loads(tkit("inspect", "--json").stdout)
    assert [file["name"] for file in record["files"]] == [f"checkpoint/rank{rank}.safetensors" for rank in range(12)]


def test_a_terminal_gets_a_table_that_fits(tkit, engine, monkeypatch):
    import tkit.cli.inspect as inspect

    monkeypatch.setenv("COLUMNS", "80")
    table = inspect._Table("title", ("name", ">bytes"), [("a" * 100, "1 kB"), ("b", "20 kB")])
    lines = inspect._drawn(table).splitlines()
    plain = [line.replace("\x1b[1m", "").replace("\x1b[4m", "").replace("\x1b[0m", "") for line in lines]
    assert max(map(len, plain)) <= 80
    assert "".join(plain).count("a") == 101  # nothing is cut off; one stands in "name"
    assert plain[-1].split() == ["b", "20", "kB"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("transformer.vocab_embedding.weight", "embedding"),
        ("transformer.position_embedding.weight", "embedding"),
        ("transformer.layers.0.attention.qkv.bias", "attention"),
        ("transformer.layers.0.attention.q_layernorm.weight", "norms"),
        ("transformer.layers.0.attention.kv_cache_scaling_factor", "scales"),
        ("transformer.layers.0.mlp.router.weight", "mlp"),
        ("transformer.layers.0.mlp.fc.per_channel_scale", "scales"),
        ("transformer.layers.0.mlp.fc.zero", "scales"),
        ("transformer.ln_f.bias", "norms"),
        ("lm_head.weight", "lm_head"),
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.3.self_attn.q_proj.weight", "attention"),
        ("model.layers.3.self_attn.q_proj.input_scale", "scales"),
        ("model.layers.3.mlp.down_proj.weight_scale_2", "scales"),
        ("model.norm.weight", "norms"),
        ("transformer.h.1.ln_1.weight", "norms"),
        ("something.else", "other"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind
