"""How long work tells where it is. The base class is silent; `tkit.cli` draws."""

from __future__ import annotations


class Progress:
    def step(self, what: str, done: int, total: int) -> None:
        """`what` is done up to `done` of `total` units; called again and again with growing `done`."""

    def note(self, text: str) -> None:
        """One line worth keeping on the screen."""
