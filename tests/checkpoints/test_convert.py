"""Rank files against a derivation of their own: torch slices of the source, written the obvious way."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tkit.architectures.config import spec_from_hf
from tkit.architectures.moves import plan_moves
from tkit.checkpoints.convert import check_sources, convert
from tkit.checkpoints.merge import merge
from tkit.checkpoints.reader import open_ranks, open_source
from tkit.errors import InputError
from tkit.runtime.bits import to_torch
from tkit.specs.parallel import Parallel
from tkit.specs.precision import Precision
from tkit.specs.progress import Progress


def write_checkpoint(model_dir, out, tp_size=1, pp_size=1):
    spec = spec_from_hf(json.loads((model_dir / "config.json").read_text()), "config.json")
    moves = plan_moves(spec, Precision.of("none"), Parallel(tp_size=tp_size, pp_size=pp_size))
    with open_source(model_dir) as source:
        check_sources(source, moves, ())
        files = convert(source, moves, spec.dtype, out, None, Progress())
    return spec, moves, files


def expected_rank(source, config, tp_size, pp_size, rank):
    """What TensorRT-LLM's own converter puts into one rank file, one line per tensor."""
    tp_rank, pp_rank = rank % tp_size, rank // tp_size
    heads, kv_heads, head = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]

    def rows(name):
        return source[name + ".weight"].chunk(tp_size, dim=0)[tp_rank]

    def columns(name):
        return source[name + ".weight"].chunk(tp_size, dim=1)[tp_rank]

    def kv_rows(name):
        by_head = source[name + ".weight"].reshape(kv_heads, head, -1)
        by_head = by_head.repeat_interleave(max(tp_size // kv_heads, 1), dim=0)
        return by_head.chunk(tp_size)[tp_rank].reshape(-1, by_head.shape[-1])

    tensors = {}
    if pp_rank == 0:
        tensors["transformer.vocab_embedding.weight"] = source["model.embed_tokens.weight"]
    stages = torch.tensor_split(torch.arange(config["num_hidden_layers"]), pp_size)
    for local, layer in enumerate(stages[pp_rank].tolist()):
        ours, theirs = f"transformer.layers.{local}.", f"model.layers.{layer}."
        qkv = [rows(theirs + "self_attn.q_proj")] + [kv_rows(theirs + f"self_attn.{part}_proj") for part in "kv"]
        tensors[ours + "attention.qkv.weight"] = torch.cat(qkv)
        tensors[ours + "attention.dense.weight"] = columns(theirs + "self_attn.o_proj")
        tensors[ours + "mlp.fc.weight"] = rows(theirs + "mlp.gate_proj")
        tensors[ours + "mlp.gate.weight"] = rows(theirs + "mlp.up_proj")
        tensors[ours + "mlp.proj.weight"] = columns(theirs + "mlp.down_proj")
        tensors[ours + "input_layernorm.weight"] = source[theirs + "input_layernorm.weight"]
        tensors[ours + "post_layernorm.weight"] = source[theirs + "post_attention_layernorm.weight"]
        assert (
            tensors[ours + "attention.qkv.weight"].shape[0] == (heads // tp_size + 2 * -(-kv_heads // tp_size)) * head
        )
    if pp_rank == pp_size - 1:
        tensors["transformer.ln_f.weight"] = source["model.norm.weight"]
        head_weight = source.get("lm_head.weight", source["model.embed_tokens.weight"])
        padding = torch.zeros(-len(head_weight) % tp_size, head_weight.shape[1], dtype=head_weight.dtype)
        tensors["lm_head.weight"] = torch.cat([head_weight, padding]).chunk(tp_size)[tp_rank]
    return tensors


@pytest.mark.parametrize("pp_size", [1, 2])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("shape", [{"tie_word_embeddings": True}, {"vocab_size": 4099}], ids=["tied", "odd-vocab"])
def test_rank_files_hold_what_tensorrt_llm_splits(make_llama, tmp_path, shape, tp_size, pp_size):
    model_dir = make_llama(**shape)  # 2 KV heads: repeated at tp 4; 3 layers: uneven at pp 2
    source = load_file(model_dir / "model.safetensors")
    config = json.loads((model_dir / "config.json").read_text())
    write_checkpoint(model_dir, tmp_path, tp_size, pp_size)
    assert len(list(tmp_path.iterdir())) == tp_size * pp_size
    for rank in range(tp_size * pp_size):
        found = load_file(tmp_path / f"rank{rank}.safetensors")  # the real library reads our files
        expected = expected_rank(source, config, tp_size, pp_size, rank)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (4, 2)])
def test_merge_gives_back_every_bit(make_llama, tmp_path, tp_size, pp_size):
    model_dir = make_llama(vocab_size=4099)
    source = load_file(model_dir / "model.safetensors")
    _, moves, _ = write_checkpoint(model_dir, tmp_path, tp_size, pp_size)
    merged = {}
    with open_ranks(tmp_path, tp_size * pp_size) as files:
        for move, parts in merge(files, moves):
            assert move.transform is None
            merged.update(zip(move.sources, to_torch(*parts["weight"]).split(move.source_rows), strict=True))
    assert merged.keys() == source.keys()
    for name, tensor in source.items():
        assert torch.equal(merged[name].view(torch.int16), tensor.view(torch.int16)), name


def test_float32_sources_are_rounded_to_float16_as_the_official_tools_do(make_llama, tmp_path):
    model_dir = make_llama(dtype="float32")
    write_checkpoint(model_dir, tmp_path)
    source = load_file(model_dir / "model.safetensors")
    found = load_file(tmp_path / "rank0.safetensors")
    weight = source["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(found["transformer.layers.1.mlp.proj.weight"], weight.to(torch.float16))


def test_published_digest_is_that_of_the_file(make_llama, tmp_path):
    import hashlib

    _, _, files = write_checkpoint(make_llama(), tmp_path, tp_size=2)
    for name, facts in files.items():
        data = (tmp_path / name).read_bytes()
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_header_is_complete_before_data(make_llama, tmp_path):
    _, _, files = write_checkpoint(make_llama(), tmp_path)
    with safe_open(tmp_path / "rank0.safetensors", "pt") as file:
        names = list(file.keys())
    data = (tmp_path / "rank0.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header.keys() - {"__metadata__"} == set(names)
    assert (8 + int.from_bytes(data[:8], "little")) % 8 == 0


def test_every_mismatch_between_weights_and_config_is_listed(make_llama):
    model_dir = make_llama()
    config = json.loads((model_dir / "config.json").read_text())
    spec = spec_from_hf({**config, "intermediate_size": 256, "num_hidden_layers": 4}, "config.json")
    with open_source(model_dir) as source, pytest.raises(InputError) as error:
        check_sources(source, plan_moves(spec, Precision.of("none"), Parallel()), ())
    text = str(error.value)
    assert "model.layers.2.mlp.up_proj.weight is (128, 64), config.json promises (256, 64)" in text
    assert "model.layers.3.self_attn.k_proj.weight is missing, expected (32, 64)" in text
    assert len(error.value.problems) == 3 * 3 + 9


def test_a_tensor_without_a_place_is_named(make_llama):
    model_dir = make_llama()
    config = json.loads((model_dir / "config.json").read_text())
    spec = spec_from_hf({**config, "num_hidden_layers": 2}, "config.json")
    with (
        open_source(model_dir) as source,
        pytest.raises(InputError, match="model.layers.2.mlp.up_proj.weight .* no place"),
    ):
        check_sources(source, plan_moves(spec, Precision.of("none"), Parallel()), ())
