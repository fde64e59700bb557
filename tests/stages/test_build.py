"""`tkit build`, typed as a user types it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tkit.files import sha256_file
from tkit.quantize import int4
from tkit.specs.quantization import QUANT_FORMATS

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}


@pytest.fixture
def copy_model(make_llama, tmp_path):
    """A model directory that a test may spoil."""

    def copy(**overrides):
        return Path(shutil.copytree(make_llama(**overrides), tmp_path / "model"))

    return copy


def assert_nothing_left(directory: Path = Path("engines")) -> None:
    assert not directory.exists() or not list(directory.iterdir())


def test_with_nothing_but_options_it_builds_the_demo_model(tkit):
    result = tkit("build", "--tp", "2", "--quant", "int4_awq")
    assert result.exit_code == 0, result.output
    engine = Path(result.stdout.splitlines()[-1])
    assert engine.parent == Path("engines") and engine.name.startswith("demo-int4_awq-tp2-")
    card = json.loads((engine / "engine.json").read_text())
    on_disk = {str(path.relative_to(engine)) for path in engine.rglob("*") if path.is_file()}
    assert card["files"].keys() == on_disk - {"engine.json"}
    for name, facts in card["files"].items():
        assert (engine / name).stat().st_size == facts["bytes"]
        assert sha256_file(engine / name) == facts["sha256"]
    assert (card["tp_size"], card["quant"], card["quant_algo"]) == (2, "int4_awq", "W4A16_AWQ")
    assert card["num_params"] == sum(
        p.numel() for p in load_file(Path(card["source"]["path"]) / "model.safetensors").values()
    )
    assert "peak memory" in result.stderr


def test_equal_inputs_give_the_engine_that_exists(tkit, make_llama):
    first = tkit("build", make_llama(), "--tp", "2")
    card = Path(first.stdout.strip()) / "engine.json"
    stamp = card.stat().st_mtime_ns
    second = tkit("build", make_llama(), "--tp", "2")
    assert (second.exit_code, second.stdout, card.stat().st_mtime_ns) == (0, first.stdout, stamp)
    assert "built from the same inputs" in second.stderr
    forced = tkit("build", make_llama(), "--tp", "2", "--force")
    assert (forced.exit_code, forced.stdout) == (0, first.stdout)
    assert card.stat().st_mtime_ns > stamp
    assert len(list(Path("engines").iterdir())) == 1


def test_other_weights_give_another_name(tkit, copy_model):
    model_dir = copy_model()
    first = tkit("build", model_dir)
    weights = load_file(model_dir / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})
    second = tkit("build", model_dir)
    assert first.stdout != second.stdout


def test_json_is_the_card(tkit, make_llama):
    result = tkit("build", make_llama(), "--json")
    card = json.loads(result.stdout)
    assert card == json.loads((Path("engines") / card["name"] / "engine.json").read_text())


def test_dry_run_prints_every_tensor_and_writes_nothing(tkit, make_llama):
    result = tkit("build", make_llama(**WIDE), "--tp", "2", "--quant", "int4_awq", "--dry-run", "--json")
    plan = json.loads(result.stdout)
    assert_nothing_left()
    built = tkit("build", make_llama(**WIDE), "--tp", "2", "--quant", "int4_awq")
    assert Path(built.stdout.strip()).name == plan["name"]
    for name, tensors in plan["files"].items():
        written = load_file(Path(built.stdout.strip()) / name)
        assert {key: list(tensor.shape) for key, tensor in written.items()} == {
            k: v["shape"] for k, v in tensors.items()
        }


def test_fp8_tensors_equal_a_direct_recomputation(tkit, make_llama):
    source = load_file(make_llama(**WIDE) / "model.safetensors")
    engine = Path(tkit("build", make_llama(**WIDE), "--quant", "fp8").stdout.strip())
    stored = load_file(engine / "checkpoint" / "rank0.safetensors")
    for layer in range(3):
        ours, theirs = f"transformer.layers.{layer}.", f"model.layers.{layer}."
        groups = {"attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                  "attention.dense": ["self_attn.o_proj"], "mlp.fc": ["mlp.gate_proj"], "mlp.gate": ["mlp.up_proj"],
                  "mlp.proj": ["mlp.down_proj"]}  # fmt: skip
        for module, parts in groups.items():
            weight = torch.cat([source[f"{theirs}{part}.weight"] for part in parts]).float()
            fused = ["mlp.gate_proj", "mlp.up_proj"] if module in ("mlp.fc", "mlp.gate") else parts
            scale = (max(source[f"{theirs}{part}.weight"].abs().max().float() for part in fused) / 448).reshape(1)
            assert torch.equal(stored[f"{ours}{module}.weights_scaling_factor"], scale)
            expected = (weight / scale).to(torch.float8_e4m3fn)
            assert torch.equal(stored[f"{ours}{module}.weight"].view(torch.uint8), expected.view(torch.uint8))
            assert stored[f"{ours}{module}.activation_scaling_factor"].shape == (1,)


def test_int4_awq_stores_codes_and_scales_of_the_grid_on_both_ranks(tkit, make_llama):
    """Given the factor and the scales that the search chose, every code is the nearest; the byte layout is by hand."""
    source = load_file(make_llama(**WIDE) / "model.safetensors")
    engine = Path(tkit("build", make_llama(**WIDE), "--quant", "int4_awq", "--tp", "2").stdout.strip())
    layer = "transformer.layers.1."
    for rank in range(2):
        stored = load_file(engine / "checkpoint" / f"rank{rank}.safetensors")
        assert torch.equal(*(stored[f"{layer}mlp.{name}.prequant_scaling_factor"] for name in ("fc", "gate")))
        for name, weight in (
            ("mlp.gate", source["model.layers.1.mlp.up_proj.weight"].float().chunk(2)[rank]),
            ("attention.dense", source["model.layers.1.self_attn.o_proj.weight"].float().chunk(2, dim=1)[rank]),
        ):
            scaled = weight / stored[f"{layer}{name}.prequant_scaling_factor"].float()
            scales = stored[f"{layer}{name}.weights_scaling_factor"]
            groups = scaled.reshape(len(scaled), -1, 128)
            ratio = scales * 7 / groups.abs().amax(dim=-1)
            assert ((ratio > 0.69) & (ratio < 1.01)).all() and ratio.min() < 0.95  # clipped, within the grid of ratios
            nearest = (groups / scales[..., None]).round().clamp(-8, 7).reshape(scaled.shape).to(torch.int64)
            packed = stored[f"{layer}{name}.weight"].to(torch.int64) & 255
            nibbles = torch.stack((packed & 15, packed >> 4), dim=1).reshape(nearest.shape)
            distance = (torch.where(nibbles < 8, nibbles, nibbles - 16) - nearest).abs()
            assert (distance <= 1).float().mean() > 0.95  # compensation moves a code by a step or so


def test_rowwise_fp8_and_plain_int4_equal_a_direct_recomputation(tkit, make_llama):
    source = load_file(make_llama(**WIDE) / "model.safetensors")
    weight = source["model.layers.2.mlp.up_proj.weight"].float()
    name = "transformer.layers.2.mlp.gate."
    engine = Path(tkit("build", make_llama(**WIDE), "--quant", "fp8_rowwise").stdout.strip())
    stored = load_file(engine / "checkpoint" / "rank0.safetensors")
    scale = weight.abs().amax(dim=1) / 448
    assert torch.equal(stored[name + "per_channel_scale"], scale)
    expected = (weight / scale[:, None]).to(torch.float8_e4m3fn)
    assert torch.equal(stored[name + "weight"].view(torch.uint8), expected.view(torch.uint8))
    engine = Path(tkit("build", make_llama(**WIDE), "--quant", "int4").stdout.strip())
    stored = load_file(engine / "checkpoint" / "rank0.safetensors")
    groups = weight.reshape(len(weight), -1, 128)
    scale = (groups.abs().amax(dim=-1) / 7).to(torch.bfloat16).float()
    codes = (groups / scale[..., None]).round().clamp(-8, 7).reshape(weight.shape).to(torch.int8)
    assert torch.equal(stored[name + "weight"], int4.pack(codes))
    assert torch.equal(stored[name + "weights_scaling_factor"], scale)
    assert name + "prequant_scaling_factor" not in stored
    config = json.loads((engine / "checkpoint" / "config.json").read_text())
    assert (config["quantization"]["quant_algo"], config["quantization"]["pre_quant_scale"]) == ("W4A16_AWQ", False)


@pytest.mark.parametrize("quant", [name for name, format in QUANT_FORMATS.items() if not format.is_stored_plain])
def test_bytes_depend_on_nothing_but_the_inputs(tkit, make_llama, quant):
    model, digests = make_llama(**WIDE, num_hidden_layers=1), []
    for out, workers, seed in (("a", 1, 0), ("b", 3, 0), ("c", 1, 1)):
        options = ["--quant", quant, "--kv-cache", "fp8", "--tp", 2, "--calib-samples", 4, "--calib-len", 64]
        result = tkit("build", model, *options, "--workers", workers, "--seed", seed, "--out", out)
        card = json.loads((Path(result.stdout.strip()) / "engine.json").read_text())
        digests.append({name: facts["sha256"] for name, facts in card["files"].items()})
    assert digests[0] == digests[1]
    assert digests[0].keys() == digests[2].keys() and digests[0] != digests[2]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--quant", "int4_awk"], 2, 'unknown quantization "int4_awk" (did you mean "int4_awq"?)'),
        (["--tp", "3"], 2, "num_attention_heads 8 is not a multiple of tp 3"),
        (["--tp", "0"], 2, "0 is not in the range x>=1"),
        (["--pp", "9"], 2, "pp 9 exceeds num_hidden_layers 4"),
        (["--tp", "4", "--quant", "w4a8_awq"], 2, "is not a multiple of 512 (128 x tp 4), as w4a8_awq kernels need"),
        (["--quant", "fp8", "--calib", "absent.txt"], 2, "--calib absent.txt: no such file"),
        (["--quant", "none", "--calib", "absent.txt"], 2, "--calib absent.txt: no such file"),
        (["--quant", "fp8", "--calib", "."], 2, "--calib .: no file"),
        (["--out", "/dev/null"], 2, "/dev/null: a file, expected a directory\nhint: choose another --out"),
        (["--quant", "fp8", "--calib-samples", "9999999"], 2, "tokens, 9999999 samples of 256 need at least"),
        (["demoo"], 2, 'no model "demoo": not a directory, not a recipe (did you mean "demo"?)'),
        (["qwen3-8b"], 2, "not fetched from the Hugging Face hub"),
    ],
)
def test_bad_input_is_one_clear_error_and_leaves_nothing(tkit, monkeypatch, arguments, exit_code, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = tkit("build", *arguments)
    assert result.exit_code == exit_code
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert_nothing_left()


def test_a_folder_without_weights_says_what_was_expected(tkit, copy_model):
    model_dir = copy_model()
    (model_dir / "model.safetensors").unlink()
    result = tkit("build", model_dir)
    assert result.exit_code == 2
    assert "no weights: neither model.safetensors nor model.safetensors.index.json" in result.stderr
    assert_nothing_left()


def test_a_folder_without_tokenizer_is_refused(tkit, copy_model):
    model_dir = copy_model()
    for path in model_dir.glob("tokenizer*"):
        path.unlink()
    result = tkit("build", model_dir)
    assert result.exit_code == 2
    assert "no tokenizer" in result.stderr
    assert_nothing_left()


def test_a_tokenizer_larger_than_the_embedding_is_refused(tkit, make_llama):
    result = tkit("build", make_llama(vocab_size=100))
    assert result.exit_code == 2
    assert "the tokenizer has 4096 tokens, the model embeds 100" in result.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tkit, copy_model, value):
    model_dir = copy_model()
    weights = load_file(model_dir / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})
    result = tkit("build", model_dir)
    assert result.exit_code == 2
    assert "model.layers.1.mlp.up_proj.weight: 1 of 8192 values are NaN or infinite" in result.stderr
    assert_nothing_left()


def test_a_recipe_with_wrong_keys_lists_them_all(tkit, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: demo\nengines:\n  - {quant: fp9, tp_sise: 2}\nswep: {}\nsweep: {shapes: 3}\n")
    result = tkit("build", recipe)
    assert result.exit_code == 2
    for part in ('unknown key "tp_sise" (did you mean "tp_size"?)', 'unknown key "swep" (did you mean "sweep"?)',
                 "sweep: shapes: expected a list, found 3"):  # fmt: skip
        assert part in result.stderr


def test_a_recipe_gives_defaults_and_the_command_line_wins(tkit, make_llama, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"model: {make_llama(**WIDE)}\nengines:\n  - {{quant: fp8, tp_size: 2}}\n  - {{quant: none}}\n")
    card = json.loads(tkit("build", recipe, "--json").stdout)
    assert (card["quant"], card["tp_size"]) == ("fp8", 2)
    card = json.loads(tkit("build", recipe, "--json", "--tp", "1").stdout)
    assert (card["quant"], card["tp_size"]) == ("fp8", 1)
    assert card["name"].startswith("mine-fp8-tp1-")


def test_expert_parallelism_without_experts_is_refused(tkit, make_llama):
    result = tkit("build", make_llama(), "--tp", "2", "--moe-ep", "2")
    assert result.exit_code == 2
    assert "moe_ep_size is 2, but the model has no experts" in result.stderr


def test_the_command_in_the_card_builds_the_same_engine(tkit, make_llama):
    import shlex

    card = json.loads(tkit("build", make_llama(**WIDE), "--quant", "fp8", "--calib-len", "64", "--json").stdout)
    again = json.loads(tkit(*shlex.split(card["command"])[1:], "--json").stdout)
    assert again == card


def build_that_is_hit(number, num_steps, options, directory):
    """`tkit build` in a process of its own, which signals itself in mid-write, after so many lines of its journal."""
    code = (
        "import os, sys\n"
        "from tkit.checkpoints.writer import FileWriter\n"
        "append = FileWriter._append\n"
        "def hit(self, view):\n"
        "    journal = self.path.parent.parent / 'journal.jsonl'\n"
        f"    if journal.exists() and len(journal.read_text().splitlines()) >= {num_steps}:\n"
        "        FileWriter._append = append\n"  # once: a second signal would end the cleaning up after the first
        f"        self._file.write(view[: len(view) // 2]); self._file.flush(); os.kill(os.getpid(), {int(number)})\n"
        "    append(self, view)\n"
        "FileWriter._append = hit\n"
        "from tkit.cli.main import main\n"
        "main()"
    )
    command = [sys.executable, "-c", code, "build", *map(str, options)]
    return subprocess.run(command, cwd=directory, capture_output=True).returncode


@pytest.mark.parametrize(
    ("number", "exit_code", "quant"), [(signal.SIGINT, 130, "int4_awq"), (signal.SIGTERM, 143, "none")]
)
def test_an_interrupted_build_leaves_nothing(make_llama, tmp_path, number, exit_code, quant):
    options = [make_llama(**WIDE), "--quant", quant, "--calib-samples", "2"]
    assert build_that_is_hit(number, 1, options, tmp_path) == exit_code
    assert_nothing_left(tmp_path / "engines")


@pytest.mark.parametrize(("quant", "num_steps"), [("none", 1), ("none", 2), ("none", 3), ("int4_awq", 3)])
def test_a_killed_build_resumes_and_ends_with_the_same_digest(tkit, make_llama, tmp_path, quant, num_steps):
    options = [make_llama(**WIDE), "--quant", quant, "--calib-samples", "2", "--tp", "2"]
    undisturbed = json.loads(tkit("build", *options, "--out", "undisturbed", "--json").stdout)
    assert build_that_is_hit(signal.SIGKILL, num_steps, options, tmp_path) == -signal.SIGKILL
    assert not list(Path("engines").glob("[!.]*"))
    resumed = tkit("build", *options, "--json")
    assert resumed.exit_code == 0 and "resuming the build" in resumed.stderr
    assert json.loads(resumed.stdout)["files"] == undisturbed["files"]
    assert [path.name for path in Path("engines").iterdir()] == [undisturbed["name"]]


def test_the_same_engine_built_twice_at_once_is_published_once(make_llama, tmp_path):
    command = [sys.executable, "-m", "tkit", "build", str(make_llama()), "--quiet"]
    running = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0] * 4
    assert len(outputs) == 1
    assert [path.name for path in (tmp_path / "engines").iterdir()] == [Path(outputs.pop().strip()).name]
