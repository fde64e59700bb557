from __future__ import annotations

import math

import numpy as np
import pytest

from tkit.report.statistics import (
    MEDIAN_OVER_MEAN,
    PRIOR_DOF,
    REPEAT_NOISE,
    T_975,
    Change,
    Estimate,
    Floats,
    change,
    estimate,
    min_requests,
    percentile_of,
    ratio_of_sums,
    supported_tail,
    t_quantile,
    wilson,
)

NOISE = 0.06  # of one request
SHARED = 0.02  # of the requests that run together, lasting for a few rounds
TRIALS = 200


def requests(generator: np.random.Generator, n: int, block: int, scale: float = 1.0) -> Floats:
    """(n, 2): tokens and milliseconds of a closed loop whose requests share slow moments."""
    rounds, level = [], generator.normal(0, SHARED)
    for _ in range(math.ceil(n / block)):
        rounds.append(level)
        level = 0.5 * level + generator.normal(0, SHARED * math.sqrt(0.75))
    times = 400 * scale * np.exp(np.repeat(rounds, block)[:n] + generator.normal(0, NOISE, n))
    return np.column_stack([np.full(n, 64.0), times])


def measured(
    generator: np.random.Generator, *, repeats: int, scale: float = 1.0, between: float = 0.02, what: str = "rate"
) -> Estimate:
    """One server, measured: each repeat is faster or slower as a whole by `between`."""
    rows = [requests(generator, 160, 16, scale * math.exp(generator.normal(0, between))) for _ in range(repeats)]
    if what == "rate":
        rates = [16_000 * part[:, 0].sum() / part[:, 1].sum() for part in rows]
        found = estimate(rows, ratio_of_sums, block=16, reported=rates)
    else:
        found = estimate([part[:, 1:] for part in rows], percentile_of(float(what)), block=16)
    assert found is not None
    return found


def called(*, repeats: int, scale: float, what: str) -> float:
    """Share of comparisons with the reference in which a difference is called."""
    generator = np.random.default_rng(7)
    changes = [
        change(
            measured(generator, repeats=repeats, scale=scale, what=what),
            measured(generator, repeats=repeats, what=what),
        )
        for _ in range(TRIALS)
    ]
    return sum(found.is_called for found in changes) / TRIALS


@pytest.mark.parametrize(("repeats", "what"), [(1, "rate"), (3, "rate"), (3, "50"), (3, "95")])
def test_a_server_hardly_ever_differs_from_itself(repeats: int, what: str) -> None:
    assert called(repeats=repeats, scale=1.0, what=what) <= 0.05


@pytest.mark.parametrize("what", ["rate", "50", "95"])
def test_a_server_that_is_ten_percent_slower_is_caught(what: str) -> None:
    assert called(repeats=3, scale=1 / 0.9, what=what) >= 0.95


def test_a_sure_difference_that_is_small_is_not_called() -> None:
    exact = {"log_se": 0.001, "dof": 100.0}
    small = change(Estimate(value=102.0, **exact), Estimate(value=100.0, **exact))
    assert small.low is not None and small.low > 0
    assert not small.is_called
    assert change(Estimate(value=104.0, **exact), Estimate(value=100.0, **exact)).is_called


def test_a_large_difference_that_is_not_sure_is_not_called() -> None:
    vague = {"log_se": 0.2, "dof": 4.0}
    assert not change(Estimate(value=130.0, **vague), Estimate(value=100.0, **vague)).is_called


def test_without_an_interval_nothing_is_called() -> None:
    assert change(Estimate(value=300.0), Estimate(value=100.0)) == Change(
        relative=2.0, low=None, high=None, is_called=False
    )


def test_the_interval_of_a_difference_is_the_closed_form() -> None:
    found = change(Estimate(value=110.0, log_se=0.03, dof=5.0), Estimate(value=100.0, log_se=0.04, dof=5.0))
    dof = 0.0025**2 / (0.0009**2 / 5 + 0.0016**2 / 5)  # Welch and Satterthwaite
    half = student_975(dof) * 0.05
    assert found.low == pytest.approx(1.1 * math.exp(-half) - 1, abs=2e-3)
    assert found.high == pytest.approx(1.1 * math.exp(half) - 1, abs=2e-3)


def test_changes_forth_and_back_are_inverse() -> None:
    one, other = Estimate(value=90.0, log_se=0.02, dof=5.0), Estimate(value=100.0, log_se=0.01, dof=5.0)
    forth, back = change(one, other), change(other, one)
    assert (1 + forth.relative) * (1 + back.relative) == pytest.approx(1)
    assert forth.low is not None and back.high is not None
    assert (1 + forth.low) * (1 + back.high) == pytest.approx(1)


def test_independent_requests_have_the_standard_error_of_a_mean() -> None:
    generator = np.random.default_rng(1)
    rows = np.column_stack([np.full(900, 64.0), 100 * np.exp(generator.normal(0, 0.2, 900))])
    found = estimate([rows], ratio_of_sums, block=1)
    assert found is not None and found.log_se is not None
    within = rows[:, 1].std(ddof=1) / rows[:, 1].mean() / 30
    assert found.log_se == pytest.approx(math.hypot(within, REPEAT_NOISE), rel=0.1)
    assert found.dof == PRIOR_DOF


def test_requests_that_share_slow_moments_are_not_taken_for_independent() -> None:
    """Against the truth: how far repeated measurements lie apart."""
    generator = np.random.default_rng(2)
    samples = [requests(generator, 640, 16)[:, 1:] for _ in range(300)]
    true_se = np.log([part.mean() for part in samples]).std(ddof=1)
    found = [estimate([part], lambda rows: rows[..., 0].mean(axis=-1), block=16) for part in samples[:30]]
    told = [math.sqrt(one.log_se**2 - REPEAT_NOISE**2) for one in found if one is not None and one.log_se is not None]
    independent = np.mean([part.std() / part.mean() / math.sqrt(640) for part in samples])
    assert np.mean(told) > 1.3 * independent
    assert 0.5 * true_se < np.mean(told) < 1.1 * true_se  # moments longer than a block go unseen: REPEAT_NOISE


def test_repeats_that_disagree_widen_the_interval() -> None:
    rows = [requests(np.random.default_rng(seed), 160, 16) for seed in range(3)]
    close, apart = (
        estimate(rows, ratio_of_sums, block=16, reported=rates) for rates in ([100, 100.5, 101], [80.0, 100.0, 120.0])
    )
    assert close is not None and apart is not None and close.log_se is not None and apart.log_se is not None
    assert (close.value, apart.value) == (100.5, 100.0)
    assert apart.log_se > 3 * close.log_se


def test_equal_data_give_equal_estimates() -> None:
    rows = [requests(np.random.default_rng(3), 160, 16)]
    assert estimate(rows, ratio_of_sums, block=16) == estimate(rows, ratio_of_sums, block=16)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [([], None), ([[]], None), ([[0.0, 0.0]], None), ([[5.0]], Estimate(value=5.0, n=1))],
)
def test_too_little_data(rows: list[list[float]], expected: Estimate | None) -> None:
    arrays = [np.array(part, dtype=float).reshape(-1, 1) for part in rows]
    assert estimate(arrays, percentile_of(50), block=1) == expected


def test_constant_times_leave_the_noise_between_repeats() -> None:
    found = estimate([np.full((50, 1), 20.0)], percentile_of(50), block=4)
    assert found is not None and found.log_se == pytest.approx(REPEAT_NOISE)


def student_975(dof: float) -> float:
    """The quantile from the density, integrated: independent of any table."""
    x = np.linspace(0, 60, 600_001)
    density = (1 + x * x / dof) ** (-(dof + 1) / 2)
    density *= math.exp(math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2)) / math.sqrt(dof * math.pi)
    area = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * 1e-4)])
    return float(x[np.searchsorted(area, 0.475)])


@pytest.mark.parametrize("dof", range(1, len(T_975) + 1))
def test_the_table_of_student(dof: int) -> None:
    assert t_quantile(dof) == pytest.approx(student_975(dof), abs=1e-3)


@pytest.mark.parametrize("dof", [3.5, 4.7, 31, 45, 60.1, 500, 1e6])
def test_between_its_rows_the_table_is_never_too_narrow(dof: float) -> None:
    assert student_975(dof) - 2e-3 <= t_quantile(dof) <= 1.03 * student_975(dof)


@pytest.mark.parametrize(("percentile", "expected"), [(90, 64), (95, 130), (99, 662)])
def test_requests_that_a_percentile_needs(percentile: int, expected: int) -> None:
    def at_most_one_beyond(n: int) -> float:
        p = 1 - percentile / 100
        return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in (0, 1))

    assert min_requests(percentile) == expected
    assert at_most_one_beyond(expected) <= 0.01 < at_most_one_beyond(expected - 1)


def test_supported_tail() -> None:
    assert [supported_tail(n) for n in (0, 63, 64, 129, 130, 661, 662)] == [None, None, 90, 90, 95, 95, 99]


@pytest.mark.parametrize(("successes", "n"), [(8, 10), (160, 160), (0, 20), (997, 1000)])
def test_wilson_edges_solve_the_score_equation(successes: int, n: int) -> None:
    for edge in wilson(successes, n):
        if 0 < edge < 1:
            z = abs(successes / n - edge) / math.sqrt(edge * (1 - edge) / n)
            assert z == pytest.approx(1.96, abs=1e-3)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("size", [3, 4, 5])
def test_a_median_is_less_exact_than_a_mean(size: int) -> None:
    samples = np.random.default_rng(4).normal(size=(200_000, size))
    ratio = np.median(samples, axis=1).std() / samples.mean(axis=1).std()
    assert MEDIAN_OVER_MEAN[size] == pytest.approx(ratio, rel=0.01)
