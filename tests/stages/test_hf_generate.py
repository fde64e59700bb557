"""`tkit sweep --protocol hf-generate`: the source model under transformers' own generate, in the same report."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tkit import demo
from tkit.runtime.static_batch import generate_batch


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR, dtype=torch.float32).eval()


def test_a_batch_gives_what_generate_gives_and_a_time_per_token(model):
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    text = tokenizer(demo.HELD_OUT.read_text()[:4000]).input_ids
    prompts = [text[:24], text[40:64], text[90:114]]
    batch = generate_batch(model, prompts, 12)
    for prompt, tokens in zip(prompts, batch.tokens, strict=True):
        alone = model.generate(
            torch.tensor([prompt]), min_new_tokens=12, max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        assert tokens == alone[0, 24:].tolist()
    times = [batch.start_ns, *batch.token_ns]
    assert len(batch.token_ns) == 12 and times == sorted(set(times))


def test_a_sweep_of_generate_stands_in_a_report(tkit, tmp_path):
    engine = tkit("build", "demo", "--quiet").stdout.strip()
    options = ["--shape", "16/8", "--concurrency", "1,4", "--requests", "6", "--name", "hf"]
    result = tkit("sweep", "--protocol", "hf-generate", *options)
    assert result.exit_code == 0, result.stderr
    header = "measuring demo, transformers generate in this process (hf-generate), profile quick/1\n"
    assert header in result.stderr
    run = Path(result.stdout.splitlines()[-1])
    rows = pd.read_parquet(run / "points" / "16x8-c4-r1" / "requests.parquet")
    assert rows.groupby("phase", sort=False).size().to_dict() == {"warmup": 4, "measured": 8}  # two batches hold six
    assert (rows["isl"] == 16).all() and (rows["osl"] == 8).all() and (rows["status"] == "ok").all()
    assert rows["sent_ns"].nunique() == 3 and rows["last_token_ns"].nunique() == 3  # a batch begins and ends as one
    point = json.loads((run / "points" / "16x8-c4-r1" / "point.json").read_text())
    window = (rows["end_ns"].max() - rows[rows.phase == "warmup"]["end_ns"].max()) / 1e9
    assert point["output_tok_s"] == pytest.approx(64 / window)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["command"] == (
        "tkit sweep quick --protocol hf-generate --shape 16/8 --concurrency 1,4 --requests 6 "
        f"--engine {Path(engine).name}"
    )
    assert tkit("report", "hf", "--out", "out").exit_code == 0
    markdown = Path("out/report.md").read_text()
    assert "demo, transformers generate" in markdown and "static batches of C prompts" in markdown
    assert {row["token_source"] for row in csv.DictReader(Path("out/report.csv").read_text().splitlines())} == {
        "token_ids"
    }


def test_generate_is_not_asked_for_more_than_the_model_has(tkit, tmp_path):
    tkit("build", "demo", "--quiet")
    result = tkit("sweep", "--protocol", "hf-generate", "--shape", "2000/64")
    assert (result.exit_code, "2000/64 needs 2064" in result.stderr, Path("reports").exists()) == (2, True, False)


def test_a_sweep_of_generate_that_was_cut_off_goes_on(tkit, tmp_path, monkeypatch):
    tkit("build", "demo", "--quiet")
    command = ["sweep", "--protocol", "hf-generate", "--shape", "16/8", "--concurrency", "1,4", "--requests", "4"]

    def interrupted(model, prompts, osl):
        if len(prompts) == 4:
            raise KeyboardInterrupt
        return generate_batch(model, prompts, osl)

    with monkeypatch.context() as patched:
        patched.setattr("tkit.runtime.static_batch.generate_batch", interrupted)
        cut = tkit(*command, "--label", "plain")
    [run] = Path("reports").iterdir()
    assert f"{run}: points kept: 1; --resume goes on" in cut.stderr
    assert json.loads((run / "manifest.json").read_text())["label"] == "plain"
    assert json.loads((run / "state.jsonl").read_text().splitlines()[-1])["reason"] == "interrupted"
    kept = (run / "points" / "16x8-c1-r1" / "point.json").stat().st_mtime_ns
    other = tkit(*command[:-1], "6", "--resume")
    assert other.exit_code == 2 and "--requests: 4 then, 6 now" in other.stderr
    resumed = tkit(*command, "--resume")
    assert resumed.stdout.splitlines()[-1] == str(run), resumed.stderr
    assert (run / "points" / "16x8-c1-r1" / "point.json").stat().st_mtime_ns == kept
    assert (run / "points" / "16x8-c4-r1" / "point.json").is_file()
    assert len((run / "summary.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--rate", "2"), "it runs batches of a fixed size: give --concurrency, not --rate or --find-max"),
        (("--spread", "0.5"), "the prompts of a batch have one length: give --shape ISL/OSL alone"),
        (("--url", "127.0.0.1:1", "--timeout", "3"), "leave out --url, --timeout"),
    ],
)
def test_what_a_static_batch_cannot_do_is_refused(tkit, options, reason):
    result = tkit("sweep", "--protocol", "hf-generate", *options)
    assert result.exit_code == 2
    assert reason in result.stderr
    assert not Path("reports").exists()
