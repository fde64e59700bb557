from __future__ import annotations

import dataclasses
import json
import math
import shutil

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from tkit import demo
from tkit.errors import GateFailed
from tkit.runtime.load import load_model
from tkit.stages.engines import read_card
from tkit.stages.validate import check_gates, stored_validation


def test_plain_build_agrees_with_its_source_exactly(tkit, build):
    engine = build("--tp", "2")
    record = json.loads(tkit("validate", "--windows", "2", "--json").stdout)
    assert (record["kl"], record["top1"], record["ppl_ratio"]) == (0.0, 1.0, 1.0)
    assert record["layer_snr_db"] == [None] * 4
    assert all(sample["source"] == sample["engine"] for sample in record["samples"])
    assert record == json.loads((engine / "validation.json").read_text())


def test_perplexity_is_that_of_transformers_loss(tkit, build):
    build()
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


def test_coarser_formats_lie_further_from_the_source(tkit, build):
    kl = {}
    for quant in ("int8", "fp8_rowwise", "int4"):
        engine = build("--quant", quant)
        kl[quant] = json.loads(tkit("validate", engine, "--windows", "2", "--json").stdout)["kl"]
    assert 0 < kl["int8"] < kl["fp8_rowwise"] < kl["int4"] < 0.05


def test_each_layer_has_the_noise_that_it_makes_itself(tkit, build):
    """Against the source with one quantized layer put into it: nothing else differs then."""
    engine = build("--quant", "int8", "--kv-cache", "fp8", "--calib-samples", "2", "--calib-len", "64")
    text = tkit("validate", "--windows", "3").stdout
    record = json.loads((engine / "validation.json").read_text())
    quantized, _ = load_model(engine, "cpu")
    ids = Tokenizer.from_file(str(demo.MODEL_DIR / "tokenizer.json"))
    ids = ids.encode(demo.HELD_OUT.read_text(), add_special_tokens=False).ids
    windows = torch.tensor([ids[i * (len(ids) // 3) : i * (len(ids) // 3) + 512] for i in range(2)])
    source = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR, dtype=torch.float32)
    with torch.inference_mode():
        expected = source.model(windows, output_hidden_states=True).hidden_states
        for index in range(3):  # what follows the last layer is behind the final norm
            mixed = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR, dtype=torch.float32)
            mixed.model.layers[index] = quantized.model.layers[index]
            found = mixed.model(windows, output_hidden_states=True).hidden_states[index + 1]
            signal, noise = expected[index + 1].square().sum(), (expected[index + 1] - found).square().sum()
            assert record["layer_snr_db"][index] == pytest.approx(10 * math.log10(signal / noise), abs=0.1)
    worst = min(range(4), key=lambda layer: record["layer_snr_db"][layer])
    assert f"least signal to noise: layer {worst} {record['layer_snr_db'][worst]:.1f} dB" in text


def test_samples_are_what_either_model_goes_on_with(tkit, build):
    engine = build("--quant", "int4")
    record = json.loads(tkit("validate", "--windows", "2", "--json").stdout)
    tokenizer = Tokenizer.from_file(str(demo.MODEL_DIR / "tokenizer.json"))
    ids = tokenizer.encode(demo.HELD_OUT.read_text(), add_special_tokens=False).ids
    prompt = torch.tensor([ids[len(ids) // 2 :][:32]])
    sample = record["samples"][1]
    assert sample["prompt"] == tokenizer.decode(prompt[0].tolist())
    source = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR, dtype=torch.float32)
    went_on = []
    for model, name in ((source, "source"), (load_model(engine, "cpu")[0], "engine")):
        tokens = prompt
        for _ in range(32):  # without a cache
            with torch.inference_mode():
                tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
        went_on.append(tokens[0, 32:].tolist())
        assert sample[name] == tokenizer.decode(went_on[-1])
    same = next((i for i, pair in enumerate(zip(*went_on, strict=True)) if pair[0] != pair[1]), 32)
    assert sample["same_tokens"] == same


def test_gates_exit_3_and_name_the_threshold(tkit, build, make_llama):
    build(make_llama(), "--quant", "int8")
    result = tkit("validate", "--windows", "1", "--max-kl", "1e-9", "--max-ppl-ratio", "0.5")
    assert result.exit_code == 3
    assert "exceeds 1e-09" in result.stderr and "exceeds 0.5" in result.stderr
    assert tkit("validate", "--windows", "1", "--max-kl", "1").exit_code == 0


def test_a_bit_flip_in_a_published_file_is_found(tkit, build, make_llama):
    engine = build(make_llama())
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


def test_a_text_without_a_full_window_is_refused(tkit, build, tmp_path):
    build()
    (tmp_path / "short.txt").write_text("too short")
    result = tkit("validate", "--text", tmp_path / "short.txt")
    assert result.exit_code == 2
    assert "tokens, one window needs 512" in result.stderr
    (tmp_path / "bytes.txt").write_bytes(b"ab\xff")
    result = tkit("validate", "--text", tmp_path / "bytes.txt")
    assert result.exit_code == 2 and "bytes.txt: not UTF-8 text: byte 2 is 0xff" in result.stderr


def test_a_number_that_is_none_passes_no_gate(tkit, build, make_llama):
    """NaN is not larger than any limit."""
    engine = build(make_llama())
    tkit("validate", "--windows", "1")
    record = stored_validation(engine, read_card(engine))
    with pytest.raises(GateFailed, match="kl nan exceeds 0.1"):
        check_gates(dataclasses.replace(record, kl=math.nan), max_kl=0.1, max_ppl_ratio=2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: (model / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
        (lambda model: (model / "tokenizer.json").write_text("{"), "model/tokenizer.json: the tokenizer does not"),
        (lambda model: edit(model / "config.json", bos_token_id=[]), "transformers refuses it: Validation error"),
        (lambda model: edit(model / "config.json", architectures=None), 'no "architectures" entry'),
    ],
)
def test_a_source_that_does_not_load_is_refused(tkit, tmp_path, change, message):
    model = tmp_path / "model"
    shutil.copytree(demo.MODEL_DIR, model)
    change(model)
    result = tkit("validate", demo.MODEL_DIR, "--source", model, "--windows", "1")
    assert result.exit_code == 2
    assert str(model) in result.stderr and message in result.stderr


def edit(path, **changes):
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def test_a_tokenizer_that_transformers_cannot_read_is_refused(tkit, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(demo.MODEL_DIR, model)
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"no SentencePiece model")
    result = tkit("build", model)
    assert result.exit_code == 2
    assert "transformers makes no tokenizer.json of its tokenizer: " in result.stderr
    assert not list(tmp_path.glob("engines/*"))


def test_another_model_as_source_is_refused(tkit, build, make_llama):
    engine = build()
    result = tkit("validate", engine, "--source", make_llama(), "--windows", "1")
    assert result.exit_code == 2
    assert f"{engine} was not made from {make_llama()}" in result.stderr
    assert "layers: 3 and 4" in result.stderr and "hidden_size: 64 and 256" in result.stderr


def test_tokens_that_the_model_does_not_embed_are_named(tkit, make_llama):
    small = make_llama(vocab_size=100)
    result = tkit("validate", small, "--source", small, "--windows", "1")
    assert result.exit_code == 2 and "of the text, the model embeds 100" in result.stderr
