"""`moe-jax presets`."""

from dataclasses import dataclass

from moe_jax.cli.command import Command
from moe_jax.cli.result import print_json, print_next
from moe_jax.system import environment
from moe_jax.system.terminal import say, working


@dataclass(frozen=True)
class Presets(Command):
    """Print what each preset is for, and what it costs on this machine.

    Parameters, tokens and memory are counted. Memory is the least that a training step needs. The time is expected from
    the speed of one matrix product, measured now.
    """

    json: bool = False
    """Print the table as JSON too."""

    def execute(self) -> int:
        environment.prepare_environment()
        with working("measuring the speed of a matrix product"):
            from rich.table import Table

            from moe_jax.config.presets import PRESETS, PURPOSES
            from moe_jax.system.terminal import rich_console
            from moe_jax.training.advice import HIGHEST, LOWEST, duration
            from moe_jax.training.dry_run import preset_costs

            costs = {name: preset_costs(name) for name in PRESETS}
        table = Table(box=None, padding=(0, 2, 0, 0))
        for name in ("preset", "parameters", "active", "tokens", "memory from", "time here"):
            table.add_column(name, justify="left" if name == "preset" else "right", no_wrap=True)
        for name, cost in costs.items():
            table.add_row(
                name,
                f"{cost.parameters / 1e6:.1f} M",
                f"{cost.active / 1e6:.1f} M",
                f"{cost.tokens / 1e6:.1f} M",
                f"{cost.least_bytes / 2**20:,.0f} MiB",
                f"{duration(cost.fastest)} to {duration(cost.slowest)}",
            )
        console = rich_console()
        console.print(table, "")
        say(*(f"{name:<10} {purpose}" for name, purpose in PURPOSES.items()), "")
        say("memory: what a training step takes at least, counted from the sizes of its arrays")
        rates = [cost.gflops for cost in costs.values()]
        kinds = " and ".join(sorted({cost.compute_dtype for cost in costs.values()}))
        say(
            f"times: if training reaches {LOWEST:.0%} to {HIGHEST:.0%} of one matrix product in {kinds}, measured for "
            f"each preset just now: {min(rates):,.0f} to {max(rates):,.0f} GFLOP/s"
        )
        print_next("uv run train.py --preset nano --dry-run")
        print_json({name: cost._asdict() for name, cost in costs.items()}, self.json)
        return 0
