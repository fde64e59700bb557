"""`tkit plan` as a user types it."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path

import pytest

from tkit.planner.models import find_shape
from tkit.stages.plan import resolve_shape

RECIPES = Path(__file__).parents[2] / "model_configs"


def record(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_planned_offline(tkit, recipe):
    plan = record(tkit("plan", recipe, "--gpu", "h200", "--json"))
    assert plan["num_params"] > 1e6
    assert plan["fits"]
    assert plan["tok_s"]["low"] < plan["tok_s"]["value"] < plan["tok_s"]["high"]


def test_one_screen(tkit):
    result = tkit("plan", RECIPES / "llama-3.1-70b.yaml", "--gpu", "h100", "--slo", "conversational")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 125
    assert "shipped model table; meta-llama/Llama-3.1-70B-Instruct is not on this machine" in lines[0]
    assert lines[2].startswith("VERDICT  fits on 2 x H100-SXM (tp 2, pp 1)")
    assert "327,680 B per token (0.3125 MiB)" in result.stdout
    assert "SLO conversational (median TTFT 2000 ms, TPOT 100 ms)" in result.stdout
    assert re.search(
        r"TPOT: formula x \d\.\d\d, .*published runs?.*;  TTFT: x \d\.\d\d, .*published run", result.stdout
    )


def test_stored_weights_are_what_a_build_writes(tkit):
    """Byte for byte, against the tensors in the files."""
    for quant, tp in (("none", 1), ("none", 2), ("int8", 2), ("int4", 4)):  # the last in groups of 64
        built = tkit("build", "--quant", quant, "--tp", tp, "--json")
        assert built.exit_code == 0, built.output
        card = json.loads(built.stdout)
        directory = Path("engines") / card["name"] / "checkpoint"
        stored = sum(tensor_bytes(path) for path in directory.glob("rank*.safetensors"))
        plan = record(tkit("plan", "--quant", quant, "--tp", tp, "--gpu", "l4", "--json"))
        assert plan["stored_bytes"] == stored
        assert plan["num_params"] == card["num_params"]


def test_the_bytes_of_a_mixed_recipe(tkit):
    """Each layer in its own format, each rank's KV scales; and the weights on the GPU are the smaller for it."""
    recipe = {"quant": "int8", "exclude": ["layers.0", "layers.3.mlp"], "quant_overrides": {"*.self_attn.*": "int4"}}
    Path("mixed.yaml").write_text(json.dumps({"model": "demo", "engines": [recipe | {"kv_cache": "fp8"}]}))
    built = tkit("build", "mixed.yaml", "--tp", 2, "--json")
    assert built.exit_code == 0, built.output
    directory = Path("engines") / json.loads(built.stdout)["name"] / "checkpoint"
    plan = record(tkit("plan", "mixed.yaml", "--tp", 2, "--gpu", "l4", "--json"))
    assert plan["stored_bytes"] == sum(tensor_bytes(path) for path in directory.glob("rank*.safetensors"))
    assert plan["kv_cache"] == "fp8"
    weights = [
        record(tkit("plan", "demo", "--quant", quant, "--tp", 2, "--gpu", "l4", "--json"))["chosen"]["ledger"]
        for quant in ("none", "int4")
    ]
    assert weights[1]["weight_bytes"] < plan["chosen"]["ledger"]["weight_bytes"] < weights[0]["weight_bytes"]


def tensor_bytes(path):
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return sum(
        entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"
    )


def test_a_model_directory_needs_only_its_config(tkit, tmp_path):
    directory = tmp_path / "my-model"
    directory.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "dtype": "bfloat16",
        "max_position_embeddings": 131072, "quantization_config": {"quant_method": "fp8"},
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    plan = record(tkit("plan", directory, "--json"))
    assert plan["num_params"] == 8_030_261_248
    assert plan["model_source"] == "my-model/config.json"


def test_the_hub_cache_comes_before_the_table(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--Qwen--Qwen3-8B" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "dtype": "bfloat16",
    }  # fmt: skip
    (snapshot / "config.json").write_text(json.dumps(config))
    assert resolve_shape("Qwen/Qwen3-8B")[0] == find_shape("Qwen/Qwen3-8B")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    shape, source, _ = resolve_shape("Qwen/Qwen3-8B")
    assert shape.num_layers == 2
    assert source == "abc/config.json"


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--gpu", "h1000"], ['unknown GPU "h1000" (did you mean', "known: T4"]),
        (["--gpu", "a100", "--quant", "fp8"], ["fp8 needs compute capability 8.9, A100-SXM-80 has 8.0", "int4_awq"]),
        (["--gpu", "a100", "--kv-cache", "fp8"], ["a fp8 KV cache needs", "--kv-cache fp16"]),
        (["--isl", "200000"], ["exceeds the 131072 positions", "--isl 130048"]),
        (["--tp", "3"], ["64 attention heads do not divide by tp 3; nearest that does: tp 2"]),
        (["--tp", "128"], ["64 attention heads do not divide by tp 128; nearest that does: tp 64"]),
        (["--tp", "16"], ["tp 16 is more than the 8 GPUs that a fast link joins", "--tp 8 --pp 2"]),
        (["--num-gpus", "7", "--tp", "2"], ["7 GPUs are no multiple"]),
        (["--num-gpus", "3", "--pp", "1"], ["no split of 64 heads and 80 layers"]),
        (["--pp", "100"], ["pp 100 exceeds 80 layers"]),
        (["--quant", "fp9"], ['unknown quantization "fp9" (did you mean "fp8"?)']),
        (["--kv-cache", "fp7"], ['unknown type "fp7"']),
        (["--engine-version", "newest"], ['engine_version is "newest", expected one such as 1.2.0']),
        (["--slo", "interactiv"], ['slo is "interactiv", expected one of interactive']),
        (["--tp", "2", "--pp", "2", "--num-gpus", "8"], ["tp 2 x pp 2 is not num-gpus 8"]),
        (["--engine", "vlm"], ['unknown engine "vlm" (did you mean "vllm"?)']),
        (["--tp", "two"], ['"two" is neither a whole number nor auto']),
        (["--compare", "gpu=h100", "--html", "x"], ["--html takes one plan"]),
        (["--rate", "nan"], ["nan is not a finite number"]),
        (["--concurrency", "999999999999"], ["not in the range"]),
        (["--calibrate", "nowhere"], ["--calibrate nowhere: no points/*/point.json in it"]),
        (["--compare", "gpus=h100"], ['"gpus=h100" (did you mean "gpu"?)']),
        (["--compare", "gpu"], ['"gpu": expected one of gpu, quant']),
        (
            ["--compare", "quant=fq8,none kv_cache=fp9"],
            ['"fq8" (did you mean "fp8"?)', '--kv-cache: unknown type "fp9"'],
        ),
    ],
)
def test_nonsense_is_refused_with_the_nearest_sensible_choice(tkit, arguments, messages):
    result = tkit("plan", "llama-3.1-70b", *arguments)
    assert result.exit_code == 2
    for message in messages:
        assert message in result.stderr


def test_a_recipe_says_its_kv_cache(tkit, tmp_path):
    (tmp_path / "r.yaml").write_text("model: meta-llama/Llama-3.1-8B-Instruct\nengines: [{kv_cache: fp8}]\n")
    assert "none weights, fp8 KV cache" in tkit("plan", "r.yaml").stdout
    assert "none weights, fp16 KV cache" in tkit("plan", "r.yaml", "--kv-cache", "fp16").stdout


@pytest.mark.parametrize("architectures", [3, [1], True, "LlamaForCausalLM"])
def test_a_config_without_an_architecture_is_refused(tkit, tmp_path, architectures):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": architectures}))
    result = tkit("plan", ".")
    assert result.exit_code == 2, result.exception
    assert "config.json: " in result.stderr


def test_what_does_not_fit_says_what_binds(tkit):
    plan = record(tkit("plan", "llama-3.1-70b", "--gpu", "l4", "--num-gpus", 4, "--quant", "none", "--json"))
    assert not plan["fits"]
    assert plan["verdict"].startswith("does not fit: weights on 4 x L4")
    assert "times are those of as many requests as fit" in plan["notes"]


def test_unknown_models_are_named(tkit):
    result = tkit("plan", "nobody/unheard-of")
    assert result.exit_code == 2
    assert "nobody/unheard-of: neither on this machine nor in the shipped model table" in result.stderr


def test_planned_only_models(tkit):
    plan = record(tkit("plan", "deepseek-ai/DeepSeek-V3", "--gpu", "h200", "--quant", "fp8_block", "--json"))
    assert plan["chosen"]["parallel"]["tp_size"] == 8  # 685 GB of 8-bit weights: one node
    assert any("does not convert deepseek_v3" in note for note in plan["notes"])
    assert any("the same on all 8 ranks" in note for note in plan["notes"])


def test_comparison(tkit, tmp_path):
    (tmp_path / "prices.yaml").write_text(
        "date: 2026-11-01\ngpus:\n  h100: {usd_per_hour: 2}\n  a100: {usd_per_hour: 1}\n"
    )
    result = tkit(
        "plan", "llama-3.1-70b", "--compare", "gpu=a100,h100 quant=none,fp8 tp=4,8", "--prices", "prices.yaml"
    )
    assert result.exit_code == 0, result.output
    assert "gpu=H100-SXM quant=fp8 tp=8" in result.stdout
    assert "$/M tok" in result.stdout
    assert re.search(
        r"gpu=H100-SXM quant=fp8 tp=8 .* [\d,]+ \[[\d,]+, [\d,]+\] +[\d,]+ +\d\.\d\d-\d\.\d\d\n", result.stdout
    )
    assert "= formula x" in result.stdout
    assert "gpu=A100-SXM-80 quant=fp8 tp=4: fp8 needs compute capability 8.9" in result.stdout


def test_a_comparison_has_the_formats_of_a_plan(tkit):
    recipe = "model: demo\nengines: [{quant: int8, kv_cache: int8}]\n"
    Path("r.yaml").write_text(recipe)
    (row,) = record(tkit("plan", "r.yaml", "--compare", "gpu=h100", "--json"))["rows"]
    assert (row["plan"]["quant"], row["plan"]["kv_cache"]) == ("int8", "int8")


def test_one_ttft_on_the_screen(tkit):
    """The curve's is the median of the load that the head tells of, not another quantity."""
    plan = record(tkit("plan", "llama-3.1-70b", "--quant", "fp8", "--concurrency", 12, "--json"))
    (asked,) = (point for point in plan["curve"] if point["concurrency"] == 12)
    assert asked["ttft_ms"] == pytest.approx(plan["ttft_p50_p90_p99_ms"][0], abs=0.01)
    assert asked["tok_s_gpu_low"] * plan["chosen"]["parallel"]["tp_size"] == pytest.approx(plan["tok_s"]["low"])
    assert asked["ttft_ms"] < plan["ttft_ms"]["value"] / 1.2  # which holds the first wave


def test_gpus_for_a_rate_say_at_which_load_and_how_surely(tkit):
    result = tkit("plan", "llama-3.1-70b", "--concurrency", 32, "--rate", 20, "--json")
    plan = record(result)
    size, per_engine = plan["chosen"]["parallel"]["tp_size"], plan["tok_s"]["value"] / 1024
    assert plan["gpus_for_load"] == size * math.ceil(20 / per_engine)
    assert plan["gpus_for_load_sure"] == size * math.ceil(20 / (plan["tok_s"]["low"] / 1024)) > plan["gpus_for_load"]
    told = tkit("plan", "llama-3.1-70b", "--concurrency", 32, "--rate", 20).stdout
    assert (
        f"GPUs for 20 requests/s: {plan['gpus_for_load']}, {plan['gpus_for_load_sure']} at the band's bad end; " in told
    )
    assert f"engines of {size} with 32 in flight each" in told


def test_fewer_gpus_are_cheaper(tkit, tmp_path):
    """FP16 on 8 against INT8 on 4."""
    (tmp_path / "prices.yaml").write_text("date: 2026-11-01\ngpus:\n  a100: {usd_per_hour: 1}\n")
    costs = [
        record(tkit("plan", "llama-3.1-70b", "--gpu", "a100", "--quant", quant, "--tp", tp, "--prices", "prices.yaml",
                    "--concurrency", 64, "--json"))["cost"]
        for quant, tp in (("none", 8), ("int8_sq", 4))
    ]  # fmt: skip
    assert costs[0]["usd_per_hour"] == pytest.approx(8)
    assert costs[1]["usd_per_hour"] == pytest.approx(4)
    assert sum(costs[1]["usd_per_million"]) < sum(costs[0]["usd_per_million"])


def test_page(tkit):
    result = tkit("plan", "demo", "--gpu", "l4", "--html", "plan.html")
    assert result.exit_code == 0, result.output
    page = Path("plan.html").read_text()
    assert page.count("vegaEmbed('#") == 3
    assert "http://" not in page.split("<script>")[0]
    assert "Content-Security-Policy" in page


def test_the_plots_compile():
    import vl_convert

    from tkit.planner.gpus import find_gpu
    from tkit.planner.page import memory_plot, pareto_plot, roofline_plot
    from tkit.planner.planning import make_plan
    from tkit.planner.wish import Wish

    plan = make_plan(find_shape("Llama-3.1-8B"), Wish(gpu=find_gpu("l40s")), "table")
    for plot in (memory_plot, pareto_plot, roofline_plot):
        svg = vl_convert.vegalite_to_svg(plot(plan) | {"width": 400})
        assert svg.count("<path") > 5


def test_a_plan_takes_less_than_a_second(tkit):
    tkit("plan", "llama-3.1-70b", "--json")
    started = time.process_time()  # on a machine that does nothing else
    tkit("plan", "llama-3.1-405b" if (RECIPES / "llama-3.1-405b.yaml").exists() else "llama-3.1-70b", "--json")
    assert time.process_time() - started < 1


def test_a_plan_loads_no_torch():
    import subprocess
    import sys

    code = (
        "import sys; sys.argv = ['tkit', 'plan', 'demo', '--quiet']\n"
        "from tkit.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def write_run(directory, factor):
    """A sweep of an engine that takes `factor` times the planned time."""
    points = [
        ("c1", 1, 20.0, 8.0, 120.0), ("c4", 4, 24.0, 8.4, 450.0), ("c16", 16, 40.0, 9.6, 1550.0),
        ("c64", 64, 90.0, 14.0, 4200.0),
    ]  # fmt: skip
    (directory / "points").mkdir(parents=True)
    (directory / "manifest.json").write_text(json.dumps({"engine": {"tp_size": 1, "pp_size": 1, "quant": "none"}}))
    for name, concurrency, ttft, tpot, tok_s in points:
        point = {
            "isl": 512, "osl": 256, "concurrency": concurrency, "is_valid": True, "output_tok_s": tok_s / factor,
            "ttft": {"p50": ttft * factor}, "tpot": {"p50": tpot * factor},
        }  # fmt: skip
        (directory / "points" / name).mkdir()
        (directory / "points" / name / "point.json").write_text(json.dumps(point))


def test_a_sweep_narrows_the_band(tkit, tmp_path):
    write_run(tmp_path / "run", factor=2.0)
    arguments = ["plan", "llama-3.1-8b", "--gpu", "h100", "--quant", "none", "--concurrency", 16, "--json"]
    before = record(tkit(*arguments))
    after = record(tkit(*arguments, "--calibrate", "run"))
    saved = json.loads(Path("run/plan-calibration.json").read_text())
    assert saved["points"] == 4
    assert saved["mape_after"]["tpot"] < 0.1 < saved["mape_before"]["tpot"]
    assert after["tpot_ms"]["value"] > 1.4 * before["tpot_ms"]["value"]
    assert after["tpot_ms"]["n"] == 4
    assert "refitted to 4 points of run" in after["provenance"]


@pytest.mark.parametrize(
    ("manifest", "problems"),
    [
        ({"host_speed": {"flops": 1.0}}, ["measured on a processor, not on H100-SXM"]),
        (
            {"identity": {"hardware": "NVIDIA L4"}, "engine": {"num_params": 4_000_000}},
            ["measured on NVIDIA L4, not on H100-SXM", "measured with a model of 4,000,000 parameters, not with Llama-3.1-8B"],
        ),
        ({"engine": {"compiled": {"gpu": "NVIDIA H100 80GB HBM3"}, "num_params": 8_030_261_248}}, []),
    ],
)  # fmt: skip
def test_only_what_was_measured_is_refitted(tkit, tmp_path, manifest, problems):
    write_run(tmp_path / "run", factor=1.0)
    (tmp_path / "run/manifest.json").write_text(json.dumps(manifest))
    result = tkit("plan", "llama-3.1-8b", "--gpu", "h100", "--calibrate", "run")
    assert result.exit_code == (2 if problems else 0)
    assert [problem in result.stderr for problem in problems] == [True] * len(problems)
    assert Path("run/plan-calibration.json").exists() == (not problems)


def test_a_slow_host_is_told_from_slow_memory(tkit, tmp_path):
    """The demo's weights take microseconds: only the host can explain 30 ms a token."""
    write_run(tmp_path / "run", factor=1.0)
    for path in Path("run/points").glob("*/point.json"):
        point = json.loads(path.read_text())
        point |= {"tpot": {"p50": 30.0}, "ttft": {"p50": 300.0}, "output_tok_s": point["concurrency"] / 0.030}
        path.write_text(json.dumps(point))
    arguments = ["plan", "demo", "--gpu", "l4", "--isl", 512, "--osl", 256, "--json", "--calibrate", "run"]
    plan = record(tkit(*arguments))
    assert plan["phases"][1]["binds"] == "host"
    assert plan["tpot_ms"]["value"] == pytest.approx(30, rel=0.2)


def test_too_few_points_are_refused(tkit, tmp_path):
    point = tmp_path / "run" / "points" / "a" / "point.json"
    point.parent.mkdir(parents=True)
    for text, message in (
        ('{"is_valid": false}', "--calibrate run: 0 valid points of 1, expected at least 3"),
        ('{"is_valid": true}', "point.json: not a point that tkit sweep wrote: 'output_tok_s'"),
        ("[]", "point.json: not a point that tkit sweep wrote"),
    ):
        point.write_text(text)
        result = tkit("plan", "demo", "--calibrate", "run")
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
