"""Progress on stderr: a bar or a spinner on a terminal, otherwise a line every PLAIN_SECONDS, or nothing."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

PLAIN_SECONDS = 10
"""Seconds between lines of progress if stderr is not a terminal."""

Report = Callable[[int, int], None]
"""Called with the items and the bytes done so far."""


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show a spinner and what is done, while it is done. Nothing if stderr is not a terminal.

    The work must not print, and must not replace the process (`environment.prepare_environment`): a terminal keeps its
    hidden cursor then.
    """
    if not sys.stderr.isatty():
        yield
        return
    from moe_jax.system.rich_console import Console

    with Console(stderr=True).status(what):
        yield


@contextmanager
def step_progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Show how many of `total` steps are done: a bar on a terminal, nothing elsewhere. Call the result after each."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich import progress

    from moe_jax.system.rich_console import Console

    columns = (
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=20),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


@contextmanager
def byte_progress(what: str, items: str, total: int | None, shown: bool = True) -> Iterator[Report]:
    """Show the progress of work on `total` bytes (None if unknown). `items` names what is counted: "documents"."""
    if not shown:
        yield lambda count, size: None
    elif sys.stderr.isatty():
        with _bar(what, items, total) as report:
            yield report
    else:
        with _lines(what, items, total) as report:
            yield report


@contextmanager
def _bar(what: str, items: str, total: int | None) -> Iterator[Report]:
    from rich import progress

    from moe_jax.system.rich_console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=20),
        progress.TransferSpeedColumn(),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TimeRemainingColumn(),
    )
    begin = monotonic()
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, rate="")

        def report(count: int, size: int) -> None:
            rate = count / (monotonic() - begin + 1e-9)
            bar.update(task, completed=size, rate=f"{count:,} {items}, {rate:,.0f}/s")

        yield report


@contextmanager
def _lines(what: str, items: str, total: int | None) -> Iterator[Report]:
    begin = printed = monotonic()
    done = (0, 0)

    def line() -> str:
        count, size = done
        seconds = monotonic() - begin + 1e-9
        share = f" of {total / 1e6:.1f}" if total else ""
        rates = f"{count / seconds:,.0f} {items}/s, {size / seconds / 1e6:.1f} MB/s"
        return f"{what}: {count:,} {items}, {size / 1e6:.1f}{share} MB ({rates})"

    def report(count: int, size: int) -> None:
        nonlocal done, printed
        done = (count, size)
        if monotonic() - printed >= PLAIN_SECONDS:
            printed = monotonic()
            print(line(), file=sys.stderr, flush=True)

    yield report
    print(line(), file=sys.stderr, flush=True)
