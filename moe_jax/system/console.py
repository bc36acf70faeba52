"""Progress on stderr: a bar on a terminal, otherwise a line every PLAIN_SECONDS."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

PLAIN_SECONDS = 10
"""Seconds between lines of progress if stderr is not a terminal."""

Report = Callable[[int, int], None]
"""Called with the items and the bytes done so far."""


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
