"""The published rows: read, predicted, fitted."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tkit.planner import neighbours
from tkit.planner.calibration import fit, group_of, is_steady, levenberg_marquardt, predict, table
from tkit.planner.holdout import coverage, efficiencies, predict_rows
from tkit.planner.published import SHIPPED, read_table
from tkit.planner.roofline import decode_step
from tkit.planner.selfcheck import MEDIAN_THRESHOLDS, THRESHOLDS, render, selfcheck, shipped_values
from tkit.planner.speed import marginal_prefill_s

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
    assert shipped.rows == 4083
    assert shipped.failed == ()
    assert score(shipped, "regime", "max_throughput throughput").n == 1792
    assert "by engine" in render(shipped)


def test_corrections_are_worth_their_while(shipped):
    for cell in THRESHOLDS | MEDIAN_THRESHOLDS:
        found = score(shipped, "metric", cell)
        assert found.mape < 0.6 * found.formula, cell


def test_the_shipped_residuals_are_those_of_the_shipped_constants(published):
    rows = published[::40]
    left = np.log([row.value for row in rows]) - np.log(predict_rows(rows, shipped_values()))
    groups = neighbours.published().groups
    for row, residual in zip(rows, left, strict=True):
        group = groups[row.run.group]
        found = group.residuals[np.isclose(group.values, row.value, rtol=1e-6)]
        assert np.abs(found - residual).min() < 2e-3, row.number


BURST = "sglang,0.5.1.post1,H100-SXM,8,Qwen/Qwen3-32B,,1024,128,64,{metric},{value},inferencex_agg,,1,TP8PP1DP1etp1ep1"
REPLICAS = "trtllm,1.2.0rc6.post3,B200,1,deepseek-ai/DeepSeek-R1,fp4,1024,1024,8,tpot,12.3,inferencex_agg,,1,{layout}"


def test_requests_in_flight_are_those_of_all_replicas_of_the_attention(tmp_path):
    named = REPLICAS.format(layout="TP1PP1DP8etp1ep8") + ",id=r1_b200_trtllm_fp4_agg_1024x1024_c96_tp8_0_ep8_0_976"
    layouts = [REPLICAS.format(layout=layout) + "," for layout in ("TP1PP1DP8etp1ep8", "TP1PP1DP64etp8ep8")]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join([f"{HEADER},notes", named, *layouts]) + "\n")
    rows, _ = read_table(path)
    assert [(row.amount, row.parallel.tp_size, row.has_attention_dp) for row in rows] == [
        (96.0, 8, True), (64.0, 8, True), (512.0, 8, True),
    ]  # fmt: skip


def test_a_burst_waits_for_half_of_the_prompts(tmp_path):
    """64 clients that send one request each: TTFT spreads evenly over the time that all prompts take."""
    path = tmp_path / "rows.csv"
    lines = [BURST.format(metric=metric, value=value) for metric, value in (("tpot", 13.7), ("ttft", 922))]
    path.write_text("\n".join([HEADER, *lines]) + "\n")
    rows, _ = read_table(path)
    values = {name: value * 0 if "request" in name else value for name, value in shipped_values().items()}
    values["waiting"] = np.ones_like(values["waiting"])
    tpot, ttft = predict_rows(rows, values)
    e = efficiencies(values, group_of("sglang", "0.5.1.post1"))
    m = rows[0].machine
    prompts = 64 * float(marginal_prefill_s(m, 1024, e))
    assert tpot == pytest.approx(float(decode_step(m, 64, 1024 + 64, e).total) + 63 / 64 * prompts / 2 / 128, rel=1e-6)
    assert ttft == pytest.approx(prompts * 0.9 * 9 / 16, rel=0.15)  # lengths are 0.9 on average; 8 prompts to a step


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
