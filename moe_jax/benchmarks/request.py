"""BenchmarkRequest: what a suite of `benchmark.py` is asked for; and the tables that suites print."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from moe_jax.config import RunConfig
from moe_jax.system.machine import Times


class BenchmarkRequest(NamedTuple):
    """What to measure, and how often."""

    config: RunConfig
    """The configuration to measure. Its vocabulary size must not be 0."""
    batch_size: int
    """Sequences of a training step."""
    rounds: int
    """How often each candidate runs."""


def matmul_rate_in(times: dict[str, Times], products: Mapping[str, tuple[Callable[[], Any], float]]) -> float:
    """Operations a second of the fastest of the matrix products (`machine.matmuls`) that ran in turn with others."""
    return max(flops / times[name].median for name, (_, flops) in products.items())


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
