"""TensorRT-LLM checkpoints that NVIDIA ModelOpt 0.47 wrote (tests/data/modelopt): merged into the model they were cut from.

They differ from tkit's: the embedding is split over the vocabulary, RoPE and most keys are missing from config.json, and
the vocabulary may be padded.
"""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tkit.runtime.load import load_model

READER = Path(__file__).parents[2] / "benchmarks" / "_trtllm_reader.py"
DATA = Path(__file__).parents[1] / "data" / "modelopt"
PARTS = {"attention.dense": "self_attn.o_proj", "mlp.fc": "mlp.gate_proj", "mlp.gate": "mlp.up_proj",
         "mlp.proj": "mlp.down_proj"}  # fmt: skip
NORMS = {"input_layernorm": "input_layernorm", "post_layernorm": "post_attention_layernorm"}


@pytest.fixture
def merged(tmp_path):
    """merged("qwen2-awq") -> the loaded model."""

    def load(name: str) -> transformers.PreTrainedModel:
        shutil.copytree(DATA / name, tmp_path / "checkpoint")
        return load_model(tmp_path, "cpu")[0]

    return load


def ranks(name: str) -> list[dict[str, torch.Tensor]]:
    return [load_file(path) for path in sorted((DATA / name).glob("rank*.safetensors"))]


def test_plain_shards_of_two_stages_are_the_source(merged):
    model = merged("llama-none-tp2-pp2")
    source = load_file(DATA / "llama-plain" / "model.safetensors")
    state = model.state_dict()
    assert state.keys() == source.keys()
    for name, tensor in source.items():
        assert torch.equal(state[name], tensor.float()), name
    assert model.config.rope_parameters["rope_theta"] == 10000.0  # the source's is 500000: ModelOpt lost it


def whole(parts: list[torch.Tensor], module: str) -> torch.Tensor:
    return torch.cat(parts, dim=1 if module in ("attention.dense", "mlp.proj") else 0)


def test_fp8_with_a_quantized_cache(merged):
    state = merged("llama-fp8-kv-tp2").state_dict()
    shards = ranks("llama-fp8-kv-tp2")
    for layer in range(2):
        ours, theirs = f"transformer.layers.{layer}.", f"model.layers.{layer}."
        scale = {module: shards[0][f"{ours}{module}.weights_scaling_factor"] for module in (*PARTS, "attention.qkv")}
        for module, part in PARTS.items():
            expected = whole([shard[f"{ours}{module}.weight"].float() for shard in shards], module) * scale[module]
            assert torch.equal(state[f"{theirs}{part}.weight"], expected), part
        q, k, v = (
            torch.cat(pieces) * scale["attention.qkv"]  # of each rank: 2 query heads, a key and a value head
            for pieces in zip(
                *(shard[f"{ours}attention.qkv.weight"].float().split((16, 8, 8)) for shard in shards), strict=True
            )
        )
        for part, expected in (("q", q), ("k", k), ("v", v)):
            assert torch.equal(state[f"{theirs}self_attn.{part}_proj.weight"], expected), part
    for name, stored in (("model.embed_tokens", "transformer.vocab_embedding"), ("lm_head", "lm_head")):
        rows = torch.cat([shard[f"{stored}.weight"] for shard in shards])[:91]  # 92 with the padding
        assert torch.equal(state[f"{name}.weight"], rows.float())


def test_awq_with_a_factor_per_module_and_biases(merged):
    state = merged("qwen2-awq").state_dict()
    (stored,) = ranks("qwen2-awq")
    ours, theirs = "transformer.layers.0.", "model.layers.0."

    def weight(module: str) -> torch.Tensor:
        packed = stored[f"{ours}{module}.weight"].int()
        low, high = (packed & 15), (packed >> 4 & 15)
        q = torch.stack((low, high), dim=1).flatten(0, 1)
        q = torch.where(q > 7, q - 16, q)
        s = stored[f"{ours}{module}.weights_scaling_factor"].to(torch.bfloat16).float()  # as the loader casts it
        return q * s.repeat_interleave(128, dim=1) * stored[f"{ours}{module}.prequant_scaling_factor"].float()

    for module, part in PARTS.items():
        assert torch.equal(state[f"{theirs}{part}.weight"], weight(module)), part
    q, k, v = weight("attention.qkv").split((128, 64, 64))
    biases = stored[f"{ours}attention.qkv.bias"].float().split((128, 64, 64))
    for part, expected, bias in zip("qkv", (q, k, v), biases, strict=True):
        assert torch.equal(state[f"{theirs}self_attn.{part}_proj.weight"], expected)
        assert torch.equal(state[f"{theirs}self_attn.{part}_proj.bias"], bias)
    for name, norm in NORMS.items():
        assert torch.equal(state[f"{theirs}{norm}.weight"], stored[f"{ours}{name}.weight"].float())
    assert len(state["model.embed_tokens.weight"]) == 128  # its config.json says so too: 91 padded


@pytest.mark.parametrize("quant", ["int8", "int4", "nvfp4"])
def test_what_its_config_does_not_say(merged, quant):
    """INT8 is finished codes, INT4 has no factors though the config promises them, NVFP4's scales are numbers without a
    dimension. Against the benchmarks' reader, which shares no code with tkit."""
    model = merged(f"llama-{quant}")
    other = transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
    runpy.run_path(str(READER))["load"](other, DATA / f"llama-{quant}")
    (stored,) = ranks(f"llama-{quant}")
    other.lm_head.weight.data = stored["lm_head.weight"].float()
    tokens = torch.randint(0, 40, (2, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found, expected = model(tokens).logits, other(tokens).logits
    assert (found - expected).abs().mean() < 1e-3 * expected.abs().mean()


@pytest.mark.parametrize("algorithm", ["W8A16", "W8A8_SQ_PER_CHANNEL"])
def test_int8_in_a_hugging_face_checkpoint(tmp_path, algorithm):
    """The codes of llama-int8 under the names that ModelOpt's other exporter gives them."""
    (stored,) = ranks("llama-int8")
    random = torch.Generator().manual_seed(4)
    tensors = {
        "model.embed_tokens.weight": stored["transformer.vocab_embedding.weight"],
        "model.norm.weight": stored["transformer.ln_f.weight"],
        "lm_head.weight": stored["lm_head.weight"],
    }
    for ours, theirs in NORMS.items():
        tensors[f"model.layers.0.{theirs}.weight"] = stored[f"transformer.layers.0.{ours}.weight"]
    linears = {}
    for module, parts in {"attention.qkv": "qkv", **PARTS}.items():
        codes, scales = (
            stored[f"transformer.layers.0.{module}.{part}"] for part in ("weight", "weights_scaling_factor")
        )
        names = [f"self_attn.{part}_proj" for part in parts] if parts == "qkv" else [parts]
        rows = (128, 64, 64) if parts == "qkv" else (len(codes),)
        for name, q, s in zip(names, codes.split(rows), scales.split(rows), strict=True):
            name = f"model.layers.0.{name}"
            tensors |= {f"{name}.weight": q.clone(), f"{name}.weight_scale": s.clone()}
            if algorithm != "W8A16":
                tensors[f"{name}.pre_quant_scale"] = (torch.rand(128, generator=random) + 0.5).bfloat16()
                tensors[f"{name}.input_scale"] = 0.01 + 0.02 * torch.rand((), generator=random)
            linears[name] = q.float() * s[:, None]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = load_model(DATA / "llama-int8", "cpu")[0]
    config = expected.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": algorithm}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if algorithm != "W8A16":
        for name, weight in linears.items():
            factor, scale = (tensors[f"{name}.{part}"].float() for part in ("pre_quant_scale", "input_scale"))
            expected.get_submodule(name).weight.data = weight
            expected.get_submodule(name).register_forward_pre_hook(
                lambda _, arguments, f=factor, s=scale: ((arguments[0] * f / s).round().clamp(-128, 127) * s,)
            )
    tokens = torch.randint(0, 40, (2, 24), generator=random)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path, "cpu")[0](tokens).logits, expected(tokens).logits)


# --- the commands on a checkpoint without a card ---


def test_verify_names_what_modelopt_leaves_out(tkit):
    result = tkit("verify", DATA / "llama-none-tp2-pp2")
    assert result.exit_code == 1
    assert 'key "rotary_base" is missing, LlamaForCausalLM reads it' in result.stderr
    assert "not as built" not in result.stderr


@pytest.mark.parametrize(
    ("quant", "problem"),
    [
        ("nvfp4", None),  # its exclude_modules names lm_head alone, which is enough for it
        ("int4", "attention.qkv.prequant_scaling_factor is missing"),
        ("int8", "exclude_modules replaces the defaults and leaves out transformer.vocab_embedding"),
    ],
)
def test_verify_of_what_modelopt_writes_with_its_keys_put_back(tkit, tmp_path, quant, problem):
    checkpoint = Path(shutil.copytree(DATA / f"llama-{quant}", tmp_path / "checkpoint"))
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"rotary_base": 10000.0, "rotary_scaling": None, "attn_bias": False, "mlp_bias": False}
    (checkpoint / "config.json").write_text(json.dumps(config))
    result = tkit("verify", checkpoint)
    assert result.exit_code == (1 if problem else 0), result.output
    assert problem is None or problem in result.stderr


def test_verify_loads_what_is_complete(tkit, make_llama):
    engine = Path(tkit("build", make_llama(), "--tp", "2").stdout.strip())
    result = tkit("verify", engine / "checkpoint")
    assert result.exit_code == 0, result.output
    assert "TensorRT-LLM would load 2 ranks" in result.stdout + result.stderr
    (engine / "checkpoint" / "rank1.safetensors").unlink()
    assert "rank1.safetensors is missing" in tkit("verify", engine / "checkpoint").stderr


def test_validate_runs_any_checkpoint_against_any_model(tkit, make_llama):
    source = make_llama()
    engine = Path(tkit("build", source, "--tp", "2").stdout.strip())
    for checkpoint in (engine / "checkpoint", source):
        record = json.loads(tkit("validate", checkpoint, "--source", source, "--windows", "1", "--json").stdout)
        assert (record["kl"], record["key"]) == (0.0, None)
        assert not (checkpoint / "validation.json").exists()
    result = tkit("validate", engine / "checkpoint")
    assert result.exit_code == 2 and "give --source" in result.stderr


def test_a_padded_vocabulary_does_not_count(tmp_path):
    from tkit.runtime.evaluate import compare_models

    tokens = torch.randint(0, 91, (1, 16), generator=torch.Generator().manual_seed(0))
    model = load_model(DATA / "qwen2-awq", "cpu")[0]  # 128 rows for 91 tokens
    original = load_model(DATA / "qwen2-awq", "cpu")[0]
    original.resize_token_embeddings(91)
    assert compare_models(original, model, tokens, lambda done: None).kl == 0.0


def test_verify_of_a_model_says_what_it_is_not(tkit, make_llama):
    result = tkit("verify", make_llama())
    assert result.exit_code == 2
    assert "neither an engine nor a TensorRT-LLM checkpoint" in result.stderr
