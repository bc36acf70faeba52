"""BenchmarkRequest: what a suite of `benchmark.py` is asked for; routers that load all experts evenly; tables."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from moe_jax.config import RunConfig
from moe_jax.model.moe.layer import MoE
from moe_jax.model.moe.router import Routing
from moe_jax.system.machine import Times


class UniformMoE(MoE):
    """An MoE layer in which choice k of token n goes to expert (n*K + k) mod E, and not to the router's choice.

    n counts all tokens of the batch. The router is still computed, and the gates are the gates of its own choices. So
    the cost of the router is included, and only the load of the experts is fixed.
    """

    def route(self, x: jax.Array) -> Routing:
        routing = super().route(x)
        pairs = jnp.arange(routing.expert_index.size, dtype=routing.expert_index.dtype)
        experts = routing.logits.shape[-1]
        return routing._replace(expert_index=(pairs % experts).reshape(routing.expert_index.shape))


class BenchmarkRequest(NamedTuple):
    """What to measure, and how often."""

    config: RunConfig
    """The configuration to measure. Its vocabulary size must not be 0."""
    batch_size: int
    """Sequences of a training step."""
    rounds: int
    """How often each candidate runs."""
    uniform_routing: bool = False
    """Spread tokens evenly over the experts, and ignore the choices of the routers."""

    @property
    def moe(self) -> type[MoE]:
        """The class of the layers with experts."""
        return UniformMoE if self.uniform_routing else MoE


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
