"""Checkpoints that are quantized already: every code and scale of the source in the right place, and the same model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from quantized_sources import CONV1D, FP8_KINDS, INT4_KINDS, Layer, Source, make_source
from safetensors.torch import load_file, save_file

from tkit import demo
from tkit.errors import InputError
from tkit.runtime.load import load_model, load_source

SIZES = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 512, "initializer_range": 0.1, "tie_word_embeddings": False,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
TOKENS = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(7))
MakeSource = Callable[..., Source]


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """plain_model("qwen2") -> the 16-bit model that the sources are made of."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            directory = tmp_path_factory.mktemp(family)
            model_class = getattr(transformers, CLASSES[family])
            torch.manual_seed(3)
            changes = {"mixtral": {"num_local_experts": 2}, "gpt2": {"num_key_value_heads": 8}}.get(family, {})
            model = model_class(model_class.config_class(**{**SIZES, **changes}))
            for parameter in model.parameters():
                if parameter.dim() == 1:  # biases of zero would hide one that is lost
                    parameter.data += 0.3 * torch.randn_like(parameter)
            model.to(torch.bfloat16).save_pretrained(directory)
            for path in demo.MODEL_DIR.glob("tokenizer*"):
                shutil.copyfile(path, directory / path.name)
            made[family] = directory
        return made[family]

    return make


@pytest.fixture(scope="session")
def quantized(plain_model, tmp_path_factory: pytest.TempPathFactory) -> MakeSource:
    """quantized("gptq", "qwen2") -> a source that nobody may change."""
    made: dict[tuple[str, str], Source] = {}

    def make(kind: str, family: str = "llama") -> Source:
        if (kind, family) not in made:
            directory = tmp_path_factory.mktemp("source") / f"{family}-{kind}"
            made[kind, family] = make_source(kind, plain_model(family), directory)
        return made[kind, family]

    return make


def modules(source: Source, layer: int) -> dict[str, list[Layer]]:
    """{TensorRT-LLM's module: the layers it stacks}"""
    prefix = f"model.layers.{layer}."
    names = {"attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
             "attention.dense": ["self_attn.o_proj"], "mlp.fc": ["mlp.gate_proj"], "mlp.gate": ["mlp.up_proj"],
             "mlp.proj": ["mlp.down_proj"]}  # fmt: skip
    return {module: [source.layers[prefix + part] for part in parts] for module, parts in names.items()}


def shard(parts: list[torch.Tensor], module: str, tp: int, rank: int) -> torch.Tensor:
    """One rank's share: rows of each part, or columns where the input is split."""
    if module in ("attention.dense", "mlp.proj"):
        return parts[0].chunk(tp, dim=1)[rank]
    return torch.cat([part.chunk(tp)[rank] for part in parts])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("kind", INT4_KINDS)
@pytest.mark.parametrize(("family", "tp"), [("llama", 1), ("qwen2", 2)])
def test_four_bit_codes_and_scales_are_the_sources_own(quantized, build, family, kind, tp):
    source = quantized(kind, family)
    engine = build(source.directory, "--tp", tp)
    has_zero_points, group = INT4_KINDS[kind][2:]
    config = json.loads((engine / "checkpoint" / "config.json").read_text())["quantization"]
    assert (config["quant_algo"], config["group_size"], config["has_zero_point"], config["pre_quant_scale"]) == (
        "W4A16_AWQ", group, has_zero_points, False,
    )  # fmt: skip
    for rank in range(tp):
        stored = load_file(engine / "checkpoint" / f"rank{rank}.safetensors")
        for index in range(2):
            for module, layers in modules(source, index).items():
                name = f"transformer.layers.{index}.{module}."
                q = shard([torch.from_numpy(layer.u - 8) for layer in layers], module, tp, rank)
                packed = (q[0::2] & 15) | (q[1::2] & 15) << 4
                assert torch.equal(stored[name + "weight"].view(torch.uint8), packed.to(torch.uint8)), name
                s = shard([layer.s for layer in layers], module, tp, rank)
                assert torch.equal(bits(stored[name + "weights_scaling_factor"]), bits(s.float())), name
                assert (name + "zero" in stored) == has_zero_points
                if has_zero_points:
                    z = shard([torch.from_numpy(layer.z) for layer in layers], module, tp, rank)
                    zero = ((8 - z) * s.float()).to(torch.bfloat16)
                    assert torch.equal(bits(stored[name + "zero"]), bits(zero.T)), name
    card = json.loads((engine / "engine.json").read_text())
    assert (card["quant"], card["quant_algo"]) == ("int4", "W4A16_AWQ")
    assert card["notes"][0].startswith("carried over from ") and f"4 bit, group {group}" in card["notes"][0]
    assert "-int4-tp" in card["name"]


def truth(plain: Path, source: Source) -> transformers.PreTrainedModel:
    """transformers' own model of the 16-bit checkpoint, with the weights that the source means."""
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    state = {f"{name}.weight": layer.weight.T if name.endswith(CONV1D) else layer.weight
             for name, layer in source.layers.items()}  # fmt: skip
    model.load_state_dict(state, strict=False)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("kind", INT4_KINDS)
def test_the_model_is_the_one_that_the_codes_mean(plain_model, quantized, build, kind):
    source = quantized(kind, "qwen2")
    expected = logits(truth(plain_model("qwen2"), source))
    assert torch.equal(logits(load_source(source.directory, "cpu")), expected)
    found = logits(load_model(build(source.directory, "--tp", 2), "cpu")[0])
    if INT4_KINDS[kind][2]:  # (8 - z) s is rounded to bfloat16
        assert (found - expected).abs().mean() < 0.02 * expected.std()
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["gptq", "gptq-asymmetric"])
def test_layers_that_are_stored_transposed(plain_model, quantized, build, kind):
    source = quantized(kind, "gpt2")
    expected = logits(truth(plain_model("gpt2"), source))
    assert torch.equal(logits(load_source(source.directory, "cpu")), expected)
    found = [logits(load_model(build(source.directory, "--tp", tp), "cpu")[0]) for tp in (1, 2)]
    assert torch.equal(*found)
    assert (found[0] - expected).abs().mean() < 0.02 * expected.std()
    assert kind == "gptq-asymmetric" or torch.equal(found[0], expected)


@pytest.mark.parametrize("kind", ["awq", "modelopt-fp8"])
def test_transposed_layers_in_other_formats_are_refused(quantized, tkit, kind):
    source = quantized(kind, "gpt2")
    result = tkit("build", source.directory)
    assert result.exit_code == 2 and "c_attn, c_proj, c_fc are Conv1D layers" in result.stderr, result.stderr
    with pytest.raises(InputError, match="Conv1D"):
        load_source(source.directory, "cpu")


def under_one_scale(layers: list[Layer]) -> list[Layer]:
    """What TensorRT-LLM and vLLM make of FP8 layers when they fuse them: rounded to the largest scale, one by one."""
    largest = max(layer.s.float().reshape(()) for layer in layers)
    inputs = max(layer.input_scale for layer in layers)
    fused = []
    for layer in layers:
        codes = layer.codes
        if layer.s.float().reshape(()) != largest:
            codes = (layer.codes.float() * layer.s.float() / largest).to(torch.float8_e4m3fn)
        fused.append(Layer(largest, codes=codes, input_scale=inputs))
    return fused


FUSED = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]]


def fused(source: Source, groups: list[list[str]] = FUSED) -> Source:
    """The source with those layers under one scale."""
    layers = dict(source.layers)
    for index in range(2):
        for group in groups:
            names = [f"model.layers.{index}.{part}" for part in group]
            layers.update(zip(names, under_one_scale([source.layers[name] for name in names]), strict=True))
    return Source(source.directory, None, layers)


STATIC = ["modelopt-fp8", "modelopt-fp8-apart", "compressed-fp8", "fp8-static"]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", [*STATIC, "compressed-fp8-dynamic"])
def test_eight_bit_codes_and_scales_are_the_sources_own(quantized, build, kind, tp):
    """Where TensorRT-LLM has one scale, for q, k and v and for fc and gate, the others are rounded to the largest, and the
    card says so."""
    source = quantized(kind)
    engine = build(source.directory, "--tp", tp)
    is_dynamic = kind == "compressed-fp8-dynamic"
    expected = source if is_dynamic else fused(source)
    for rank in range(tp):
        stored = load_file(engine / "checkpoint" / f"rank{rank}.safetensors")
        for index in range(2):
            for module, layers in modules(expected, index).items():
                name = f"transformer.layers.{index}.{module}."
                if is_dynamic:
                    rows = torch.cat([layer.s for layer in layers])
                    if module in ("attention.qkv", "mlp.fc", "mlp.gate"):
                        rows = shard([layer.s for layer in layers], module, tp, rank)
                    assert torch.equal(stored[name + "per_channel_scale"], rows.float())
                else:
                    assert torch.equal(stored[name + "weights_scaling_factor"], layers[0].s.float().reshape(1))
                    assert torch.equal(stored[name + "activation_scaling_factor"], layers[0].input_scale.reshape(1))
                codes = shard([layer.codes for layer in layers], module, tp, rank)
                assert torch.equal(bits(stored[name + "weight"]), bits(codes)), name
    card = json.loads((engine / "engine.json").read_text())
    assert card["quant"] == ("fp8_rowwise" if is_dynamic else "fp8")
    scales = {
        name: (layer.s.float().sum(), expected.layers[name].s.float().sum()) for name, layer in source.layers.items()
    }
    num_apart = sum(own != common for own, common in scales.values())
    assert [note for note in card["notes"] if "one for them, the largest" in note] == (
        [f"{num_apart} of 14 layers have a smaller scale than others that they are fused with; TensorRT-LLM has one for "
         "them, the largest, and their codes were rounded to it"] if num_apart else []
    )  # fmt: skip
    assert (num_apart > 0) == (kind in ("modelopt-fp8-apart", "compressed-fp8", "fp8-static"))


def round_inputs(model: transformers.PreTrainedModel, scale_of: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Every layer of the decoder reads what an FP8 kernel makes of its input."""

    def hook(name: str) -> Callable[..., tuple[torch.Tensor]]:
        def round_input(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            scale = scale_of(name, arguments[0])
            return ((arguments[0] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale,)

        return round_input

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(hook(name))


@pytest.mark.parametrize("kind", [kind for kind in FP8_KINDS if not kind.endswith("-kv")])
def test_an_untouched_fp8_source_computes_what_its_kernels_would(plain_model, quantized, kind):
    source = quantized(kind)
    model = truth(plain_model("llama"), source)

    def scale_of(name: str, x: torch.Tensor) -> torch.Tensor:
        if kind == "compressed-fp8-dynamic":
            return x.abs().amax(-1, keepdim=True) / 448
        if kind == "fp8-blocks":
            return (x.unflatten(-1, (-1, 128)).abs().amax(-1) / 448).repeat_interleave(128, -1)
        return source.layers[name].input_scale

    round_inputs(model, scale_of)
    assert torch.equal(logits(load_source(source.directory, "cpu")), logits(model))


def test_scales_of_the_kv_cache_come_along(quantized, build):
    source = quantized("modelopt-fp8-kv")
    engine = build(source.directory, "--tp", 2, "--format", "both")
    config = json.loads((engine / "checkpoint" / "config.json").read_text())["quantization"]
    assert config["kv_cache_quant_algo"] == "FP8"
    hf = load_file(engine / "hf" / "model.safetensors")
    for rank in range(2):
        stored = load_file(engine / "checkpoint" / f"rank{rank}.safetensors")
        for index in range(2):
            prefix = f"model.layers.{index}.self_attn."
            scales = [source.kv_scales[f"{prefix}{part}_proj.{part}_scale"] for part in "kv"]
            found = stored[f"transformer.layers.{index}.attention.kv_cache_scaling_factor"]
            assert torch.equal(found, max(scales).reshape(1))
            assert [hf[f"{prefix}{part}_proj.{part}_scale"] for part in "kv"] == scales
    card = json.loads((engine / "engine.json").read_text())
    assert "the scales of the KV cache, fp8, were carried over too" in card["notes"]
    (engine / "checkpoint").rename(engine / "away")
    expected = logits(load_source(source.directory, "cpu"))
    assert torch.equal(logits(load_model(engine, "cpu")[0]), expected)
    assert not torch.equal(logits(load_source(quantized("modelopt-fp8").directory, "cpu")), expected)


def test_an_engine_of_rows_is_its_source(quantized, build):
    source = quantized("compressed-fp8-dynamic")
    engine, _ = load_model(build(source.directory, "--tp", 2), "cpu")
    assert torch.equal(logits(engine), logits(load_source(source.directory, "cpu")))


@pytest.fixture
def model_of(plain_model) -> Callable[[Source], Any]:
    """transformers' model with the weights of a source, whose layers read rounded inputs."""

    def make(source: Source) -> Any:
        model = truth(plain_model("llama"), source)
        round_inputs(model, lambda name, x: source.layers[name].input_scale)
        return model

    return make


@pytest.mark.parametrize("kind", STATIC)
def test_what_is_run_has_the_scales_that_it_is_served_with(quantized, build, model_of, kind):
    """Both checkpoints of an engine, and the untouched source where it is what is tried instead of what it is compared with."""
    source = quantized(kind)
    engine = build(source.directory, "--tp", 2, "--format", "both")
    found = [load_model(engine, "cpu")[0], load_model(source.directory, "cpu")[0]]
    (engine / "checkpoint").rename(engine / "away")
    expected = logits(model_of(fused(source)))
    for model in (*found, load_model(engine, "cpu")[0]):
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(load_source(source.directory, "cpu")), logits(model_of(source)))


def unfuse(checkpoint: Path, source: Source) -> None:
    """Puts the source's own codes and scales back into fc and gate, as another converter may have written them."""
    stored = load_file(checkpoint / "rank0.safetensors")
    for index in range(2):
        for module in ("mlp.fc", "mlp.gate"):
            (layer,) = modules(source, index)[module]
            name = f"transformer.layers.{index}.{module}."
            stored[name + "weight"] = layer.codes
            stored[name + "weights_scaling_factor"] = layer.s.float().reshape(1)
            stored[name + "activation_scaling_factor"] = layer.input_scale.reshape(1)
    save_file(stored, checkpoint / "rank0.safetensors")


def test_fc_and_gate_that_are_stored_apart_run_as_the_build_fuses_them(quantized, build, tkit, model_of):
    source = quantized("fp8-static")
    engine = build(source.directory)
    validate = ("validate", engine / "checkpoint", "--source", source.directory, "--windows", "1", "--json")
    shared = json.loads(tkit(*validate).stdout)
    unfuse(engine / "checkpoint", source)
    apart = json.loads(tkit(*validate).stdout)
    assert shared["kl"] > 0 and shared["kl"] == apart["kl"]
    assert torch.equal(logits(load_model(engine, "cpu")[0]), logits(model_of(fused(source))))
    # behind this activation trtllm-build leaves them apart
    path = engine / "checkpoint" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "gelu_pytorch_tanh"}))
    alone = model_of(fused(source, FUSED[:1]))
    for layer in alone.model.layers:
        layer.mlp.act_fn = transformers.activations.ACT2FN["gelu_pytorch_tanh"]
    assert torch.equal(logits(load_model(engine, "cpu")[0]), logits(alone))


def test_fc_and_gate_that_are_not_fused_keep_their_codes(tkit, quantized, build, tmp_path):
    source = quantized("fp8-static")
    directory = Path(shutil.copytree(source.directory, tmp_path / "source"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu_pytorch_tanh"}))
    stored = load_file(build(directory) / "checkpoint" / "rank0.safetensors")
    for index in range(2):
        for module, layers in modules(fused(source, FUSED[:1]), index).items():
            name = f"transformer.layers.{index}.{module}."
            assert torch.equal(bits(stored[name + "weight"]), bits(torch.cat([layer.codes for layer in layers]))), name
            assert torch.equal(stored[name + "weights_scaling_factor"], layers[0].s.float().reshape(1))
            assert torch.equal(stored[name + "activation_scaling_factor"], layers[0].input_scale.reshape(1))


# --- experts ---


@pytest.mark.parametrize("kind", ["gptq-asymmetric", "compressed", "compressed-fp8"])
def test_experts_keep_their_codes(quantized, build, kind):
    """fc holds [up; gate] of every expert, proj w2; each rank has a half of each."""
    source = quantized(kind, "mixtral")
    engine = build(source.directory, "--tp", 2)
    for rank in range(2):
        stored = load_file(engine / "checkpoint" / f"rank{rank}.safetensors")
        for index in range(2):
            experts = [f"model.layers.{index}.block_sparse_moe.experts.{expert}." for expert in range(2)]
            for module, parts in (("mlp.fc", ("w3", "w1")), ("mlp.proj", ("w2",))):
                name = f"transformer.layers.{index}.{module}."
                cut = "attention.dense" if module == "mlp.proj" else module
                found = {part: stored[name + part] for part in ("weight", "weights_scaling_factor")}
                for expert, prefix in enumerate(experts):
                    layers = [source.layers[prefix + part] for part in parts]
                    if kind == "compressed-fp8":
                        layers = under_one_scale(layers)
                        codes = shard([layer.codes for layer in layers], cut, 2, rank)
                        assert torch.equal(bits(found["weight"][expert]), bits(codes))
                        assert torch.equal(found["weights_scaling_factor"][expert], layers[0].s.reshape(1))
                        continue
                    q = shard([torch.from_numpy(layer.u - 8) for layer in layers], cut, 2, rank)
                    packed = ((q[0::2] & 15) | (q[1::2] & 15) << 4).to(torch.uint8)
                    assert torch.equal(bits(found["weight"][expert]), bits(packed)), name
                    s = shard([layer.s for layer in layers], cut, 2, rank).float()
                    assert torch.equal(found["weights_scaling_factor"][expert], s)
                    if kind == "gptq-asymmetric":
                        z = shard([torch.from_numpy(layer.z) for layer in layers], cut, 2, rank)
                        assert torch.equal(stored[name + "zero"][expert], ((8 - z) * s).to(torch.bfloat16).T)
                if kind == "compressed-fp8":
                    inputs = [source.layers[prefix + part].input_scale for prefix in experts for part in parts]
                    assert torch.equal(stored[name + "activation_scaling_factor"], max(inputs).reshape(1))
    found, expected = (logits(load_model(path, "cpu")[0]) for path in (engine, source.directory))
    if kind in ("compressed", "compressed-fp8"):
        assert torch.equal(found, expected)
    else:  # zero points are rounded once more
        assert (found - expected).abs().mean() < 0.02 * expected.std()


def test_experts_in_blocks_are_copied(quantized, build):
    source = quantized("fp8-blocks", "mixtral")
    engine = build(source.directory, "--format", "hf")
    expected, found = (load_file(path / "model.safetensors") for path in (source.directory, engine / "hf"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(bits(found[name]), bits(expected[name])) for name in expected)
    assert torch.equal(logits(load_model(engine, "cpu")[0]), logits(load_source(source.directory, "cpu")))


# --- the Hugging Face checkpoint ---


@pytest.mark.parametrize("kind", ["modelopt-awq", "modelopt-fp8", "modelopt-fp8-apart", "fp8-blocks"])
def test_what_its_readers_know_already_is_copied(quantized, build, kind):
    source = quantized(kind)
    engine = build(source.directory, "--format", "hf")
    expected, found = (load_file(path / "model.safetensors") for path in (source.directory, engine / "hf"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(bits(found[name]), bits(tensor)), name
    configs = [json.loads((path / "config.json").read_text()) for path in (source.directory, engine / "hf")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert torch.equal(*(logits(load_model(path, "cpu")[0]) for path in (engine, source.directory)))


@pytest.mark.parametrize("kind", ["gptq", "compressed", "compressed-fp8", "compressed-fp8-dynamic", "fp8-static"])
def test_others_become_the_unified_form(quantized, build, kind):
    source = quantized(kind)
    engine = build(source.directory, "--format", "both")
    stored = load_file(engine / "hf" / "model.safetensors")
    for name, layer in source.layers.items():
        if layer.codes is None:
            q = torch.from_numpy(layer.u - 8)
            codes = ((q[0::2] & 15) | (q[1::2] & 15) << 4).to(torch.uint8)
        else:
            codes = layer.codes
        assert torch.equal(bits(stored[f"{name}.weight"]), bits(codes))
        assert stored[f"{name}.weight"].dtype == codes.dtype
        scale = layer.s.float()
        assert torch.equal(stored[f"{name}.weight_scale"], scale if kind != "compressed-fp8" and scale.numel() > 1
                           else scale.reshape(()))  # fmt: skip
    assert json.loads((engine / "hf" / "config.json").read_text())["quantization_config"]["quant_method"] == "modelopt"
    (engine / "checkpoint").rename(engine / "away")
    assert torch.equal(*(logits(load_model(path, "cpu")[0]) for path in (engine, source.directory)))


# --- refusals ---


@pytest.fixture
def spoiled(quantized, tmp_path) -> Callable[..., Path]:
    """spoiled("gptq", lambda tensors: ...) -> a copy with other tensors, or other words in its quantization_config."""

    def spoil(kind: str, change: Callable[[dict[str, torch.Tensor]], Any] | None = None, **config: Any) -> Path:
        directory = Path(shutil.copytree(quantized(kind).directory, tmp_path / "source"))
        if change is not None:
            tensors = load_file(directory / "model.safetensors")
            change(tensors)
            save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        if config:
            values = json.loads((directory / "config.json").read_text())
            values["quantization_config"] |= config
            (directory / "config.json").write_text(json.dumps(values))
        return directory

    return spoil


def assert_refused(result: Any, *messages: str) -> None:
    assert result.exit_code == 2, result.output
    assert (result.stdout, result.stderr.count("error: ")) == ("", 1)
    for message in messages:
        assert message in result.stderr
    assert not Path("engines").exists() or list(Path("engines").iterdir()) == []


Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def test_everything_wrong_with_the_tensors_is_listed_at_once(tkit, spoiled):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{Q}.qzeros"]
        tensors[f"{UP}.scales"] = tensors[f"{UP}.scales"][:, :-8].contiguous()
        tensors[f"{UP}.qweight"] = tensors[f"{UP}.qweight"].short()
        tensors[f"{Q}.perm"] = torch.zeros(3)

    assert_refused(
        tkit("build", spoiled("gptq", change)),
        f"{Q}.qzeros is missing, expected (2, 32)",
        f"{UP}.scales is (2, 504), config.json promises (2, 512)",
        f"{UP}.qweight is I16, expected I32",
        f"{Q}.perm (3,) has no place in this architecture",
    )


def shuffled(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({name: tensors[name].flip(0).contiguous()})


@pytest.mark.parametrize(
    ("kind", "change", "config", "messages"),
    [
        ("gptq", shuffled(f"{Q}.g_idx"), {}, [f"{Q}.g_idx is in the order of activations (desc_act)"]),
        ("gptq", lambda tensors: tensors.pop(f"{Q}.g_idx"), {"desc_act": True}, [f"{Q}.g_idx is missing"]),
        ("gptq-asymmetric", None, {"sym": True}, [f"{Q}.qzeros are not all 8, though the format says sym"]),
        ("gptq", None, {"bits": 8}, ["8 bits, expected 4", "known: AutoAWQ (gemm), GPTQ"]),
        ("gptq", None, {"group_size": -1, "bits": 3}, ["group_size is -1", "3 bits, expected 4"]),
        ("gptq", None, {"checkpoint_format": "marlin"}, ["checkpoint_format is 'marlin', expected gptq or gptq_v2"]),
        ("awq", None, {"version": "gemv"}, ["version is 'gemv', expected gemm"]),
        ("awq", None, {"quant_method": "aqlm"}, ['unknown quant_method "aqlm"', "known: AutoAWQ"]),
        ("modelopt-fp8", None, {"quant_algo": "NVFP4"}, ["quant_algo is 'NVFP4', expected FP8"]),
        ("fp8-static", None, {"activation_scheme": "none"}, ["activation_scheme is 'none'"]),
        ("fp8-blocks", None, {"weight_block_size": [64, 64]}, ["weight_block_size is [64, 64]"]),
        ("compressed", None, {"config_groups": {}}, ["config_groups has 0 groups of weights"]),
        ("compressed", None, {"format": "int-quantized"}, ["format is 'int-quantized'"]),
        ("fp8-blocks", None, {}, ["TensorRT-LLM's engines have no such layers", "use --format hf"]),
        ("fp8-static", lambda tensors: tensors[f"{Q}.weight"].view(torch.uint8)[0].fill_(127), {},
         [f"{Q}.weight: 256 of 65536 values are NaN"]),
        ("awq", lambda tensors: tensors[f"{Q}.scales"].fill_(float("inf")), {}, [f"{Q}.scales: 512 of 512 values are NaN"]),
    ],
)  # fmt: skip
def test_what_cannot_be_carried_over_is_refused_by_name(tkit, spoiled, kind, change, config, messages):
    assert_refused(tkit("build", spoiled(kind, change, **config)), *messages)


def test_a_group_that_tp_would_cut_is_refused(tkit, quantized):
    assert_refused(
        tkit("build", quantized("gptq").directory, "--tp", 4), "in size 256 is not a multiple of 512 (128 x tp 4)"
    )


def test_zero_points_have_no_unified_form(tkit, quantized):
    assert_refused(tkit("build", quantized("awq").directory, "--format", "hf"), "the unified form has no zero points")


@pytest.mark.parametrize("quant", ["int8", "int4_awq"])
def test_a_source_is_not_quantized_twice(tkit, quantized, quant):
    result = tkit("build", quantized("gptq").directory, "--quant", quant)
    assert_refused(
        result, f"quantized already (GPTQ, 4 bit, group 128); --quant {quant} would", "leave the options out"
    )


def test_some_layers_may_stay_in_16_bits(tkit, plain_model, quantized, spoiled, build):
    """What modules_to_not_convert, ignore and exclude_modules are for."""
    layers = [name for name in quantized("gptq-asymmetric").layers if name.startswith("model.layers.1.mlp.")]
    plain = load_file(plain_model("llama") / "model.safetensors")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for layer in layers:
            for part in ("qweight", "qzeros", "scales", "g_idx"):
                del tensors[f"{layer}.{part}"]
            tensors[f"{layer}.weight"] = plain[f"{layer}.weight"]

    source = spoiled("gptq-asymmetric", change)
    engine = build(source, "--tp", 2)
    config = json.loads((engine / "checkpoint" / "config.json").read_text())["quantization"]
    assert {f"transformer.layers.1.mlp.{name}" for name in ("fc", "gate", "proj")} <= set(config["exclude_modules"])
    model = truth(plain_model("llama"), quantized("gptq-asymmetric"))
    model.load_state_dict({f"{layer}.weight": plain[f"{layer}.weight"].float() for layer in layers}, strict=False)
    assert torch.equal(logits(load_source(source, "cpu")), logits(model))
    found = logits(load_model(engine, "cpu")[0])
    assert (found - logits(model)).abs().mean() < 0.02 * logits(model).std()


def test_half_a_module_is_refused(tkit, spoiled):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.weight"] = torch.ones(256, 256, dtype=torch.bfloat16)

    assert_refused(tkit("build", spoiled("gptq", change)), f"transformer.layers.0.attention.qkv: {Q}.weight in 16 bits")


def test_biases_of_zeros_are_no_biases(tkit, spoiled):
    """AutoGPTQ wrote them for every layer."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.bias"] = torch.zeros(256, dtype=torch.bfloat16)
        tensors[f"{UP}.bias"] = torch.ones(512, dtype=torch.bfloat16)

    result = tkit("build", spoiled("gptq", change))
    assert_refused(result, f"{UP}.bias (512,) has no place in this architecture")
    assert f"{Q}.bias" not in result.stderr


def test_a_trivial_order_is_in_order(tkit, spoiled):
    assert tkit("build", spoiled("gptq", desc_act=True)).exit_code == 0


def test_validate_compares_with_what_the_source_means(tkit, quantized, build):
    build(quantized("gptq").directory)
    record = json.loads(tkit("validate", "--windows", "1", "--json").stdout)
    assert (record["kl"], record["top1"]) == (0.0, 1.0)
    build(quantized("awq").directory, "--tp", 2)
    assert 0 < json.loads(tkit("validate", "--windows", "1", "--json").stdout)["kl"] < 0.01


def test_inspect_and_the_summary_say_where_the_codes_come_from(tkit, quantized):
    result = tkit("build", quantized("awq").directory)
    assert "carried over from AutoAWQ, 4 bit, group 128, zero points" in result.stderr
    shown = tkit("inspect").stdout
    assert "int4 (W4A16_AWQ)" in shown and "carried over from AutoAWQ, 4 bit, group 128, zero points" in shown
