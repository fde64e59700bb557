"""`tkit verify`, typed as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tkit.files import sha256_file


@pytest.fixture
def engine(tkit, make_llama, tmp_path) -> Path:
    return tmp_path / tkit("build", make_llama(), "--tp", "2").stdout.strip()


def rewrite_card(engine: Path, change) -> None:
    card = json.loads((engine / "engine.json").read_text())
    change(card)
    (engine / "engine.json").write_text(json.dumps(card))


def test_an_untouched_engine_is_as_built(tkit, engine):
    result = tkit("verify")
    assert (result.exit_code, result.stderr) == (0, "verifying ...\n")
    name, rest = result.stdout.split(": ", 1)
    assert name == engine.name
    assert rest.startswith("6 files, ") and "all as built; TensorRT-LLM would load 2 ranks (" in rest
    record = json.loads(tkit("verify", engine, "--json").stdout)
    card = json.loads((engine / "engine.json").read_text())
    assert record.pop("seconds") < 10
    assert record == {
        "schema": "tkit.verification/1", "engine": engine.name, "path": str(engine), "key": card["key"],
        "command": card["command"],
        "files": 6,
        "bytes": sum(facts["bytes"] for facts in card["files"].values()), "world_size": 2, "changed": [], "refused": [],
    }  # fmt: skip


def test_one_flipped_bit_is_found(tkit, engine):
    path = engine / "checkpoint" / "rank1.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)
    result = tkit("verify", engine.name)
    assert (result.exit_code, result.stdout) == (2, "")
    card = json.loads((engine / "engine.json").read_text())
    before, after = card["files"]["checkpoint/rank1.safetensors"]["sha256"], sha256_file(path)
    assert result.stderr == (
        "verifying ...\n"
        f"error: {engine}: not as built\n"
        f"  - checkpoint/rank1.safetensors: sha256 is {after[:12]}..., the card says {before[:12]}...\n"
        f"hint: rebuild the engine: {card['command']} --force\n"
    )


def test_everything_that_is_wrong_is_listed_at_once(tkit, engine):
    checkpoint = engine / "checkpoint"
    tensors = load_file(checkpoint / "rank0.safetensors")
    del tensors["transformer.ln_f.weight"]
    save_file(tensors, checkpoint / "rank0.safetensors")
    (checkpoint / "rank1.safetensors").rename(checkpoint / "rank2.safetensors")
    (engine / "tokenizer" / "tokenizer.json").write_text("{}")
    result = tkit("verify", "--json")
    assert result.exit_code == 2
    record = json.loads(result.stdout)
    assert [line.split(":")[0] for line in record["changed"]] == [
        "checkpoint/rank0.safetensors", "checkpoint/rank1.safetensors", "tokenizer/tokenizer.json",
        "checkpoint/rank2.safetensors",
    ]  # fmt: skip
    assert record["changed"][-1] == "checkpoint/rank2.safetensors: not in the card"
    assert record["refused"] == [
        "rank2.safetensors: no place among the 2 ranks of config.json",
        "rank 0, rank0.safetensors: transformer.ln_f.weight is missing, expected BF16 (64,)",
        "rank 1: rank1.safetensors is missing",
    ]
    for line in (*record["changed"], *record["refused"]):
        assert line in result.stderr


def test_an_engine_that_was_built_wrong_exits_1(tkit, engine):
    """Its files are those of its card, but no checkpoint that TensorRT-LLM reads."""
    path = engine / "checkpoint" / "config.json"
    config = json.loads(path.read_text())
    del config["hidden_act"]
    path.write_text(json.dumps(config))
    facts = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    rewrite_card(engine, lambda card: card["files"].update({"checkpoint/config.json": facts}))
    result = tkit("verify")
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"error: {engine}: as built, but TensorRT-LLM would not load it" in result.stderr
    assert '  - config.json: key "hidden_act" is missing, LlamaForCausalLM reads it\n' in result.stderr


def test_an_engine_without_a_tensorrt_llm_checkpoint_is_only_hashed(tkit, engine):
    (engine / "checkpoint").rename(engine / "hf")
    rewrite_card(
        engine,
        lambda card: card.update(
            files={name.replace("checkpoint/", "hf/"): facts for name, facts in card["files"].items()}
        ),
    )
    result = tkit("verify")
    assert result.exit_code == 0
    assert "all as built (" in result.stdout and "TensorRT-LLM" not in result.stdout


def test_without_an_engine_it_says_how_to_get_one(tkit):
    result = tkit("verify")
    assert result.exit_code == 2
    assert result.stderr == "error: no engine in engines\nhint: build one: tkit build\n"


def test_quiet_is_quiet(tkit, engine):
    result = tkit("verify", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
