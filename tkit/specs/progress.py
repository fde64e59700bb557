"""How long work tells where it is. The base class is silent; `tkit.cli` draws."""

from __future__ import annotations


class Progress:
    def step(self, what: str, done: int, total: int, detail: str = "") -> None:
        """`what` is done up to `done` of `total` units; called again and again with growing `done`.

        `detail` is what else there is to say of it at the moment.
        """

    def note(self, text: str) -> None:
        """One line worth keeping on the screen."""
