"""The published rows: read, predicted, fitted."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tkit.planner.calibration import fit, is_steady, levenberg_marquardt, predict, table
from tkit.planner.holdout import coverage
from tkit.planner.published import SHIPPED, read_table
from tkit.planner.selfcheck import render, selfcheck, shipped_values

HEADER = (
    "engine,engine_version,gpu,tp,model,weights_dtype,isl,osl,concurrency_or_batch,metric,value,regime,kv_dtype,pp,"
    "parallel"
)
GOOD = "TensorRT-LLM,0.17.0,H100-SXM,1,Llama 3.1 8B,fp8,128,128,max,output_throughput,28836.77,max_throughput,fp8,1,TP1"


@pytest.fixture(scope="module")
def shipped():
    return selfcheck(SHIPPED)


@pytest.fixture(scope="module")
def published():
    return read_table(SHIPPED)[0]


def score(check, by, cell):
    return next(score for score in check.scores if (score.by, score.cell) == (by, cell))


def test_the_shipped_rows_are_predicted_as_well_as_when_they_were_fitted(shipped):
    assert shipped.rows == 4087
    assert shipped.failed == ()
    assert score(shipped, "regime", "max_throughput throughput").n == 1792
    assert "by engine" in render(shipped)


def test_nine_in_ten_rows_lie_within_their_band(shipped):
    inside = [score(shipped, "kind", kind) for kind in ("dense", "moe")]
    assert 0.87 <= np.average([s.inside for s in inside], weights=[s.n for s in inside]) <= 0.97


def test_rows_that_cannot_be_predicted_are_counted_by_reason(tmp_path):
    path = tmp_path / "rows.csv"
    changes = {
        "H100-SXM": "TPU-v5", "Llama 3.1 8B": "Nobody 8B", "fp8,128": "fp3,128", "output_throughput": "smell",
        "128,128": "many,128", "max_throughput": "mlperf_offline", "TensorRT-LLM,": "llama.cpp,", ",1,Llama": ",7,Llama",
    }  # fmt: skip
    path.write_text("\n".join([HEADER, GOOD, *(GOOD.replace(old, new) for old, new in changes.items())]) + "\n")
    rows, skipped = read_table(path)
    assert len(rows) == 1
    assert sum(skipped.values()) == len(changes)
    assert 'GPU "TPU-v5" unknown' in skipped
    assert 'model "Nobody 8B" unknown' in skipped


def test_the_command(tkit, tmp_path):
    (tmp_path / "rows.csv").write_text(f"{HEADER}\n{GOOD}\n")
    result = tkit("plan", "--selfcheck", "rows.csv")
    assert result.exit_code == 0, result.output
    assert "1 rows predicted, 0 skipped" in result.stdout
    (tmp_path / "wrong.csv").write_text("a,b\n1,2\n")
    result = tkit("plan", "--selfcheck", "wrong.csv")
    assert result.exit_code == 2
    assert "columns missing" in result.stderr


def test_a_fit_finds_the_constants_that_made_the_rows(published):
    rows = [row for row in published if is_steady(row) and not row.is_moe][::12]
    truth = {name: value.copy() for name, value in shipped_values().items()}
    truth["memory"] *= 0.8
    truth["gemm_fp8"] *= 0.8
    made = predict(table(rows), truth)
    rows = [dataclasses.replace(row, value=float(value)) for row, value in zip(rows, made, strict=True)]
    rows[0] = dataclasses.replace(rows[0], value=rows[0].value * 50)  # a misprint
    fitted = fit(table(rows))
    off = np.abs(predict(table(rows[1:]), fitted) / made[1:] - 1)
    assert np.median(off) < 0.05


def test_the_prior_holds_where_nothing_was_measured():
    target = np.array([0.3])
    x = levenberg_marquardt(lambda x: np.repeat(x[:1] - target, 50), np.zeros(2), np.array([1.0, 1.0]))
    assert x == pytest.approx([0.3, 0.0], abs=0.01)


def test_coverage_of_alike_folds_is_what_was_asked(published):
    rows = [row for row in published if row.load == "offline" and not row.is_moe]
    errors = np.random.default_rng(0).normal(0, 0.1, len(rows))
    folds = [str(index % 5) for index in range(len(rows))]
    assert coverage(rows, errors, folds, tail=0.05) == pytest.approx(0.9, abs=0.03)
