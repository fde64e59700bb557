"""`tkit run` with a real Triton: what is done is not done again, and what is kept is compared with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from container import write_container
from fake_backend import ROWS
from nvidia_node import write_programs

from tkit.backends.nvidia import GpuDevice, Machine, this_machine
from tkit.backends.table import BACKENDS
from tkit.errors import ServerError
from tkit.loadgen.mock_server import running_mock
from tkit.specs.progress import Progress
from tkit.stages.memory import peak_memory_bytes, reset_peak_memory
from tkit.stages.models import find_recipe
from tkit.stages.run import _check_serving, _note_predictions

RECIPE = """
model: demo
engines: [{quant: none}]
sweep: {shapes: [16/8], concurrency: [1, 2], requests: 4}
report: {out: reports/out}
"""


BESIDE = """
compare_with:
  - {protocol: hf-generate}
  - {name: theirs, url: URL, model: exact}
"""


def points(run: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in run.glob("points/*/point.json")}


@pytest.fixture
def mock() -> Iterator[str]:
    with running_mock(ttft_ms=20, itl_ms=2) as url:
        yield url


def test_what_is_done_is_not_done_again_and_what_was_cut_off_goes_on(tkit, tmp_path, make_llama, mock, monkeypatch):
    monkeypatch.setitem(BACKENDS, "reference", ROWS["fake"])  # served three times; the engine's text is not the subject
    model = make_llama()
    recipe = RECIPE.replace("demo", str(model))
    Path("r.yaml").write_text(recipe + BESIDE.replace("URL", f"'http://{mock}/v1'"))
    record = json.loads(tkit("run", "r.yaml", "--json").stdout)
    engine, runs = Path(record["engines"][0]), [Path(run) for run in record["sweeps"]]
    validated, measured = (engine / "validation.json").stat().st_mtime_ns, {run: points(run) for run in runs}
    assert [len(found) for found in measured.values()] == [2, 2, 2]
    labels = [json.loads((run / "manifest.json").read_text())["label"] for run in runs]
    assert labels == [engine.name, f"{model}, transformers generate", "theirs"]

    for run in runs[:2]:
        journal, cut = run / "state.jsonl", next(run.glob("points/*-c2-*"))
        lines = journal.read_text().splitlines(True)
        journal.write_text("".join(line for line in lines if cut.name not in line and '"finished"' not in line))
        shutil.rmtree(cut)
    gates = "output_tok_s<+900%,kl>0.01"  # nobody meets the first, and only the engines have to
    resumed = tkit("run", "r.yaml", "--save-baseline", "main", "--fail-on", gates, "--json")
    assert json.loads(resumed.stdout)["sweeps"] == record["sweeps"], resumed.stderr
    report = json.loads(Path("reports/out/report.json").read_text())
    assert (report["baseline"], [run["label"] for run in report["runs"]]) == ("A", labels)
    assert [outcome["checks"] for outcome in report["gates"]] == [[], []]
    assert (
        len({tuple(group["runs"]) for group in report["groups"]}) == 1
    )  # all compared: each counts the model's tokens
    after = {run: points(run) for run in runs}
    for run in runs:
        anew = [name for name in measured[run] if after[run][name] != measured[run][name]]
        assert [name[-5:] for name in anew] == (["c2-r1"] if run != runs[2] else [])
    again = tkit("run", "r.yaml", "--json", "--baseline", "theirs")
    assert json.loads(again.stdout)["sweeps"] == record["sweeps"]
    assert all(f"measured in {run}" in again.stderr for run in runs)
    assert json.loads(Path("reports/out/report.json").read_text())["baseline"] == "C"
    assert {run: points(run) for run in runs} == after
    assert (engine / "validation.json").stat().st_mtime_ns == validated
    run = runs[0]
    Path("r.yaml").write_text(recipe)

    kept = Path(
        "reports/baselines/main"
    )  # the very run that is there: it is not compared with itself, but measured anew
    compared = tkit("run", "r.yaml", "--baseline", "main", "--fail-on", "kl>0.01", "--junit", "junit.xml")
    assert compared.exit_code == 0, compared.stderr
    report = json.loads(Path("reports/out/report.json").read_text())
    assert report["runs"][0]["directory"] == str(kept) and report["runs"][1]["directory"] not in (str(run), str(kept))
    assert (report["baseline"], report["gates"][0]["state"]) == ("A", "passed")
    assert report["runs"][1]["host_speed"]["flops"] > 0
    assert all(cell["wall"] for level in report["groups"][0]["levels"] for cell in level["cells"])
    assert 'name="kl&gt;0.01"' in Path("junit.xml").read_text()


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--save-baseline", "../main", "--save-baseline is '../main', expected a directory name without a path"),
        (
            "--baseline",
            "mian",
            '"mian" is no directory, no kept baseline and nothing that the recipe measures (did you mean "main"?)',
        ),
    ],
)
def test_baselines_are_checked_before_anything_is_built(tkit, tmp_path, option, value, said):
    Path("reports/baselines/main").mkdir(parents=True)
    result = tkit("run", "demo", option, value)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not Path("engines").exists()


def test_what_cannot_be_compared_with_is_refused_before_anything_is_built(tkit, tmp_path):
    others = "[{protocol: hf-generate}, {url: 'ftp://x'}, {name: none, url: 'h:1', model: m, num_gpus: 0}]"
    Path("r.yaml").write_text(f"{{model: demo, compare_with: {others}, sweep: {{rates: [2]}}}}")
    result = tkit("run", "r.yaml")
    assert result.exit_code == 2
    assert 'compare_with: "none" stands twice or is a quantization of the recipe' in result.stderr
    Path("r.yaml").write_text(
        f"{{model: demo, compare_with: {others.replace('name: none, ', '')}, sweep: {{rates: [2]}}}}"
    )
    result = tkit("run", "r.yaml")
    assert result.exit_code == 2
    for said in ("hf-generate: it runs batches of a fixed size", "ftp://x: ", "h:1: --gpus is 0"):
        assert said in result.stderr
    for wrong, said in (
        ("{protocol: openai}", "needs the server's url"),
        ("{protocol: hf-generate, url: x}", "leave out url"),
    ):
        Path("r.yaml").write_text(f"{{model: demo, compare_with: [{wrong}]}}")
        assert said in tkit("run", "r.yaml").stderr
    assert not Path("engines").exists()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_peak_is_of_this_stage_alone():
    before = peak_memory_bytes()
    large = bytearray(300_000_000)
    assert peak_memory_bytes() > before + 200_000_000 or before > 600_000_000
    del large
    reset_peak_memory()
    assert peak_memory_bytes() < before + 100_000_000


def test_predictions_come_before_the_work(tmp_path, monkeypatch):
    """On a GPU that the planner knows, with numbers of `tkit plan`; what cannot run there is said, not refused."""
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE.replace("{quant: none}", "{quant: none}, {quant: fp8}"))
    name, recipe = find_recipe("r.yaml")
    gpu = GpuDevice(index=0, uuid="x", name="NVIDIA A100-SXM4-80GB", sm=80, memory_bytes=0, free_bytes=0, driver="")
    notes: list[str] = []
    progress = Progress()
    monkeypatch.setattr(progress, "note", notes.append)
    _note_predictions("r.yaml", recipe, progress, Machine(gpus=(gpu,)))
    assert name == "r" and notes[0].startswith("plan none: fits on 1 x A100-SXM-80 (tp 1, pp 1) for 2 x 24 tokens; ")
    assert notes[1].endswith("fp8 needs compute capability 8.9, A100-SXM-80 has 8.0")
    _note_predictions("r.yaml", recipe, progress, Machine())
    assert len(notes) == 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("sweep: {profile: nope}", 'r: sweep: no profile "nope"'),
        ("sweep: {concurrency: [0], requests: -1}", "r: sweep: impossible sweep\n  - concurrency is 0"),
        ("sweep: {arrivals: sometimes, rates: [1.0]}", 'r: sweep: --arrivals: unknown process "sometimes"'),
        ("sweep: {dataset: nowhere.jsonl}", "r: sweep: --dataset: nowhere.jsonl: No such file"),
        ("report: {out: r.yaml/x}", "r.yaml: a file, expected a directory\nhint: r: report: choose another out"),
        ("engines: [{quant: fp9, tp_size: 0, goal: x}]", "tp_size is 0, expected at least 1"),
        ("engines: [{quant: int8}, {}, {quant: int8}]", "engines[2] is engines[0] once more"),
        ("sweep: {shapes: [100/20, 2000/64]}", "has 2048 positions, too few for 1 of 2 shapes\n  - 2000/64 needs 2064"),
    ],
)
def test_what_comes_last_is_checked_first(tkit, tmp_path, keys, message):
    Path("r.yaml").write_text(f"model: demo\n{keys}\n")
    result = tkit("run", "r.yaml")
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.skipif(bool(this_machine().gpus), reason="needs a machine without GPUs")
@pytest.mark.parametrize("backend", ["pytorch", "tensorrt"])
def test_a_machine_that_cannot_serve_builds_nothing(tkit, tmp_path, backend):
    result = tkit("run", "demo", "--backend", backend)
    assert (result.exit_code, list(tmp_path.iterdir())) == (1, [])
    assert result.stderr.startswith(f"error: engines of the {backend} backend cannot be served here")
    for said in (
        "  - gpus: none: ",
        "  - tensorrt-llm: not installed",
        "  - models: ",
        "hint: go to a machine that can",
    ):
        assert said in result.stderr


@pytest.mark.parametrize("backend", ["pytorch", "tensorrt"])
def test_a_machine_that_can_serve_is_not_refused(tmp_path, monkeypatch, backend):
    """The node and container on which `tkit serve` of these backends is tested."""
    for make in (write_programs, write_container):
        for name, value in make(tmp_path / "node").items():
            monkeypatch.setenv(name, value)
    _check_serving(backend, this_machine())
    monkeypatch.setenv("TKIT_TRTLLM_MODELS", str(tmp_path / "gone"))
    with pytest.raises(ServerError, match=f"  - models: {tmp_path}/gone; "):
        _check_serving(backend, this_machine())


def test_the_reference_backend_needs_its_server_before_it_builds(tkit, tmp_path, monkeypatch):
    monkeypatch.setenv("TKIT_TRITONSERVER", str(tmp_path / "gone"))
    result = tkit("run", "demo")
    assert (result.exit_code, list(tmp_path.iterdir())) == (1, [])
    assert f"  - triton: {tmp_path / 'gone'}" in result.stderr
