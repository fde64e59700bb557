"""Progress bars with a line below them for the moment's details. Imported only on a terminal: rich takes its time."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import RenderableType
from rich.progress import Progress
from rich.text import Text


class Bars(Progress):
    detail = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.detail:
            yield Text(f"  {self.detail}")
