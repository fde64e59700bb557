from __future__ import annotations

import pytest

from tkit.errors import InputError
from tkit.planner.cost import cost, gpus_for_rate, joules_per_token, read_prices, usd_per_million_tokens
from tkit.planner.gpus import find_gpu

RENT = "date: 2026-11-01\nutilisation: 0.5\ngpus:\n  h100: {usd_per_hour: 2.0}\n"
BUY = """date: 2026-11-01
usd_per_kwh: 0.10
pue: 1.5
years: 4
utilisation: 1.0
gpus:
  H100-SXM: {capex_usd: 40000, hosting_usd_per_month: 100}
"""


def test_dollars_per_million_tokens():
    # 2 GPUs x $3 an hour / (1000 tok/s x 3600 s x 50 %) = $3.33 per million
    assert usd_per_million_tokens(3.0, 2, 1000, 0.5) == pytest.approx(6 / 1.8)


def test_energy_of_an_mlperf_result():
    # 8 x B200 at 1 kW, 1.13-1.31 at the wall; MLPerf v5.1 llama2-70b measured 0.101 J per output token at about 100k tok/s
    low, high = joules_per_token(find_gpu("b200"), 8, 100_000)
    assert (low, high) == pytest.approx((0.0904, 0.1048))
    assert low < 0.101 < high


def test_rent(tmp_path):
    (tmp_path / "prices.yaml").write_text(RENT)
    prices = read_prices(tmp_path / "prices.yaml")
    bill = cost(find_gpu("h100"), 4, (1000.0, 800.0, 1250.0), prices)
    assert bill.usd_per_hour == pytest.approx(8.0)
    assert bill.usd_per_million == pytest.approx((8 / (1250 * 0.0036 * 0.5), 8 / (800 * 0.0036 * 0.5)))
    assert bill.prices_date == "2026-11-01"


def test_total_cost_of_ownership(tmp_path):
    (tmp_path / "prices.yaml").write_text(BUY)
    bill = cost(find_gpu("h100"), 2, (1000.0, 900.0, 1100.0), read_prices(tmp_path / "prices.yaml"))
    # power: 2 x 0.7 kW x 1.22 at the wall x 1.5 x 8760 h x $0.10
    power = 2 * 0.7 * 1.22 * 1.5 * 8760 * 0.10
    assert bill.parts == pytest.approx({"capex": 2 * 40000 / 4, "power": power, "hosting": 2400})
    assert bill.tco_usd == pytest.approx(4 * (20000 + power + 2400))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("date: 2026-11-01\n", "gpus is missing"),
        ("date: 2026-11-01\ngpus:\n  h1000: {usd_per_hour: 1}\n", 'unknown GPU "h1000"'),
        ("date: 2026-11-01\ngpus:\n  h100: {usd_per_hours: 1}\n", 'did you mean "usd_per_hour"'),
        ("gpus:\n  h100: {usd_per_hour: 1}\n", 'key "date" is missing'),
        ("date: x\ngpus:\n  h100: {hosting_usd_per_month: 1}\n", "usd_per_hour or capex_usd"),
        ("date: x\ngpus:\n  h1000: {usd_per_hour: 1}\n", "prices.yaml: gpus: unknown GPU"),
        ("date: x\ngpus:\n  h100: {usd_per_hour: .nan}\n", "usd_per_hour is nan, expected at least 0"),
        ("date: x\nutilisation: 0\ngpus:\n  h100: {usd_per_hour: 1}\n", "utilisation is 0.0, expected more than 0"),
        ("date: x\npue: 0.5\nyears: 0\ngpus:\n  h100: {usd_per_hour: 1}\n", "years is 0.0, expected more than 0"),
    ],
)
def test_wrong_price_files_are_named(tmp_path, text, message):
    (tmp_path / "prices.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        read_prices(tmp_path / "prices.yaml")
    assert message in str(error.value)


def test_gpus_without_a_price_are_named(tmp_path):
    (tmp_path / "prices.yaml").write_text(RENT)
    with pytest.raises(InputError, match="no price for H200-SXM"):
        read_prices(tmp_path / "prices.yaml").of(find_gpu("h200"))


def test_whole_engines_for_a_rate():
    assert gpus_for_rate(10.0, 4.0, 2) == 6
