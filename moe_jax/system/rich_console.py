"""The console of rich for this project. Use it in place of `rich.console.Console`."""

import sys
from collections.abc import Iterable
from typing import Any, cast

from rich import console
from rich.segment import Segment

from moe_jax.system.streams import Unguarded, escape_controls


class Console(console.Console):
    """Writes colours to the terminal, and escapes the control characters of a text, as `system.streams` does."""

    def __init__(self, *, stderr: bool = False, **settings: Any) -> None:
        stream = sys.stderr if stderr else sys.stdout
        super().__init__(file=cast(Any, Unguarded(stream)), highlight=False, **settings)

    def render(
        self, renderable: console.RenderableType, options: console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or not self.is_terminal:
                yield segment
            else:
                yield Segment(escape_controls(segment.text), segment.style)
