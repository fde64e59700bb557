"""`tkit run` with a real Triton: what is done is not done again, and what is kept is compared with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tkit.backends.nvidia import GpuDevice, Machine
from tkit.specs.progress import Progress
from tkit.stages.memory import peak_memory_bytes, reset_peak_memory
from tkit.stages.models import find_recipe
from tkit.stages.run import _note_predictions

RECIPE = """
model: demo
engines: [{quant: none}]
sweep: {shapes: [16/8], concurrency: [1, 2], requests: 4}
report: {out: reports/out}
"""


def points(run: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in run.glob("points/*/point.json")}


def test_what_is_done_is_not_done_again_and_what_was_cut_off_goes_on(tkit, tmp_path):
    Path("r.yaml").write_text(RECIPE)
    record = json.loads(tkit("run", "r.yaml", "--json").stdout)
    engine, run = Path(record["engines"][0]), Path(record["sweeps"][0])
    validated, measured = (engine / "validation.json").stat().st_mtime_ns, points(run)
    assert len(measured) == 2

    journal = run / "state.jsonl"
    cut = next(path for path in run.glob("points/*-c2-*"))
    lines = [line for line in journal.read_text().splitlines(True) if cut.name not in line and '"finished"' not in line]
    journal.write_text("".join(lines))
    shutil.rmtree(cut)
    resumed = tkit("run", "r.yaml", "--save-baseline", "main", "--json")
    assert json.loads(resumed.stdout)["sweeps"] == [str(run)]
    after = points(run)
    assert after[cut.name] > max(measured.values())
    assert [name for name in measured if after[name] != measured[name]] == [cut.name]
    again = tkit("run", "r.yaml", "--json")
    assert json.loads(again.stdout)["sweeps"] == [str(run)]
    assert f"measured in {run}" in again.stderr
    assert points(run) == after
    assert (engine / "validation.json").stat().st_mtime_ns == validated

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
        ("--save-baseline", "../main", "--save-baseline is '../main', expected a name without a path"),
        (
            "--baseline",
            "mian",
            '"mian" is no directory, no kept baseline and no quantization of the recipe (did you mean "main"?)',
        ),
    ],
)
def test_baselines_are_checked_before_anything_is_built(tkit, tmp_path, option, value, said):
    Path("reports/baselines/main").mkdir(parents=True)
    result = tkit("run", "demo", option, value)
    assert result.exit_code == 2
    assert said in result.stderr
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
