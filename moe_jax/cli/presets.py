"""`moe-jax presets`."""

import dataclasses
from dataclasses import dataclass

from moe_jax.cli.command import Command, print_json, print_next
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

            costs = {name: PresetCosts.of(name) for name in PRESETS}
        table = Table(box=None, padding=(0, 2, 0, 0))
        for name in ("preset", "parameters", "active", "tokens", "memory from", "time here"):
            table.add_column(name, justify="left" if name == "preset" else "right", no_wrap=True)
        for name, cost in costs.items():
            millions = [f"{count / 1e6:.1f} M" for count in (cost.parameters, cost.active, cost.tokens)]
            time = f"{duration(cost.fastest)} to {duration(cost.slowest)}"
            table.add_row(name, *millions, f"{cost.least_bytes / 2**20:,.0f} MiB", time)
        rich_console().print(table, "")
        say(*(f"{name:<10} {purpose}" for name, purpose in PURPOSES.items()), "")
        say("memory: what a training step takes at least, counted from the sizes of its arrays")
        rates = [cost.gflops for cost in costs.values()]
        kinds = " and ".join(sorted({cost.compute_dtype for cost in costs.values()}))
        say(
            f"times: if training reaches {LOWEST:.0%} to {HIGHEST:.0%} of one matrix product in {kinds}, measured for "
            f"each preset just now: {min(rates):,.0f} to {max(rates):,.0f} GFLOP/s"
        )
        print_next("uv run train.py --preset nano --dry-run")
        print_json({name: dataclasses.asdict(cost) for name, cost in costs.items()}, self.json)
        return 0


@dataclass(frozen=True)
class PresetCosts:
    """What a preset costs on this machine."""

    parameters: int
    active: int
    """Parameters that one token uses."""
    tokens: int
    """Tokens that training reads."""
    least_bytes: int
    """Memory of a training step, at least."""
    fastest: float
    slowest: float
    """Seconds of training, between which the time is expected."""
    gflops: float
    """The matmul rate that the time rests on, in 10^9 operations a second."""
    compute_dtype: str
    """The precision of that matrix product."""

    @classmethod
    def of(cls, name: str) -> "PresetCosts":
        """The costs of a preset. Measures the speed of a matrix product."""
        from moe_jax.config.presets import preset, with_vocabulary
        from moe_jax.model.costs import count_parameters, least_step_bytes, totals
        from moe_jax.model.precision import choose_policy
        from moe_jax.system import machine
        from moe_jax.training.advice import ExpectedTime

        config = with_vocabulary(preset(name))
        counts, tokens = totals(count_parameters(config.model)), config.train.steps * config.tokens_per_step
        dtype = choose_policy(config.execution.compute_dtype).compute
        rate = machine.matmul_rate(dtype)
        expected = ExpectedTime.of(config, rate)
        return cls(counts.total, counts.active, tokens, least_step_bytes(config), *expected, rate / 1e9, dtype)
