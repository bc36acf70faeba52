"""What a program prints, by rich: lines, tables, and progress on stderr.

On a terminal, control characters of printed text are shown as `\\x1b`, because a text may come from a model or a
stranger. Newline and tab stay.

rich is imported when it is needed: what runs before the arguments are accepted imports the standard library only.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")

Report = Callable[[int, int], None]
"""Called with the items and the bytes done so far."""


def escape_controls(text: str) -> str:
    """The text with `\\x1b` in place of ESC, and so on, for all control characters but newline and tab."""
    return _CONTROLS.sub(lambda control: f"\\x{ord(control[0]):02x}", text)


def rich_console(*, stderr: bool = False, **settings: Any) -> "Console":
    """The console of rich for this project. It writes colours to a terminal, and escapes the control characters of a
    text there."""
    from rich.console import Console
    from rich.segment import Segment

    class Escaping(Console):
        def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                if segment.control or not self.is_terminal:
                    yield segment
                else:
                    yield Segment(escape_controls(segment.text), segment.style)

    return Escaping(file=sys.stderr if stderr else sys.stdout, highlight=False, **settings)


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would use."""
    if seconds < 1:
        return "under a second"
    if seconds < 100:
        return f"{seconds:.0f} s"
    for limit, size, unit in ((100 * 60, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"


def say(*lines: object) -> None:
    """Print lines: broken at spaces on a terminal, whole in a file or a pipe."""
    if lines and sys.stdout.isatty():
        rich_console().print(*lines, sep="\n", markup=False, emoji=False)
    elif lines:
        print(*lines, sep="\n", flush=True)


def stream_text(start: str, pieces: Iterable[str]) -> None:
    """Print a text as its pieces arrive, and a line end."""
    shown = escape_controls if sys.stdout.isatty() else str
    print(shown(start), end="", flush=True)
    try:
        for piece in pieces:
            print(shown(piece), end="", flush=True)
    finally:  # after Ctrl-C, too
        print(flush=True)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show a spinner and what is done, while it is done. Nothing if stderr is not a terminal. The work must not
    print."""
    with rich_console(stderr=True).status(what) if sys.stderr.isatty() else nullcontext():
        yield


@contextmanager
def progress_bar(what: str, total: int, of_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` steps or bytes are done, and the time left: a bar on a terminal, nothing elsewhere. Call
    the result with what each part adds."""
    if not sys.stderr.isatty():
        yield lambda added: None
        return
    from rich.progress import DownloadColumn, MofNCompleteColumn, Progress, TransferSpeedColumn

    counts = (DownloadColumn(), TransferSpeedColumn()) if of_bytes else (MofNCompleteColumn(),)
    columns = (*Progress.get_default_columns(), *counts)
    with Progress(*columns, console=rich_console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda added: bar.advance(task, added)


@contextmanager
def document_progress(what: str, shown: bool = True) -> Iterator[Report]:
    """Show on a terminal how many documents and bytes have been read, and elsewhere a line at the end."""
    if not shown:
        yield lambda count, size: None
        return
    begin, line = monotonic(), f"{what}: 0 documents"
    status = rich_console(stderr=True).status(what) if sys.stderr.isatty() else None

    def report(count: int, size: int) -> None:
        nonlocal line
        seconds = monotonic() - begin + 1e-9
        rates = f"{count / seconds:,.0f} documents/s, {size / seconds / 1e6:.1f} MB/s"
        line = f"{what}: {count:,} documents, {size / 1e6:.1f} MB ({rates})"
        if status is not None:
            status.update(line)

    with status or nullcontext():
        yield report
    print(line, file=sys.stderr, flush=True)
