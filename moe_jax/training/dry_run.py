"""`train --dry-run`: the settings of a run, and its expected memory and time. Writes nothing."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.table import Table

from moe_jax.config import SECTIONS, RunConfig
from moe_jax.config.presets import preset, with_vocabulary
from moe_jax.config.section import flag_of
from moe_jax.model.costs import count_parameters, totals, training_flops
from moe_jax.model.low_rank import LoraShape
from moe_jax.model.precision import Policy, choose_policy
from moe_jax.model.step_memory import least_step_bytes
from moe_jax.model.transformer import abstract_adapted, abstract_model
from moe_jax.system import machine
from moe_jax.system.environment import MIB
from moe_jax.system.terminal import rich_console
from moe_jax.training.advice import HIGHEST, LOWEST, ExpectedTime
from moe_jax.training.optimizers.factory import make_optimizer
from moe_jax.training.step_bytes import StepBytes


def print_dry_run(config: RunConfig, advice: Sequence[str] = ()) -> None:
    """Print the differences from the preset, all settings, the parameters, the memory and the time, and the advice."""
    console = rich_console()
    policy = choose_policy(config.execution.compute_dtype)
    console.print(f"[bold]dry run[/bold] of {config.run_dir}: nothing is trained, nothing is written\n")
    changes = _changes_table(config)
    if changes.row_count:
        console.print(f"[bold]settings that differ from preset {config.preset}[/bold]")
        console.print(changes, "")
    else:
        console.print(f"no setting differs from preset {config.preset}\n")
    console.print("[bold]all settings[/bold]")
    console.print(_settings_table(config), "")
    sized = with_vocabulary(config)
    console.print("[bold]parameters[/bold]")
    console.print(_parameters_table(sized), "")
    table = Table.grid(padding=(0, 2))
    for name, text in (
        ("precision", str(policy)),
        ("memory", _memory(sized, policy)),
        ("work", _work(sized)),
        ("time", _time(sized, policy)),
    ):
        table.add_row(name, text)
    if advice:
        table.add_row("advice", "\n".join(advice))
    console.print(table)


def _changes_table(config: RunConfig) -> Table:
    table = Table.grid(padding=(0, 2))
    start = preset(config.preset)
    for (section, name, value), (_, _, before) in zip(config.settings(), start.settings(), strict=True):
        if value != before:
            table.add_row(f"  {flag_of(section, name)} {_said(value)}", f"(preset {_said(before)})")
    return table


def _settings_table(config: RunConfig) -> Table:
    table = Table.grid(padding=(0, 2))
    for section in SECTIONS:
        values = (f"{name} {_said(value)}" for of, name, value in config.settings() if of == section)
        table.add_row(f"  {section}", ", ".join(values))
    return table


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


def _parameters_table(config: RunConfig) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in ("all", "active for a token"):
        table.add_column(name, justify="right")
    groups = count_parameters(config.model)
    for name, count in {**groups, "total": totals(groups)}.items():
        table.add_row(f"  {name}", f"{count.total:,}", f"{count.active:,}")
    return table


def _memory(config: RunConfig, policy: Policy) -> str:
    train = config.train
    _, shapes = abstract_model(config.model, policy.compute, train.param_dtype)
    trained = abstract_adapters(config) if train.lora_rank else shapes
    step = StepBytes.of(config, policy, shapes, trained, make_optimizer(train))
    accumulated = " (a second copy while they accumulate)" if train.grad_accum > 1 else ""
    weights, parameters = step.weights, "weights"
    if train.lora_rank:
        weights, parameters = step.weights - 4 * step.trained, "weights of the model"
    gradients = f"at least {_mib(step.gradients)}" if step.gradients < 4 * step.trained else _mib(step.gradients)
    adapters = f"adapters {_mib(4 * step.trained)}, " * bool(train.lora_rank)
    return (
        f"{parameters} {_mib(weights)}, {adapters}gradients {gradients}{accumulated}, state of {train.optimizer} "
        f"{_mib(step.state)}: {_mib(step.arrays)} in total; with activations a training step needs at least "
        f"{_mib(step.least)}; `uv run --extra gpu-plan python -m moe_jax plan{' --lora RANK' * bool(train.lora_rank)}` "
        "computes the memory of the whole step for a card"
    )


def _mib(size: int) -> str:
    return f"{size / MIB:,.1f} MiB" if size < 10 * MIB else f"{size / MIB:,.0f} MiB"


def abstract_adapters(config: RunConfig) -> Any:
    """The shapes of the adapters of a configuration that has some."""
    lora = LoraShape.of(config.train)
    assert lora is not None
    return abstract_adapted(config.model, lora)[1]


def _work(config: RunConfig) -> str:
    train, length = config.train, config.model.seq_len
    tokens = train.steps * config.tokens_per_step
    accumulated = f" x {train.grad_accum} accumulated" if train.grad_accum > 1 else ""
    return (
        f"{train.steps:,} steps of {train.batch_size}{accumulated} sequences of {length:,} = {tokens:,} tokens; "
        f"{training_flops(config, train.steps):.2e} floating-point operations"
    )


class PresetCosts(NamedTuple):
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


def preset_costs(name: str) -> PresetCosts:
    """The costs of a preset. Measures the speed of a matrix product."""
    config = with_vocabulary(preset(name))
    counts, tokens = totals(count_parameters(config.model)), config.train.steps * config.tokens_per_step
    dtype = choose_policy(config.execution.compute_dtype).compute
    rate = machine.matmul_rate(dtype)
    expected = ExpectedTime.of(config, rate)
    return PresetCosts(counts.total, counts.active, tokens, least_step_bytes(config), *expected, rate / 1e9, dtype)


def _time(config: RunConfig, policy: Policy) -> str:
    rate = machine.matmul_rate(policy.compute)
    return (
        f"{ExpectedTime.of(config, rate)}, if training reaches {100 * LOWEST:.0f} to {100 * HIGHEST:.0f} % "
        f"of {rate / 1e9:,.0f} GFLOP/s, the {policy.compute} matmul rate of this machine, measured now; "
        "compiling, evaluations and checkpoints come on top"
    )
