"""What a run's hardware allows, through `tkit report`, against arithmetic by hand and against `tkit plan`."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import Result
from factory import as_open_loop, card, edit, make_run

from tkit import demo
from tkit.stages.host_speed import host_speed

Tkit = Callable[..., Result]
CONFIG = json.loads((demo.MODEL_DIR / "config.json").read_text())
SOURCE = {"model": "some/where", "path": "/gone", "revision": None, "files": {}, "config": CONFIG}
H100 = "NVIDIA H100 80GB HBM3"
HOST = {"num_bytes": 16_000_000, "bytes_per_s": 20e9, "flops": 50e9}


def walls(tkit: Tkit, run: Path, *options: str) -> tuple[list[dict[str, Any]], str]:
    """(the wall of each load, what the run was held against), and the same in every other form."""
    result = tkit("report", run, "--out", "out", *options)
    assert result.exit_code == 0, result.stderr
    record = json.loads(Path("out/report.json").read_text())
    found = [level["cells"][0]["wall"] for level in record["groups"][0]["levels"]]
    rows = list(csv.DictReader(Path("out/report.csv").read_text().splitlines()))
    for wall, row in zip(found, rows, strict=True):
        assert [row["limit_tok_s"], row["limit_binds"]] == (
            [str(wall["limit_tok_s"]), wall["limit_binds"]] if wall else ["", ""]
        )
        predicted = wall and wall["predicted_tok_s"]
        assert row["predicted_tok_s_high"] == (str(predicted["high"]) if predicted else "")
        assert row["limit_ttft_ms"] == (str(wall["limit_ttft_ms"]) if wall else "")
    hardware = record["runs"][0]["hardware"]
    assert hardware.replace("*", "") in Path("out/report.html").read_text().replace("&#34;", '"').replace("&#39;", "'")
    assert ("<summary>The wall</summary>" in Path("out/report.md").read_text()) and "The wall" in Path(
        "out/report.html"
    ).read_text()
    return found, hardware


def gpu_engine(**values: Any) -> dict[str, Any]:
    return card(
        "fp8", tp_size=2, num_params=4_196_608, source=SOURCE, backend="tensorrt", versions={"tensorrt_llm": "1.2.1"},
        compiled={"gpu": H100}, **values,
    )  # fmt: skip


def test_an_engine_on_a_gpu_is_held_against_the_data_sheet_and_the_plan(tkit, tmp_path):
    run = make_run(tmp_path / "reports", "run", engine=gpu_engine(), concurrency=(1, 4), requests=12)
    found, hardware = walls(tkit, run)
    assert hardware.startswith(
        "2 x H100-SXM, 3.35 TB/s and 990 dense 16-bit TFLOP/s each. Prediction of tkit plan: tensor"
    )
    linear, embedding = 3_145_728, 1_048_576  # lm_head and embedding are one, in 16 bits
    norms = 4_196_608 - linear - embedding
    kv = (128 + 32) * 2048
    read = linear + 2 * (embedding + norms) + 4 * kv
    assert found[1]["limit_tpot_ms"] == pytest.approx(1e3 * read / (2 * 3.35e12), rel=0.02)  # scales, a few bytes
    assert found[1]["limit_binds"] == "memory bandwidth (weights)"
    for load, wall in zip((1, 4), found, strict=True):
        arguments = ["--tp", 2, "--pp", 1, "--quant", "fp8", "--kv-cache", "fp16", "--isl", 128, "--osl", 64,
                     "--engine-version", "1.2.1"]  # fmt: skip
        plan = json.loads(tkit("plan", "demo", "--gpu", "h100", *arguments, "--concurrency", load, "--json").stdout)
        assert wall["predicted_tok_s"] == {name: plan["tok_s"][name] for name in ("value", "low", "high")}
        assert wall["predicted_tpot_ms"]["value"] == pytest.approx(plan["tpot_ms"]["value"])
        ttft = wall["predicted_ttft_ms"]  # without the first wave, which the plan's mean holds and its median does not
        assert ttft["value"] == pytest.approx(plan["ttft_p50_p90_p99_ms"][0], rel=0.02)
        assert ttft["low"] / ttft["value"] == pytest.approx(plan["ttft_ms"]["low"] / plan["ttft_ms"]["value"])
        assert wall["limit_ttft_ms"] < wall["predicted_ttft_ms"]["low"]
        assert wall["predicted_tok_s"]["low"] < wall["predicted_tok_s"]["value"] < wall["limit_tok_s"]


def test_an_open_loop_is_held_against_as_many_requests_as_were_in_flight(tkit, tmp_path):
    """Few arrivals: each finds the engine idle, so TTFT is that of one request, and the rate is the one asked for."""
    reports = tmp_path / "reports"
    runs = [make_run(reports, name, engine=gpu_engine(), concurrency=(4,), requests=40) for name in ("few", "many")]
    for run, rate in zip(runs, (0.5, 1e5), strict=True):
        as_open_loop(run, rate)
    (few,), _ = walls(tkit, runs[0])
    record = json.loads(Path("out/report.json").read_text())
    cell = record["groups"][0]["levels"][0]["cells"][0]
    rows = pd.read_parquet(runs[0] / "points" / "128x64-rate0.5-r1" / "requests.parquet").query("phase == 'measured'")
    assert cell["in_flight"] == pytest.approx(cell["requests_s"] * (rows.last_token_ns - rows.sent_ns).mean() / 1e9)
    assert cell["ttft_mean"]["value"] == pytest.approx((rows.first_token_ns - rows.scheduled_ns).mean() / 1e6)
    options = ["--gpu", "h100", "--tp", 2, "--pp", 1, "--quant", "fp8", "--kv-cache", "fp16", "--isl", 128, "--osl", 64]
    alone = json.loads(tkit("plan", "demo", *options, "--concurrency", 1, "--json").stdout)
    assert few["predicted_ttft_ms"]["value"] == pytest.approx(alone["ttft_ms"]["value"], rel=0.1)
    assert (few["predicted_tok_s"]["value"], few["predicted_binds"]) == (pytest.approx(0.5 * 64), "the arrivals")
    (many,), _ = walls(tkit, runs[1])
    assert many["limit_ttft_ms"] == few["limit_ttft_ms"]
    assert many["predicted_ttft_ms"]["value"] > 5 * few["predicted_ttft_ms"]["value"]
    assert many["predicted_tok_s"]["value"] < 1e5 * 64 and many["predicted_binds"] != "the arrivals"
    assert "requests per second asked" in Path("out/report.html").read_text()


def test_constants_that_were_refitted_to_the_run_say_so(tkit, tmp_path):
    run = make_run(tmp_path / "reports", "run", engine=gpu_engine(), concurrency=(1, 4, 16), requests=12)
    far, _ = walls(tkit, run)
    assert tkit("plan", "demo", "--gpu", "h100", "--tp", 2, "--quant", "fp8", "--calibrate", run).exit_code == 0
    near, hardware = walls(tkit, run)
    assert "refitted to 3 points of run, so it is a fit to this run, not a forecast" in hardware
    measured = json.loads(Path("out/report.json").read_text())["groups"][0]["levels"][1]["cells"][0]["estimates"]

    def miss(wall: dict[str, Any]) -> float:
        return abs(wall["predicted_tok_s"]["value"] / measured["output_tok_s"]["value"] - 1)

    assert miss(near[1]) < 0.3 * miss(far[1])
    assert near[1]["limit_tok_s"] == far[1]["limit_tok_s"]  # physics is not refitted


def test_the_reference_engine_is_held_against_its_processor(tkit, tmp_path):
    """float32 whatever the format; 50 GFLOP/s: four sequences wait for products, one for bytes."""
    engine = card("fp8", tp_size=2, source=SOURCE)
    identity = {"hardware": "Some Processor"}
    run = make_run(
        tmp_path / "reports", "run", engine=engine, concurrency=(1, 4), requests=12, host_speed=HOST, identity=identity
    )
    found, hardware = walls(tkit, run)
    assert hardware.startswith(
        "Some Processor, as measured before the sweep: 20.0 GB/s reading 16.0 MB again and again, 50 GFLOP/s"
    )
    assert "No prediction" in hardware and found[0]["predicted_tok_s"] is None
    read = 4 * 4_196_608 + (128 + 32) * 4096
    assert found[0]["limit_tok_s"] == pytest.approx(20e9 / read, rel=0.001)
    assert found[0]["limit_binds"] == "memory bandwidth (weights)"
    assert found[1]["limit_binds"] == "compute"
    operations = 2 * (
        4_194_304 + 2 * 3_145_728
    )  # per token of the answer: itself, and two of the prompt without lm_head
    assert found[1]["limit_tok_s"] == pytest.approx(50e9 / operations, rel=0.05)


@pytest.mark.parametrize(
    ("engine", "identity", "reason"),
    [
        (None, {}, "without an engine card neither model nor layout is known"),
        (card("none", source=SOURCE), {}, "the run does not say what it ran on"),
        (card("none", source=SOURCE), {"hardware": "Voodoo 2"}, '"Voodoo 2" is not in the GPU table'),
        (card("none"), {"hardware": H100}, 'the engine card does not hold the model\'s config ("demo")'),
        (card("none", source={"model": "x", "config": {"architectures": ["Odd"]}}), {"hardware": H100}, "Odd"),
        (card("none", source={"config": {"architectures": ["LlamaForCausalLM"]}}), {"hardware": H100}, "hidden_size"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_named_and_nothing_is_guessed(tkit, tmp_path, engine, identity, reason):
    run = make_run(tmp_path / "reports", "run", engine=engine, concurrency=(1, 4), requests=12, identity=identity)
    found, hardware = walls(tkit, run)
    assert found == [None, None]
    assert reason in hardware


def test_an_impossible_processor_is_refused_with_the_run(tkit, tmp_path):
    run = make_run(tmp_path / "reports", "run", concurrency=(1,), requests=12, host_speed={**HOST, "flops": 0})
    result = tkit("report", run)
    assert result.exit_code == 2
    assert "impossible processor" in result.stderr


def test_a_processor_is_measured_within_reason():
    """Between a slow phone and a large server; read more often from memory than its caches allow is not checked here."""
    speed = host_speed(4 * 1024 * 1024)
    assert speed.num_bytes == 4 * 1024 * 1024
    assert 1e8 < speed.bytes_per_s < 1e13
    assert 1e8 < speed.flops < 1e14


def test_cost_and_memory_stand_beside_the_measurement(tkit, tmp_path):
    run = make_run(tmp_path / "reports", "run", engine=gpu_engine(), concurrency=(1, 4), requests=12)
    other = make_run(tmp_path / "reports", "cpu", engine=card("none", source=SOURCE), concurrency=(4,), host_speed=HOST)
    Path("prices.yaml").write_text(
        "{date: 2025-11-01, source: a page, utilisation: 0.5, gpus: {h100: {usd_per_hour: 2.5}}}"
    )
    result = tkit("report", run, other, "--prices", "prices.yaml", "--out", "out", "--json")
    record = json.loads(result.stdout)
    assert record["prices"] == "a page of 2025-11-01"
    for level in record["groups"][0]["levels"]:
        cell = level["cells"][0]
        rate = cell["estimates"]["output_tok_s"]
        dollars = cell["cost"]["usd_per_million"]
        for ours, theirs in (("value", "value"), ("low", "high"), ("high", "low")):
            assert dollars[ours] == pytest.approx(1e6 * 2 * 2.5 / 3600 / rate[theirs] / 0.5)
        assert cell["cost"]["joules_per_token"][0] == pytest.approx(2 * 700 * 1.13 / rate["value"])
    assert record["groups"][0]["levels"][1]["cells"][1]["cost"] is None
    rows = list(csv.DictReader(Path("out/report.csv").read_text().splitlines()))
    assert [row["usd_per_million_tokens"] for row in rows][1:] == [str(dollars["value"]), ""]
    markdown = Path("out/report.md").read_text()
    assert "Prices: a page of 2025-11-01." in markdown
    assert "No cost of B: no price for what it ran on." in markdown

    memory, kv = record["runs"][0]["memory"], 2 * 4 * 2 * 64 * 2  # 4 layers, 2 heads of 64, 16 bits
    assert memory["kv_per_token"] == kv == record["runs"][1]["memory"]["kv_per_token"]
    parts = [memory[f"gpu_{name}"] for name in ("weights", "activations", "overhead", "kv_pool")]
    assert sum(parts) < memory["gpu_usable"] == 85_500_000_000
    edit(
        run / "points" / "128x64-c4-r1" / "point.json",
        telemetry={"gpus": 2, "gpu_power_w": 900.0, "gpu_memory_bytes": 3e9, "joules_per_output_token": 4.5},
    )
    assert tkit("report", run, other, "--prices", "prices.yaml", "--out", "out").exit_code == 0
    markdown = Path("out/report.md").read_text()
    assert "per GPU, measured" in markdown and "1.5 GB" in markdown
    assert "4.50 <br>measured" in markdown  # and not what the data sheet says
    assert memory["stored"] == 2 * memory["gpu_weights"] > 0
    assert record["runs"][1]["memory"]["gpu_weights"] is None


def test_a_price_file_that_cannot_be_read_stops_the_report(tkit, tmp_path):
    make_run(tmp_path / "reports", "run", concurrency=(1,), requests=12)
    Path("prices.yaml").write_text("{date: 2025-11-01, gpus: {h1000: {usd_per_hour: 2.5}}}")
    result = tkit("report", "run", "--prices", "prices.yaml", "--out", "out")
    assert result.exit_code == 2
    assert "h1000" in result.stderr
    assert not Path("out").exists()


def test_the_csv_names_the_gates_that_a_point_failed(tkit, tmp_path):
    reports = tmp_path / "reports"
    make_run(reports, "fast", concurrency=(1, 4), requests=30)
    make_run(reports, "slow", concurrency=(1, 4), requests=30, speed=1.5, invalid={4: "drift"})
    gates = "output_tok_s<-10%,kl>0.1"
    assert tkit("report", "fast", "slow", "--fail-on", gates, "--out", "out").exit_code == 3
    rows = list(csv.DictReader(Path("out/report.csv").read_text().splitlines()))
    assert [(row["run"], row["concurrency"], row["gates_failed"], row["gates_not_evaluated"]) for row in rows] == [
        ("fast", "1", "", ""),
        ("slow", "1", "output_tok_s<-10%", "kl>0.1"),
        ("fast", "4", "", ""),
        ("slow", "4", "", "output_tok_s<-10%; kl>0.1"),
    ]


@pytest.mark.parametrize("changes", [{"hidden_size": -256}, {"num_attention_heads": 0}, {"num_hidden_layers": 10**9}])
def test_a_config_that_no_model_has_costs_the_wall_and_not_the_report(tkit, tmp_path, changes):
    engine = card("none", source={**SOURCE, "config": {**CONFIG, **changes}})
    run = make_run(tmp_path / "reports", "run", engine=engine, concurrency=(1,), requests=12, host_speed=HOST)
    found, hardware = walls(tkit, run)
    assert found == [None] and hardware.startswith("no wall: ")


def test_a_torn_calibration_is_named(tkit, tmp_path):
    run = make_run(tmp_path / "reports", "run", engine=gpu_engine(), concurrency=(1,), requests=12)
    (run / "plan-calibration.json").write_text('{"schema": "tkit.plan-calibration/2", "engine": {"name": "x"}}')
    found, hardware = walls(tkit, run)
    assert found == [None] and 'plan-calibration.json: engine: key "efficiencies" is missing' in hardware


def test_a_point_above_its_limit_says_that_the_limit_is_wrong(tkit, tmp_path):
    slow = {**HOST, "flops": 1e8}
    engine = card("none", source=SOURCE)
    run = make_run(tmp_path / "reports", "run", engine=engine, concurrency=(1,), requests=12, host_speed=slow)
    walls(tkit, run)
    assert "<br>the limit is told too low" in Path("out/report.md").read_text()
