"""A gate: the condition under which a comparison fails, as its author wrote it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Fails when `metric` lies on the `side` ("<" or ">") of `limit`.

    `is_relative`: the limit is a change against the baseline, as a fraction; otherwise it is in the metric's unit.
    """

    text: str
    metric: str
    side: str
    limit: float
    is_relative: bool

    def is_crossed(self, value: float) -> bool:
        return value < self.limit if self.side == "<" else value > self.limit
