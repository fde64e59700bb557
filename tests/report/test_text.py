from __future__ import annotations

import pytest

from tkit.report import text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (0.0000412, "4.1e−5"),
        (0.0412, "0.0412"),
        (0.5, "0.500"),
        (5.234, "5.23"),
        (9.996, "10.0"),
        (52.34, "52.3"),
        (99.96, "100"),
        (523.4, "523"),
        (5234.6, "5 235"),
        (1234567.8, "1 234 568"),
        (-5.2, "−5.20"),
        (None, "–"),
        (float("nan"), "–"),
    ],
)
def test_number(value: float | None, expected: str) -> None:
    assert text.number(value).replace(text.THIN, " ") == expected


@pytest.mark.parametrize(
    ("relative", "expected"), [(0.1824, "+18.2"), (-0.0906, "−9.1"), (0.0001, "0.0"), (-0.0001, "0.0"), (1.5, "+150.0")]
)
def test_signed(relative: float, expected: str) -> None:
    assert text.signed(relative) == expected


@pytest.mark.parametrize(("value", "expected"), [(1.0, "100"), (0.99999, ">99.9"), (0.9731, "97.3"), (0.0, "0.0")])
def test_share_of_not_all_is_never_100_percent(value: float, expected: str) -> None:
    assert text.share(value) == f"{expected}{text.THIN}%"


def test_shorten_keeps_both_ends() -> None:
    name = "a" * 100 + "-fp8"
    assert text.shorten(name, 20) == "a" * 13 + "…" + "aa-fp8"
    assert text.shorten("short") == "short"


def test_a_right_to_left_name_does_not_turn_its_sentence() -> None:
    assert text.isolated("\u05d0") == "\u2068\u05d0\u2069"
    assert text.isolated("\u202ename") == "\u2068\u202ename\u2069"
    assert text.isolated("name") == "name"


def test_counts() -> None:
    assert text.count(4196608).replace(text.THIN, " ") == "4 196 608"
    assert text.plural(1, "point") == "1 point"
    assert text.plural(0, "point") == "0 points"
