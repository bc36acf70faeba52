"""What every part of `benchmark.py` is asked, and the tables that it prints."""

from collections.abc import Callable
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from moe_jax.analysis.bench.timing import Times
from moe_jax.config import Dense, RunConfig


class Ask(NamedTuple):
    """What to measure, and how often."""

    config: RunConfig
    """Its vocabulary known."""
    batch_size: int
    """Sequences of a training step."""
    rounds: int
    """Times that each candidate runs."""
    quality: dict[Dense, float] | None = None
    """Validation bits per byte of the model and of its dense twins, where a comparison has trained them."""


def times_table(title: str, times: dict[str, Times], extra: Callable[[str, Times], str] | None = None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("candidate")
    for name in ("median ms", "spread", *([""] if extra else [])):
        table.add_column(name, justify="right")
    for name, t in times.items():
        cells = [f"{t.median * 1e3:,.2f}", f"{t.spread:.0%}", *([extra(name, t)] if extra else [])]
        table.add_row(name, *cells)
    return table


def print_numbers(console: Console, numbers: dict[str, Any]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, value in numbers.items():
        table.add_row(name, f"{value:,.4g}" if isinstance(value, float) else f"{value:,}")
    console.print(table)
    console.print()
