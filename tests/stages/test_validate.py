from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from tkit import demo


@pytest.fixture
def built(tkit):
    def build(*arguments):
        result = tkit("build", *arguments)
        assert result.exit_code == 0, result.output
        return Path(result.stdout.strip())

    return build


def test_plain_build_agrees_with_its_source_exactly(tkit, built):
    engine = built("--tp", "2")
    record = json.loads(tkit("validate", "--windows", "2", "--json").stdout)
    assert (record["kl"], record["top1"], record["ppl_ratio"]) == (0.0, 1.0, 1.0)
    assert record == json.loads((engine / "validation.json").read_text())


def test_perplexity_is_that_of_transformers_loss(tkit, built):
    built()
    record = json.loads(tkit("validate", "--windows", "3", "--json").stdout)
    ids = Tokenizer.from_file(str(demo.MODEL_DIR / "tokenizer.json")).encode(demo.HELD_OUT.read_text()).ids
    ids = ids if ids[0] != 1 else ids[1:]  # without the beginning-of-sequence token
    stride = len(ids) // 3
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR, dtype=torch.float32)
    windows = torch.tensor([ids[i * stride : i * stride + 512] for i in range(3)])
    with torch.inference_mode():
        loss = model(windows, labels=windows).loss.item()
    assert record["ppl_source"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert record["tokens"] == 3 * 511


def test_coarser_formats_lie_further_from_the_source(tkit, built):
    kl = {}
    for quant in ("int8", "fp8", "int4_awq"):
        engine = built("--quant", quant)
        kl[quant] = json.loads(tkit("validate", engine, "--windows", "4", "--json").stdout)["kl"]
    assert 0 < kl["int8"] < kl["fp8"] < kl["int4_awq"] < 0.05


def test_gates_exit_3_and_name_the_threshold(tkit, built):
    built("--quant", "int4_awq")
    result = tkit("validate", "--windows", "2", "--max-kl", "1e-9", "--max-ppl-ratio", "0.5")
    assert result.exit_code == 3
    assert "exceeds 1e-09" in result.stderr and "exceeds 0.5" in result.stderr
    assert tkit("validate", "--windows", "2", "--max-kl", "1").exit_code == 0


def test_a_bit_flip_in_a_published_file_is_found(tkit, built):
    engine = built()
    path = engine / "checkpoint" / "rank0.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result = tkit("validate")
    assert result.exit_code == 2
    assert "checkpoint/rank0.safetensors" in result.stderr


def test_no_engine_yet(tkit):
    result = tkit("validate")
    assert result.exit_code == 2
    assert "no engine in engines" in result.stderr and "tkit build" in result.stderr


def test_a_text_without_a_full_window_is_refused(tkit, built, tmp_path):
    built()
    (tmp_path / "short.txt").write_text("too short")
    result = tkit("validate", "--text", tmp_path / "short.txt")
    assert result.exit_code == 2
    assert "tokens, one window needs 512" in result.stderr
