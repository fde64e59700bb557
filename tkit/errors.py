"""Every error tkit raises on purpose. Libraries raise, only `tkit.cli` prints and exits.

    TkitError             1   the operation failed
    ├── InputError        2   what was typed or written is wrong: options, YAML, checkpoints
    ├── ServerError       1   a server did not start, died, or did not answer
    └── GateFailed        3   everything ran; a threshold the user set says no

A message names the thing, the place and the numbers. `hint` says what to do next, on a line of its own.
`problems` lists everything that is wrong, so that one run shows the whole list.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class TkitError(Exception):
    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, problems: Sequence[str] = ()):
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.problems = tuple(problems)

    def __str__(self) -> str:
        lines = [self.message, *(f"  - {problem}" for problem in self.problems)]
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


class InputError(TkitError):
    exit_code = 2


class ServerError(TkitError):
    pass


class GateFailed(TkitError):
    exit_code = 3


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean "tp_size"?)`, or "" when nothing known is close."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    return f' (did you mean "{by_lower[near[0]]}"?)' if near else ""
