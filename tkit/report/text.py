"""Numbers as a reader sees them: one function per kind, used by every rendering, so that none can disagree."""

from __future__ import annotations

import math
import unicodedata

THIN = "\N{NARROW NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
ABSENT = "\N{EN DASH}"
RIGHT_TO_LEFT = {"R", "AL", "AN", "LRE", "LRO", "RLE", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def number(value: float | None) -> str:
    """Three significant digits, all digits from 100 on: `4.1e−5`, `0.0412`, `5.23`, `52.3`, `5 235`."""
    if value is None or not math.isfinite(value):
        return ABSENT
    if 0 < abs(value) < 0.001:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", MINUS)
    decimals = max(0, min(4, 2 - math.floor(math.log10(abs(value))))) if value else 0
    if value and round(abs(value), decimals) >= 10 ** (3 - decimals) and decimals:
        decimals -= 1  # 9.996 is 10.0, not 10.00
    return f"{value:,.{decimals}f}".replace(",", THIN).replace("-", MINUS)


def percent(relative: float | None) -> str:
    """`+18.2 %`"""
    return ABSENT if relative is None else f"{signed(relative)}{THIN}%"


def signed(relative: float) -> str:
    """Percent without its sign: `+18.2`; a change that rounds to nothing has no direction."""
    text = f"{relative * 100:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", MINUS)


def share(value: float | None) -> str:
    """`97.3 %`; never 100 % of what is not all."""
    if value is None:
        return ABSENT
    text = f"{value * 100:.1f}"
    if text == "100.0":
        text = "100" if value == 1 else ">99.9"
    return f"{text}{THIN}%"


def interval(low: float | None, high: float | None) -> str:
    """Of an estimate: `514 to 549`."""
    return "" if low is None or high is None else f"{number(low)} to {number(high)}"


def change_interval(low: float | None, high: float | None) -> str:
    """`+15.1 to +21.3`, percent"""
    return "" if low is None or high is None else f"{signed(low)} to {signed(high)}"


def plural(count: int, noun: str) -> str:
    """`1 point`, `3 points`"""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def shorten(name: str, length: int = 60) -> str:
    """Both ends of a long name, since two engines may differ in the last part only; safe to stand inside a sentence."""
    if len(name) > length:
        tail = length // 3
        name = f"{name[: length - tail - 1]}…{name[-tail:]}"
    return isolated(name)


def isolated(name: str) -> str:
    """Keeps a name with right-to-left letters or controls from turning the text around it."""
    if "\N{FIRST STRONG ISOLATE}" in name:
        return name  # a sentence whose names already are
    if any(unicodedata.bidirectional(character) in RIGHT_TO_LEFT for character in name):
        return f"\N{FIRST STRONG ISOLATE}{name}\N{POP DIRECTIONAL ISOLATE}"
    return name


def fixed(value: float | None, decimals: int) -> str:
    """`1.0093`: perplexities and their ratios differ late."""
    return ABSENT if value is None else f"{value:.{decimals}f}"


def count(value: int) -> str:
    """`4 196 608`"""
    return f"{value:,}".replace(",", THIN)
