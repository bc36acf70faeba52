"""`benchmark.py memory`: the setting of a preset that fits each known card."""

from typing import Any

from rich.console import Console
from rich.table import Table

from moe_jax.config import RunConfig
from moe_jax.planning import search
from moe_jax.planning.target import load_target

TARGETS = ("rtx3050-4gb", "quadro-t1000-4gb", "rtx3060-12gb")
"""Cards that `benchmark.py memory` plans for."""


def memory(console: Console, config: RunConfig) -> dict[str, Any]:
    """Plan the preset for each card, with the preset's own batch size. Nothing runs on a GPU."""
    table = Table(title="first setting that fits, by XLA's buffer plan", title_justify="left", box=None, padding=(0, 1))
    for name in ("card", "precision", "optimizer", "remat", "batch", "MiB", "of", "fits"):
        table.add_column(name, justify="right" if name in ("batch", "MiB", "of") else "left", no_wrap=True)
    found: dict[str, Any] = {}
    for name in TARGETS:
        target = load_target(name)
        plan = search.verdict(list(search.search(config, target)), target).summary(target)
        found[name] = {key: value for key, value in plan.items() if key not in ("preset", "gpu")}
        yes = {True: "yes", False: "no"}
        table.add_row(
            *(name, plan["precision"], plan["optimizer"], yes[plan["remat"]]),
            *(
                f"{plan['micro_batch']} x {plan['grad_accum']}",
                f"{plan['total_mib']:,.0f}",
                f"{plan['budget_mib']:,.0f}",
                yes[plan["fits"]],
            ),
        )
    console.print(table)
    return found
