"""Speculative decoding: what drafting gains, and up to which batch."""

from __future__ import annotations

from tkit.planner.record import Speculation
from tkit.planner.roofline import Efficiencies, Machine, decode_step
from tkit.planner.speed import MAX_BATCH
from tkit.planner.wish import Wish

ACCEPTANCES = (0.6, 0.7, 0.8)
DRAFT_TOKENS = 4
DRAFT_SHARE = 0.05  # of a step's linear layers: a draft model of a twentieth of the size


def speculative_gain(
    m: Machine, batch: float, context: float, acceptance: float, tokens: int, e: Efficiencies
) -> float:
    """Tokens per cycle over the cost of a cycle: (1 - a^(k+1)) / (1 - a) x step / (k draft + verify)  (Leviathan et al. 2023).

    Verifying multiplies k + 1 tokens per sequence but reads weights and cache once."""
    step = decode_step(m, batch, context, e)
    wide = decode_step(m, batch * (tokens + 1), context, e)
    verify = wide.linear + step.kv + wide.communication + step.host
    draft = DRAFT_SHARE * step.linear
    expected = (1 - acceptance ** (tokens + 1)) / (1 - acceptance)
    return float(expected * step.total / (tokens * draft + verify))


def speculation(m: Machine, wish: Wish, batch: int, e: Efficiencies) -> list[Speculation]:
    context = wish.isl + wish.osl / 2
    found = []
    for acceptance in ACCEPTANCES:
        low, high = 0, MAX_BATCH
        while low < high:
            middle = (low + high + 1) // 2
            gains = speculative_gain(m, middle, context, acceptance, DRAFT_TOKENS, e) > 1
            low, high = (middle, high) if gains else (low, middle - 1)
        found.append(
            Speculation(
                acceptance=acceptance,
                tokens=DRAFT_TOKENS,
                gain=speculative_gain(m, batch, context, acceptance, DRAFT_TOKENS, e),
                break_even_batch=low if low < MAX_BATCH else None,
            )
        )
    return found
