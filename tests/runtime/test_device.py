"""What runs on a GPU: on a pretended one, and, where there is one, on a real one (`pytest -m gpu`); which device is picked."""

from __future__ import annotations

import json
import queue
import shutil
from pathlib import Path

import pytest
import torch
from pretended_gpu import FACTS, FREE_BYTES, PEAK_BYTES, PretendedGpu
from transformers import GPT2Config, LlamaConfig, MistralConfig, MixtralConfig, Qwen2Config

from tkit import demo
from tkit.errors import InputError
from tkit.runtime import calibration, load
from tkit.runtime.device import pick_device
from tkit.runtime.engine import Engine, _default_kv_bytes
from tkit.runtime.forward import kv_bytes_per_token
from tkit.specs.generation import GenerationChunk, GenerationRequest

SIZES = {  # the smallest that every format can group
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64,
}  # fmt: skip
FORMATS = ["fp8", "int8_sq", "int4_awq", "int4_gptq", "w4a8_awq", "nvfp4"]
CALIBRATION = ("--calib-samples", "3", "--calib-len", "32")
WAITS_PER_LAYER = 60  # 4 inputs of linear layers, 5 modules of up to 5 tensors each; none per exponent, row or channel


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> PretendedGpu:
    """To be entered. Models compute in bfloat16 on both devices."""
    for name, answer in FACTS.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(calibration, "compute_dtype", lambda spec, device: torch.bfloat16)
    monkeypatch.setattr(load, "_dtype", lambda own, device: torch.bfloat16)
    return PretendedGpu()


@pytest.fixture
def mixtral(tmp_path: Path, make_model) -> Path:
    model = make_model(MixtralConfig, **SIZES | {"vocab_size": 4096, "num_local_experts": 3, "num_hidden_layers": 1})
    model.to(torch.bfloat16).save_pretrained(tmp_path / "mixtral")
    for path in demo.MODEL_DIR.glob("tokenizer*"):
        shutil.copyfile(path, tmp_path / "mixtral" / path.name)
    return tmp_path / "mixtral"


def check_build(tkit, gpu: PretendedGpu, *arguments: str | Path) -> None:
    """It writes the CPU's bytes; the card says where it ran and what that took."""
    command = ("build", *arguments, *CALIBRATION)
    here = tkit(*command, "--out", "here")
    with gpu:
        there = tkit(*command, "--out", "there", "--device", "cuda")
    assert (here.exit_code, there.exit_code) == (0, 0), here.output + there.output
    expected, card = (json.loads(Path(result.stdout.strip(), "engine.json").read_text()) for result in (here, there))
    assert card["files"]["checkpoint/rank0.safetensors"] == expected["files"]["checkpoint/rank0.safetensors"]
    assert (card["build"]["device"], card["build"]["peak_gpu_memory_bytes"]) == ("cuda", PEAK_BYTES)
    assert "of the GPU 20.0 MB" in there.stderr
    assert gpu.waits["cpu"] > 0  # it was there


@pytest.mark.parametrize("quant", FORMATS)
def test_every_format_is_calibrated_on_the_gpu(tkit, gpu, make_llama, quant):
    check_build(tkit, gpu, make_llama(**SIZES), "--quant", quant, "--kv-cache", "fp8")
    assert gpu.waits.total() < WAITS_PER_LAYER * SIZES["num_hidden_layers"]


@pytest.mark.parametrize("quant", ["fp8", "int4_awq"])
def test_experts_are_calibrated_on_the_gpu(tkit, gpu, monkeypatch, mixtral, quant):
    monkeypatch.setattr(calibration, "EXPERT_TOKENS", 60)  # some saw fewer
    check_build(tkit, gpu, mixtral, "--quant", quant)


@pytest.mark.parametrize(
    "options", [("fp8", "--kv-cache", "fp8"), ("nvfp4", "--format", "hf"), ("int8_sq", "--kv-cache", "int8")], ids=str
)
def test_a_checkpoint_is_validated_on_the_gpu(tkit, build, gpu, make_llama, options):
    engine = build(make_llama(**SIZES), *CALIBRATION, "--quant", *options)
    here = tkit("validate", engine, "--windows", "1", "--device", "cpu", "--json")
    with gpu:
        there = tkit("validate", engine, "--windows", "1", "--device", "cuda", "--json")
    assert (here.exit_code, there.exit_code) == (0, 0), here.output + there.output
    expected, record = json.loads(here.stdout), json.loads(there.stdout)
    assert record == expected | {"device": "cuda", "created": record["created"]}
    assert gpu.waits.total() > 0


class GpuEngine(Engine):
    """Its thread, too, has the GPU."""

    def _run(self) -> None:
        with PretendedGpu() as self.gpu:
            super()._run()


REQUESTS = [
    GenerationRequest(prompt="The king said", max_tokens=12, temperature=0.0, end_id=-1),
    GenerationRequest(prompt="In the", max_tokens=9, temperature=0.8, seed=3, end_id=-1),
    GenerationRequest(prompt="the word", max_tokens=5, top_k=20, top_p=0.8, seed=5, return_log_probs=True, end_id=-1),
    GenerationRequest(prompt="Don't", max_tokens=7, temperature=0.0, repetition_penalty=1.3, min_tokens=4, end_id=5),
]


def answers(engine: Engine) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in REQUESTS]
    ended: queue.Queue[str | None] = queue.Queue()

    def submit(request: GenerationRequest, answer: list[int]) -> None:
        def on_chunk(chunk: GenerationChunk) -> None:
            answer.extend(chunk.token_ids)
            if chunk.finish_reason:
                ended.put(chunk.error)

        engine.submit(request, on_chunk)

    with engine:
        for request, answer in zip(REQUESTS, tokens, strict=True):
            submit(request, answer)
        assert [ended.get(timeout=120) for _ in REQUESTS] == [None] * len(REQUESTS)
    return tokens


@pytest.mark.parametrize("config_class", [LlamaConfig, MistralConfig, GPT2Config], ids=lambda value: value.__name__)
def test_the_engine_gives_the_same_tokens_on_the_gpu(gpu, make_model, byte_level, config_class):
    model = make_model(config_class, sliding_window=8)
    here = answers(Engine(model, byte_level, prefill_chunk=3))
    with gpu:
        engine = GpuEngine(model.to("cuda"), byte_level, prefill_chunk=3)
        assert answers(engine) == here
    assert engine.gpu.waits["tolist"] <= 2 * sum(map(len, here)) + 5  # tokens, and whether they are sound
    assert engine.gpu.waits["item"] == engine.gpu.waits["__getitem__"] == 0


def on_a_real_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")(test))


def validated(tkit, engine: Path, device: str) -> dict:
    result = tkit("validate", engine, "--windows", "2", "--device", device, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@on_a_real_gpu
@pytest.mark.parametrize("quant", FORMATS)
def test_a_real_gpu_calibrates_as_well(tkit, quant):
    """In bfloat16, where a CPU may compute in float32: other roundings, the same quality. Twice the same bytes."""
    engines, files = {}, {}
    for out, device in (("cpu", "cpu"), ("gpu", "cuda"), ("again", "cuda")):
        result = tkit("build", "--quant", quant, "--kv-cache", "fp8", *CALIBRATION, "--device", device, "--out", out)
        assert result.exit_code == 0, result.output
        engines[out] = Path(result.stdout.strip())
        card = json.loads((engines[out] / "engine.json").read_text())
        files[out] = card["files"]["checkpoint/rank0.safetensors"]
    assert files["again"] == files["gpu"]
    assert card["build"]["peak_gpu_memory_bytes"] > 0
    here, there = (validated(tkit, engines[out], "cuda") for out in ("cpu", "gpu"))
    assert there["kl"] == pytest.approx(here["kl"], rel=0.2)


@on_a_real_gpu
@pytest.mark.parametrize("quant", ["fp8_rowwise", "int8_sq", "nvfp4"])
def test_a_real_gpu_validates_as_the_cpu_does(tkit, build, quant):
    engine = build("demo", "--quant", quant, "--kv-cache", "int8", *CALIBRATION)
    here, there = validated(tkit, engine, "cpu"), validated(tkit, engine, "cuda")
    assert there["ppl"] == pytest.approx(here["ppl"], rel=0.01)
    assert there["kl"] == pytest.approx(here["kl"], rel=0.3)
    assert there["layer_snr_db"] == pytest.approx(here["layer_snr_db"], abs=1)


@on_a_real_gpu
def test_the_engine_gives_the_same_tokens_on_a_real_gpu(make_model, byte_level):
    here = answers(Engine(make_model(), byte_level, prefill_chunk=3))
    assert answers(Engine(make_model().to("cuda"), byte_level, prefill_chunk=3)) == here


def test_the_cache_leaves_room_for_attention(gpu, make_model):
    """With a mask, attention takes keys and values of one layer once per query head: 7 times, in Qwen2.5 7B's shape."""
    model = make_model(Qwen2Config, num_attention_heads=14, num_key_value_heads=2, hidden_size=224)
    per_token = kv_bytes_per_token(model)
    with gpu:
        tokens = _default_kv_bytes(model.to("cuda"), per_token) // per_token
    keys_and_values = 2 * 2 * 16 * 4 * tokens  # of one layer: 2 heads of 16 float32
    assert 0.75 * FREE_BYTES < 3 * keys_and_values + 7 * keys_and_values <= 0.8 * FREE_BYTES


@pytest.mark.parametrize(
    ("device", "has_gpu", "picked"),
    [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_auto_is_the_gpu_where_there_is_one(gpu, monkeypatch, device, has_gpu, picked):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    with gpu:
        assert pick_device(device) == picked


def test_a_gpu_that_is_not_there_is_named_with_what_hides_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(InputError, match="--device cuda: torch .* is built without CUDA"):
        pick_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(InputError, match='torch sees no GPU; CUDA_VISIBLE_DEVICES is ""'):
        pick_device("cuda")
    with pytest.raises(InputError, match="cuda:1: expected one of auto, cpu, cuda\nhint: CUDA_VISIBLE_DEVICES chooses"):
        pick_device("cuda:1")


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_does_not_compute_is_found_before_the_work(gpu, monkeypatch, device):
    def fails(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore words")

    monkeypatch.setattr(torch, "zeros", fails)
    with pytest.raises(InputError, match="cannot compute on the GPU: CUDA error: no kernel image .* on the device\n"):
        pick_device(device)


def test_memory_that_does_not_suffice_is_one_error_with_the_numbers(tkit, gpu, monkeypatch, make_llama):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(calibration, "_stacked", full)
    with gpu:
        result = tkit("build", make_llama(**SIZES), "--quant", "fp8", *CALIBRATION, "--device", "cuda")
    assert result.exit_code == 1
    assert (
        "error: a decoder layer with its calibration tokens does not fit on the GPU: 60.0 MB of 80.0 MB are free, "
        "this process took up to 20.0 MB\nhint: use --device cpu"
    ) in result.stderr
    assert not list(Path("engines").iterdir())
