from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from factory import as_open_loop, card, edit, make_run, validation

from tkit.errors import InputError
from tkit.report.compare import compare, find_baseline, run_ids
from tkit.report.read import read_runs
from tkit.report.record import Comparison
from tkit.report.verdict import verdicts


def compared(*paths: Path, baseline: str | None = None) -> Comparison:
    runs, left_out = read_runs(paths)
    chosen = find_baseline(runs, baseline) if baseline else runs[0]
    return compare(
        runs, baseline=chosen if len(runs) > 1 else None, left_out=left_out, created="2025-06-02T00:00:00Z", tkit="0"
    )


def claims(comparison: Comparison) -> list[str]:
    return [claim.text for verdict in verdicts(comparison) for claim in verdict.claims]


@pytest.fixture(scope="module")
def three(three_runs: list[Path]) -> Comparison:
    return compared(*three_runs)


def test_numbers_are_those_of_the_rows(tmp_path: Path) -> None:
    """Percentiles over the requests of every repeat, rates as the median of the repeats."""
    run = make_run(tmp_path, "run", concurrency=(16,), repeats=3, requests=250)
    cell = compared(run).groups[0].levels[0].cells[0]
    ttft, tpot, rates = [], [], []
    for repeat in (1, 2, 3):
        point = run / "points" / f"128x64-c16-r{repeat}"
        for row in pq.read_table(point / "requests.parquet").to_pylist():
            if row["phase"] == "measured":
                ttft.append((row["first_token_ns"] - row["sent_ns"]) / 1e6)
                tpot.append((row["last_token_ns"] - row["first_token_ns"]) / 1e6 / (row["osl"] - row["n_first"]))
        rates.append(json.loads((point / "point.json").read_text())["output_tok_s"])
    values = {name: found.value for name, found in cell.estimates.items() if found is not None}
    assert values["ttft_p50"] == pytest.approx(np.median(ttft))
    assert values["ttft_tail"] == pytest.approx(np.percentile(ttft, 99))
    assert values["tok_s_user"] == pytest.approx(1000 / np.median(tpot))
    assert values["output_tok_s"] == pytest.approx(sorted(rates)[1])
    assert (cell.requests, cell.repeats) == (750, 3)
    for name, found in cell.estimates.items():
        if "_sched_" in name:
            assert found is None, "a closed loop has no schedule"
            continue
        assert found is not None and found.low is not None and found.high is not None
        assert found.low < found.value < found.high


def test_tail_is_what_every_run_supports(tmp_path: Path) -> None:
    many = make_run(tmp_path, "many", concurrency=(4,), requests=700)
    few = make_run(tmp_path, "few", concurrency=(4,), requests=70, seed=1)
    assert compared(many).groups[0].levels[0].tail == 99
    assert compared(many, few).groups[0].levels[0].tail == 90
    edit(few / "points" / "128x64-c4-r1" / "point.json", is_valid=False, invalid_reasons=["why"])
    assert compared(many, few).groups[0].levels[0].tail == 99  # an invalid point does not limit the others


def test_changes_are_called_in_both_directions(tmp_path: Path) -> None:
    slow = make_run(tmp_path, "slow", label="slow", repeats=3, concurrency=(1, 4))
    fast = make_run(tmp_path, "fast", label="fast", speed=0.85, repeats=3, concurrency=(1, 4), seed=1)
    comparison = compared(slow, fast)
    cells = [level.cells[1] for level in comparison.groups[0].levels]
    assert all(cell.changes["output_tok_s"].relative == pytest.approx(1 / 0.85 - 1, abs=0.04) for cell in cells)
    assert all(cell.changes["ttft_p50"].is_called and cell.changes["ttft_p50"].relative < 0 for cell in cells)
    assert claims(comparison)[0].startswith("fast against slow, 128/64 at C = 4: output tok/s +1")
    assert verdicts(comparison)[0].claims[0].over_loads == "All three are better at each of the 2 loads."
    assert [verdicts(found)[0].tone for found in (comparison, compared(fast, slow))] == ["better", "worse"]


def test_a_run_against_its_twin_is_equal_or_not_decided(tmp_path: Path) -> None:
    one = make_run(tmp_path, "one", label="one", repeats=3)
    other = make_run(tmp_path, "other", label="other", repeats=3, seed=9)
    verdict = verdicts(compared(one, other))[0]
    assert verdict.tone in ("same", "undecided")
    assert "not decided" in verdict.claims[0].text or "equal within 3 %" in verdict.claims[0].text


def test_faster_tokens_and_a_slower_start_are_mixed(tmp_path: Path) -> None:
    one = make_run(tmp_path, "one", label="one", repeats=3, shapes=("1000/64",))
    other = make_run(
        tmp_path, "other", label="other", repeats=3, shapes=("1000/64",), speed=0.8, ttft_speed=1.5, seed=1
    )
    assert verdicts(compared(one, other))[0].tone == "mixed"


@pytest.mark.parametrize(
    ("speeds", "tone"), [((1.25, 0.8), "mixed"), ((1.25, 1.0), "worse"), ((0.8, 0.8), "better"), ((0.8, 1.25), "mixed")]
)
def test_a_loss_at_any_load_stands_in_the_tone(tmp_path: Path, speeds: tuple[float, float], tone: str) -> None:
    one = make_run(tmp_path, "one", label="one", repeats=3, concurrency=(1, 4))
    other = make_run(tmp_path, "other", label="other", repeats=3, concurrency=(1, 4), speed=speeds[1], seed=1)
    at_1 = make_run(tmp_path, "at-1", repeats=3, concurrency=(1,), speed=speeds[0], seed=2)
    for point in (at_1 / "points").iterdir():
        shutil.rmtree(other / "points" / point.name)
        point.rename(other / "points" / point.name)
    verdict = verdicts(compared(one, other))[0]
    assert (verdict.tone, "at C = 4:" in verdict.claims[0].text) == (tone, True)


# ---- what may not be compared -------------------------------------------------------------------------------------


def test_what_only_the_baseline_measured_is_named(tmp_path: Path) -> None:
    one = make_run(tmp_path, "one", label="one", shapes=("128/64", "512/32"), concurrency=(1,))
    other = make_run(tmp_path, "other", label="other", concurrency=(1,), seed=1)
    assert verdicts(compared(one, other))[0].details[0] == "Not measured, unlike the baseline: 512/32."
    assert len(verdicts(compared(other, one))[0].details) == 1


def test_an_invalid_point_takes_no_part(tmp_path: Path) -> None:
    one = make_run(tmp_path, "one", concurrency=(1, 4), label="one")
    other = make_run(tmp_path, "other", concurrency=(1, 4), label="other", speed=0.5, invalid={4: "client CPU"})
    comparison = compared(one, other)
    at_1, at_4 = (level.cells[1] for level in comparison.groups[0].levels)
    assert at_1.changes and not at_4.changes
    assert (at_4.is_valid, at_4.invalid_reasons, at_4.is_on_frontier) == (False, ("client CPU",), False)
    assert "at C = 1:" in claims(comparison)[0]
    assert verdicts(comparison)[0].claims[0].over_loads == "Compared at 1 of the baseline's 2 loads."
    assert verdicts(comparison)[0].details[-1] == "1 invalid of 2 points."
    back = compared(other, one)
    assert not back.groups[0].levels[1].cells[1].changes  # nor as the baseline


def test_valid_repeats_stand_for_a_point(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", concurrency=(4,), repeats=3)
    edit(run / "points" / "128x64-c4-r2" / "point.json", is_valid=False, invalid_reasons=["drift"])
    cell = compared(run).groups[0].levels[0].cells[0]
    assert (cell.is_valid, cell.repeats, cell.requests) == (True, 2, 80)
    assert cell.invalid_reasons == ("repeat 2: drift",)


def test_other_token_sources_stand_apart(tmp_path: Path) -> None:
    one = make_run(tmp_path, "one", concurrency=(1,), label="one")
    other = make_run(tmp_path, "other", concurrency=(1,), label="other", token_source="chunks", speed=0.5)
    comparison = compared(one, other)
    assert [(group.runs, group.token_source) for group in comparison.groups] == [
        (("A",), "server_usage"),
        (("B",), "chunks"),
    ]
    assert comparison.groups[1].note is not None and "tokens counted by chunks" in comparison.groups[1].note
    assert not any(cell.changes for group in comparison.groups for level in group.levels for cell in level.cells)
    assert claims(comparison) == [
        "other against one, 128/64: not comparable, tokens counted by chunks under tkit.definitions/1, "
        "the baseline's by server_usage under tkit.definitions/1."
    ]


def test_other_shapes_stand_apart(tmp_path: Path) -> None:
    one = make_run(tmp_path, "one", concurrency=(1,), shapes=("128/64", "16/8"), label="one", requests=12)
    other = make_run(tmp_path, "other", concurrency=(1,), shapes=("16/8",), label="other", requests=12)
    assert [(group.shape, group.runs) for group in compared(one, other).groups] == [
        ("16/8", ("A", "B")),
        ("128/64", ("A",)),
    ]


def test_open_loops_are_compared_by_latency_and_not_by_the_rate_that_was_asked_for(tmp_path: Path) -> None:
    """Half the rate and half the latency: the first is the schedule's doing."""
    runs = [
        as_open_loop(make_run(tmp_path, name, label=name, repeats=3, concurrency=(4,), speed=speed, seed=seed), 2.5)
        for seed, (name, speed) in enumerate({"slow": 1.0, "fast": 0.5}.items())
    ]
    comparison = compared(*runs, baseline="slow")
    (group,) = comparison.groups
    assert (group.title, str(group.levels[0].load)) == ("128/64, poisson arrivals", "2.5 req/s")
    slow, fast = group.levels[0].cells
    assert set(fast.changes) & {"output_tok_s", "tok_s_device", "requests_s"} == set()
    assert fast.changes["tpot_p50"].is_called
    for cell in (slow, fast):
        ttft, sched = cell.estimates["ttft_p50"], cell.estimates["ttft_sched_p50"]
        assert ttft is not None and sched is not None
        assert sched.value == pytest.approx(ttft.value + 30)
        assert not cell.is_on_frontier
    (verdict,) = verdicts(comparison)
    assert verdict.claims[0].text.startswith("fast against slow, 128/64 at 2.5 req/s: TTFT p50 from schedule ")
    assert "output tok/s" not in verdict.claims[0].text


def test_a_hole_stays_a_hole(three: Comparison) -> None:
    levels = three.groups[0].levels
    assert [[cell.run for cell in level.cells] for level in levels] == [["A", "B", "C"], ["A", "B"], ["A", "B", "C"]]
    assert list(map(str, three.facts("C").missing)) == ["128/64 C = 4 repeat 1"]
    assert "1 invalid, 1 missing of 3 points." in verdicts(three)[1].details


def test_a_sweep_that_died_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", concurrency=(1,), requests=12)
    edit(run / "manifest.json", concurrency=[1, 4])
    (run / "state.jsonl").write_text('{"event": "failed", "reason": "ServerError: gone"}\n')
    assert verdicts(compared(run))[0].details == ("1 missing of 2 points. The sweep ended early: ServerError: gone.",)


# ---- devices, frontier, differences -------------------------------------------------------------------------------


def test_rates_are_per_gpu_only_when_every_run_counted_its_gpus(tmp_path: Path) -> None:
    counted = make_run(tmp_path, "counted", engine=card(tp_size=2, backend="tensorrt"), has_gpu=True, concurrency=(1,))
    embedded = make_run(tmp_path, "embedded", engine=card("fp8", tp_size=2), concurrency=(1,))
    unknown = make_run(tmp_path, "unknown", concurrency=(1,))
    for paths, device, devices in (
        ([counted], "GPU", [2]),
        ([counted, embedded], "device", [2, 1]),
        ([counted, unknown], "server", [1, 1]),
    ):
        comparison = compared(*paths)
        assert (comparison.device, [run.num_devices for run in comparison.runs]) == (device, devices)
        for cell in comparison.groups[0].levels[0].cells:
            rate, per_device = cell.estimates["output_tok_s"], cell.estimates["tok_s_device"]
            assert rate is not None and per_device is not None
            assert per_device.value * comparison.facts(cell.run).num_devices == pytest.approx(rate.value)


def test_nothing_beats_the_frontier(three: Comparison) -> None:
    cells = [cell for level in three.groups[0].levels for cell in level.cells if cell.is_valid]
    places = [(cell.estimates["tok_s_user"], cell.estimates["tok_s_device"]) for cell in cells]
    pairs = [(user.value, device.value) for user, device in places if user is not None and device is not None]
    for cell, (x, y) in zip(cells, pairs, strict=True):
        beaten = any(u > x and v > y for u, v in pairs)
        assert cell.is_on_frontier != beaten
    assert 0 < sum(cell.is_on_frontier for cell in cells) < len(cells)


def test_what_differs_is_told_apart(tmp_path: Path) -> None:
    one = make_run(tmp_path, "one", engine=card("none"), concurrency=(1,), seed=0)
    other = make_run(
        tmp_path, "other", engine=card("fp8") | {"source": card()["source"] | {"revision": "abc"}}, concurrency=(1,)
    )
    identity = {"tkit": "0.1.0", "server": {"name": "triton", "version": "2.60.0", "parameters": {"instance": "7"}}}
    edit(other / "manifest.json", seed=3, url="grpc://127.0.0.1:9999", identity=identity)
    found = {(difference.kind, difference.name): difference.values for difference in compared(one, other).differences}
    assert found == {
        ("engine", "quant"): {"A": "none", "B": "fp8"},
        ("engine", "quant_algo"): {"A": "none", "B": "FP8"},
        ("model", "revision"): {"A": "none", "B": "abc"},
        ("conditions", "seed"): {"A": "0", "B": "3"},
        ("conditions", "server.version"): {"A": "2.51.0", "B": "2.60.0"},
    }


def test_the_baseline_goes_by_many_names(three_runs: list[Path]) -> None:
    runs, _ = read_runs(three_runs)
    for name in ("b", "demo-fp8-tp1-3f9c2a", "fp8", str(three_runs[1]), f"{three_runs[0]}/../b"):
        assert find_baseline(runs, name) is runs[1]


def test_a_baseline_that_is_none_or_several(tmp_path: Path) -> None:
    runs, _ = read_runs(
        [
            make_run(tmp_path, name, engine=card("fp8"), concurrency=(1,), requests=12, seed=i)
            for i, name in enumerate("xy")
        ]
    )
    with pytest.raises(InputError) as error:
        find_baseline(runs, "fp8")
    assert error.value.problems == ("x: demo-fp8-tp1-3f9c2a (x)", "y: demo-fp8-tp1-3f9c2a (y)")
    with pytest.raises(InputError, match=r'none of the runs is "fp9" \(did you mean "fp8"\?\)'):
        find_baseline(runs, "fp9")


def test_one_run_is_told_without_a_comparison(tmp_path: Path) -> None:
    comparison = compared(make_run(tmp_path, "run", engine=card(), quality=validation(kl=0.004)))
    assert comparison.baseline is None
    verdict = verdicts(comparison)[0]
    assert verdict.claims[0].text.startswith("demo-none-tp1-3f9c2a, 128/64: highest output rate ")
    assert verdict.details[0].startswith(
        "Quality against its source: KL 0.0040 nats per token, perplexity ratio 1.0095"
    )


def test_a_run_without_a_valid_point(tmp_path: Path) -> None:
    comparison = compared(make_run(tmp_path, "run", label="engine", concurrency=(1,), invalid={1: "drift"}))
    assert claims(comparison) == ["engine, 128/64: no valid point."]


def test_a_run_in_which_everything_failed(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", label="engine", concurrency=(4,), error_rate=1.0, invalid={4: "all failed"})
    cell = compared(run).groups[0].levels[0].cells[0]
    assert cell.errors == {"truncated": 40}
    assert all(found is None for found in cell.estimates.values())


def test_ids_never_run_out() -> None:
    ids = run_ids(60)
    assert (ids[0], ids[25], ids[26], ids[59]) == ("A", "Z", "A2", "H3")
    assert len(set(ids)) == 60
