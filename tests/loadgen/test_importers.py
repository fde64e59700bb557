"""Results of other load generators, against what these tools say of the same requests."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tkit.errors import InputError
from tkit.files import read_json
from tkit.loadgen.importers import read_result
from tkit.report.read import read_run

Tkit = Callable[..., Result]
AIPERF = Path(__file__).parent / "results/aiperf"  # ten requests of a real run, two of them its warm-up
S = 1_000_000_000
TTFTS, GAPS = (0.05, 0.06, 0.08), ((0.010, 0.010, 0.010), (0.010, 0.012, 0.014), (0.020, 0.020, 0.020))


def vllm(**changes: Any) -> dict[str, Any]:
    """Three requests of 4 tokens each, and one that failed."""
    return {
        "date": "20260101-000000", "endpoint_type": "openai", "model_id": "toy", "num_prompts": 4, "request_rate": "inf",
        "max_concurrency": 2, "duration": 0.4, "completed": 3, "output_throughput": 30.0,
        "input_lens": [7, 7, 7, 7], "output_lens": [4, 4, 4, 0], "ttfts": [*TTFTS, 0.0], "itls": [*map(list, GAPS), []],
        "errors": ["", "", "", "503"], **changes,
    }  # fmt: skip


def guidellm(strategy: dict[str, Any]) -> dict[str, Any]:
    def request(i: int, status: str) -> dict[str, Any]:
        start = 1000.0 + 0.2 * i
        timings = {
            "targeted_start": start - 0.001, "request_start": start, "resolve_start": start, "resolve_end": start + 0.2,
            "request_end": start + TTFTS[i] + sum(GAPS[i]) + 0.001, "first_token_iteration": start + TTFTS[i],
            "last_token_iteration": start + TTFTS[i] + sum(GAPS[i]), "token_iterations": 4,
        }  # fmt: skip
        info = {"timings": timings, "error": "broken" if status == "errored" else None}
        metrics = {"text_tokens": 4}
        return {"info": info, "prompt_tokens": 7, "output_tokens": 4, "output_metrics": metrics, "input_metrics": {}}

    requests = {"successful": [request(i, "successful") for i in range(3)], "incomplete": [request(0, "incomplete")]}
    return {
        "metadata": {"guidellm_version": "0.8.1"},
        "benchmarks": [
            {"config": {"strategy": strategy}, "requests": {**requests, "errored": [request(0, "errored")]}}
        ],
    }


def genai_perf() -> dict[str, Any]:
    def request(i: int) -> dict[str, Any]:
        times = [i * S // 5 + round((TTFTS[i] + sum(GAPS[i][:k])) * S) for k in range(4)]
        texts = [f'data: {{"choices":[{{"delta":{{"content":"w{k}"}}}}]}}\n\n' for k in range(4)]
        role = 'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
        responses = [{"response": text} for text in (role, *texts, "data: [DONE]\n\n")]
        stamps = [i * S // 5 + 1000, *times, times[-1] + 500]
        return {
            "timestamp": i * S // 5,
            "response_timestamps": stamps,
            "response_outputs": responses,
            "request_inputs": {},
        }

    experiment = {"experiment": {"mode": "concurrency", "value": 2}, "requests": [request(i) for i in range(3)]}
    return {"service_kind": "openai", "endpoint": "v1/chat/completions", "version": "1.0", "experiments": [experiment]}


def imported(tkit: Tkit, tmp_path: Path, *files: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    result = tkit("import", *files, "--name", "run", "--label", "theirs")
    assert result.exit_code == 0, result.stderr
    run = read_run(tmp_path / "reports/run")  # whatever a report checks
    assert run.left_out == ()
    assert run.ended_early is None
    points = sorted((tmp_path / "reports/run/points").iterdir())
    return read_json(tmp_path / "reports/run/manifest.json"), [read_json(path / "point.json") for path in points]


def write(path: Path, *values: dict[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, values)))
    return path


def check_three(point: dict[str, Any], *, failed: int) -> None:
    """Under the formulas that these tools print: tpot = (e2e - ttft) / (tokens - 1)."""
    assert (point["isl"], point["osl"], point["requests"]) == (7, 4, 3 + failed)
    assert sum(point["errors"].values()) == failed
    assert point["ttft"]["p50"] == pytest.approx(60)
    assert point["ttft"]["mean"] == pytest.approx(statistics.mean(TTFTS) * 1000)
    assert point["tpot"]["mean"] == pytest.approx(statistics.mean(sum(gaps) / 3 for gaps in GAPS) * 1000, rel=1e-6)
    assert point["e2e"]["max"] == pytest.approx(140)
    assert point["is_valid"] is not bool(failed)


def test_aiperf(tkit: Tkit, tmp_path: Path) -> None:
    manifest, (point,) = imported(tkit, tmp_path, AIPERF)
    lines = [json.loads(line) for line in (AIPERF / "profile_export.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["metadata"]["benchmark_phase"] == "profiling"]
    assert len(lines) == 8
    for name, metric in (("time_to_first_token", "ttft"), ("inter_token_latency", "tpot"), ("request_latency", "e2e")):
        theirs = statistics.mean(line["metrics"][name]["value"] for line in lines)
        assert point[metric]["mean"] == pytest.approx(theirs, rel=1e-6)
    gaps = [gap for line in lines for gap in line["metrics"]["inter_chunk_latency"]["value"]]
    assert point["chunk_gap"]["mean"] == pytest.approx(statistics.mean(gaps), rel=1e-6)
    assert (point["concurrency"], point["osl"], point["requests"], point["is_valid"]) == (4, 16, 8, True)
    assert point["definitions"] == manifest["definitions"] == "aiperf/0.13.0"
    assert point["token_source"] == "tokenizer"
    assert (manifest["label"], manifest["model"], manifest["protocol"]) == ("theirs", "exact", "completions")
    assert set(manifest["identity"]["imported"]["files"]) == {"profile_export.jsonl"}


def test_aiperf_told_to_believe_the_server(tkit: Tkit, tmp_path: Path) -> None:
    shutil.copytree(AIPERF, tmp_path / "theirs")
    summary = tmp_path / "theirs" / "profile_export_aiperf.json"
    written = json.loads(summary.read_text())
    written["input_config"]["endpoint"]["use_server_token_count"] = True
    summary.write_text(json.dumps(written))
    sources = {read_result(path).points[0].token_source for path in (AIPERF, tmp_path / "theirs")}
    assert sources == {"tokenizer", "server_usage"}


def test_guidellm_without_the_servers_count(tmp_path: Path) -> None:
    """Its chunks with text are then all that there is."""
    result = guidellm({"type_": "concurrent", "streams": 2})
    for request in result["benchmarks"][0]["requests"]["successful"]:
        request["output_metrics"] = {}
        request["output_tokens"] = None
        request["info"]["timings"]["token_iterations"] = 3
    path = tmp_path / "benchmarks.json"
    path.write_text(json.dumps(result))
    point = read_result(path).points[0]
    assert (point.token_source, [record.osl for record in point.records]) == ("chunks", [3, 3, 3, 0])


def test_vllm(tkit: Tkit, tmp_path: Path) -> None:
    files = [
        write(tmp_path / "a.json", vllm()),
        write(tmp_path / "b.json", vllm(request_rate=2.0, max_concurrency=None)),
    ]
    manifest, points = imported(tkit, tmp_path, *files)
    assert [(point["concurrency"], point["rate"], point["arrivals"]) for point in points] == [
        (2, None, None), (None, 2.0, "poisson")
    ]  # fmt: skip
    check_three(points[0], failed=1)
    assert points[0]["output_tok_s"] == pytest.approx(12 / 0.4)
    assert points[0]["invalid_reasons"] == ["1 of 4 requests failed"]
    assert points[0]["chunk_gap"]["n"] == 9
    assert (points[0]["definitions"], points[0]["token_source"]) == ("vllm", "server_usage")
    assert set(manifest["identity"]["imported"]["files"]) == {"a.json", "b.json"}


def test_sglang_appends_a_line_per_load(tkit: Tkit, tmp_path: Path) -> None:
    lines = [vllm(total_output_tokens_retokenized=12, max_concurrency=c, errors=[""] * 4, output_lens=[4, 4, 4, 4],
                  ttfts=[*TTFTS, 0.06], itls=[*map(list, GAPS), [0.01] * 3]) for c in (1, 2, 2)]  # fmt: skip
    _, points = imported(tkit, tmp_path, write(tmp_path / "out.jsonl", *lines))
    assert [(point["concurrency"], point["repeat"]) for point in points] == [(1, 1), (2, 1), (2, 2)]
    assert points[0]["definitions"] == "sglang"
    assert points[0]["output_tok_s"] == pytest.approx(40)
    assert points[0]["is_valid"]


@pytest.mark.parametrize(
    ("strategy", "load"),
    [
        ({"type_": "concurrent", "streams": 2}, (2, None, None)),
        ({"type_": "synchronous"}, (1, None, None)),
        ({"type_": "poisson", "rate": 5.0}, (None, 5.0, "poisson")),
    ],
)
def test_guidellm(tkit: Tkit, tmp_path: Path, strategy: dict[str, Any], load: tuple[Any, ...]) -> None:
    _, (point,) = imported(tkit, tmp_path, write(tmp_path / "benchmarks.json", guidellm(strategy)))
    assert (point["concurrency"], point["rate"], point["arrivals"]) == load
    check_three(point, failed=1)
    assert point["definitions"] == "guidellm/0.8.1"
    assert point["chunk_gap"]["n"] == 0, "it keeps no time between the first and the last token"


def test_genai_perf(tkit: Tkit, tmp_path: Path) -> None:
    write(tmp_path / "profile_export_genai_perf.json", {"input_sequence_length": {"avg": 7.2}})
    _, (point,) = imported(tkit, tmp_path, write(tmp_path / "profile_export.json", genai_perf()))
    check_three(point, failed=0)
    assert (point["concurrency"], point["definitions"], point["token_source"]) == (2, "genai-perf/1.0", "chunks")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "expected JSON objects"),
        ("nonsense", "neither JSON nor JSON lines"),
        ('{"a": 1}', "not a result that tkit can read"),
        ('{"output_throughput": 1, "median_ttft_ms": 2}', "--save-detailed"),
        ('{"input_config": {}}', "give profile_export.jsonl beside it"),
        ('{"experiments": [{"experiment": {}}]}', "looks like a result of genai_perf, but: no 'requests'"),
        ('{"benchmarks": []}', "holds no request"),
        ('{"ttfts": [1], "itls": [], "input_lens": [1], "output_lens": [1]}', "looks like a result of vllm, but: zip"),
    ],
)
def test_what_is_no_result(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "f.json").write_text(content)
    with pytest.raises(InputError) as caught:
        read_result(tmp_path / "f.json")
    assert message in str(caught.value)


def test_one_run_is_of_one_tool(tkit: Tkit, tmp_path: Path) -> None:
    result = tkit("import", AIPERF, write(tmp_path / "a.json", vllm()))
    assert result.exit_code == 2
    assert "one run cannot hold aiperf/0.13.0 and vllm" in result.stderr
