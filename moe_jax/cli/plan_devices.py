"""`moe-jax plan --mesh` and `plan --scaling`: a training step on many devices that need not be there."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_jax.cli.command import check_range
from moe_jax.cli.gpu_name import DEFAULT_GPU
from moe_jax.cli.outputs import check_out_folder
from moe_jax.cli.plan_settings import NOTHING_ASKED, ON_A_CARD, Asked, chosen_words
from moe_jax.cli.result import print_json
from moe_jax.config import ConfigError, MeshShape, RunConfig
from moe_jax.config.presets import PLAN_ONLY, PlanPreset, with_vocabulary
from moe_jax.planning.interconnect import GPU_LINKS, check_gpus, slice_chips
from moe_jax.system import environment
from moe_jax.system.environment import MIB
from moe_jax.system.terminal import say, working

if TYPE_CHECKING:
    from moe_jax.planning.many_devices import DevicePlan
    from moe_jax.planning.target import Target
    from moe_jax.planning.tpu import Slice

COLUMNS = "{:>7} {:<18} {:>8} {:>6} {:>8} {:>7} {:>8} {:>10}"
"""Columns of the scaling table, 80 characters at most."""


@dataclasses.dataclass(frozen=True)
class DeviceRequest:
    """What `plan` was asked about many devices."""

    preset: PlanPreset
    gpu: str
    tpu: str
    mesh: str
    scaling: bool
    sequences: int
    out: str
    json: bool
    asked: Asked = NOTHING_ASKED

    @property
    def card(self) -> str:
        """The name of the card. Means nothing for TPUs."""
        return self.gpu or DEFAULT_GPU

    def check(self) -> RunConfig:
        """The settings of the preset. Raises ConfigError for what cannot be planned, before anything is imported."""
        check_range("--sequences", self.sequences, 0, 65536)
        if self.scaling == bool(self.mesh):
            raise ConfigError("--mesh, --scaling: give one: a mesh to plan for, or a table of 1, 2, 4, ... devices")
        if self.out and not self.scaling:
            raise ConfigError(f"--out {self.out}: is for the picture of --scaling; leave it out")
        if self.out:
            check_out_folder("--out", self.out)
        if self.tpu:
            slice_chips(self.tpu, self.mesh)
        else:
            check_gpus(self.card, self.mesh, "" if self.gpu else " (the default)")
        config = with_vocabulary(self.asked.settings(self.preset))
        if self.mesh:
            config.on_mesh(self.mesh, self._sequences(config))
        return config

    def _sequences(self, config: RunConfig) -> int:
        """Sequences on each device in a step. Unless given, those of a step of the preset."""
        return self.sequences or config.train.batch_size * config.train.grad_accum

    def execute(self) -> int:
        config = self.check()
        os.environ["JAX_PLATFORMS"] = "cpu"  # compiling for described devices must not occupy a real one
        environment.prepare_environment()
        chip = self._chip()
        sequences = self._sequences(config)
        model = config.model
        say(
            f"{self.preset} on {self.tpu or self.card}: {sequences} sequences of {model.seq_len} tokens on each device,"
            f" {model.layers} layers, {config.train.optimizer}"
        )
        return self._table(config, chip, sequences) if self.scaling else self._one_mesh(config, chip, sequences)

    def _chip(self) -> "Target | Slice":
        from moe_jax.planning.target import load_target
        from moe_jax.planning.tpu import Slice

        return Slice(slice_chips(self.tpu)) if self.tpu else load_target(self.card)

    def _one_mesh(self, config: RunConfig, chip: "Target | Slice", sequences: int) -> int:
        from moe_jax.planning import many_devices as many

        count = MeshShape.parse(self.mesh).devices
        devices = many.devices_like(chip, count)
        with working("compiling the training step for these devices, a minute or more"):
            plan = many.read_plan(many.compiled_for(config, self.mesh, devices, sequences))
        say(*details(plan), *whole_run(plan, config, sequences))
        planned = config.on_mesh(self.mesh, sequences)
        if plan.fits:
            self._print_command(planned)
        base = plan
        if count > 1:
            one = many.devices_like(chip, 1)
            say("\nnow the step is compiled for one device, for the efficiency: a minute or more, unless it was before")
            with working("compiling the training step for one device"):
                base = many.read_plan(many.compiled_for(config, "data=1", one, sequences))
        efficiency = plan.efficiency(base)
        if efficiency is None or not base.fits:
            why = "its time is not known" if base.fits else "one device cannot hold this step"
            say(f"efficiency against one device: not known, because {why}")
            base = None
        else:
            say(f"efficiency against one device: {efficiency:.1%}, with the same sequences on each device")
        say(assumptions(devices))
        result: dict[str, Any] = {"preset": self.preset, "chip": chip_name(self.tpu, self.card)}
        result["sequences_per_device"] = sequences
        result["tokens_per_step"] = plan.devices * sequences * config.model.seq_len
        result["command"] = self._command(planned) if plan.fits else None
        print_json(result | many.in_json(plan, base), self.json)
        return 0 if plan.fits else 1

    def _command(self, config: RunConfig) -> str | None:
        """The command line that trains with these settings on the devices. None for a preset that is only planned."""
        if self.preset in PLAN_ONLY:
            return None
        start = "JAX_PLATFORMS=tpu uv run --extra tpu-plan" if self.tpu else ON_A_CARD
        words = [f"--preset {self.preset}", *self.asked.words(), f"--mesh {self.mesh}", *chosen_words(config)]
        return f"{start} train.py {' '.join(words)}"

    def _print_command(self, config: RunConfig) -> None:
        command = self._command(config)
        if command is None:
            say(f"{self.preset} is for plans only: train.py has no such preset")
            return
        count = MeshShape.parse(self.mesh).devices
        hosts = -(-count // (8 if self.tpu else GPU_LINKS[self.card].per_host))
        several = ", once on each host, with the flags of docs/scaling.md, Several machines" if hosts > 1 else ""
        say(f"this setting fits, by XLA's buffer plan; train with{several}")
        print(command)  # unbroken, to be copied

    def _table(self, config: RunConfig, chip: "Target | Slice", sequences: int) -> int:
        from moe_jax.planning import many_devices as many

        if self.out:
            from moe_jax.plots.figures import check_installed

            check_installed()
        rows = many.scaling(config, chip, sequences)
        plans: list[DevicePlan] = []
        base = None
        print(COLUMNS.format("devices", "mesh", "MiB", "sent", "compute", "links", "step ms", "efficiency"))
        for plan in self._shown(rows, len(many.counts_for(chip))):
            base = base or (plan if plan.fits else None)
            plans.append(plan)
            print(table_row(plan, base), flush=True)
        say(*notes(plans, base), assumptions(many.devices_like(chip, plans[-1].devices)))
        name = chip_name(self.tpu, self.card)
        found = [many.in_json(plan, base) for plan in plans]
        if self.out:
            from moe_jax.plots.scaling import save_scaling
            from moe_jax.system.files import Folder

            Path(self.out).mkdir(parents=True, exist_ok=True)
            say(*save_scaling(found, Folder(Path(self.out)), f"{self.preset}-{name}", f"{self.preset} on {name}"))
        result: dict[str, Any] = {"preset": self.preset, "chip": name, "sequences_per_device": sequences}
        print_json(result | {"rows": found}, self.json)
        return 0 if any(plan.fits for plan in plans) else 1

    def _shown(self, rows: "Iterator[DevicePlan]", count: int) -> "Iterator[DevicePlan]":
        for number in range(count):
            with working(f"compiling row {number + 1} of {count}, a minute or more"):
                plan = next(rows)
            yield plan


def chip_name(tpu: str, gpu: str) -> str:
    """v5e of v5e-256; the name of a card as it is."""
    return tpu.partition("-")[0] if tpu else gpu


def details(plan: "DevicePlan") -> list[str]:
    """A plan in lines."""
    shape = MeshShape.parse(plan.mesh)
    verdict = "fits" if plan.fits else "does not fit"
    lines = [f"\n{plan.name}, mesh {shape}: all numbers are of one device"]
    if plan.refused:
        lines.append(f"memory: the compiler refuses {plan.total_mib:,.0f} MiB of {plan.memory_mib:,.0f}: does not fit")
        return lines
    lines.append(
        f"memory: arguments {plan.arguments_mib:,.0f} MiB, temporary {plan.temporary_mib:,.0f}, total "
        f"{plan.total_mib:,.0f} of the {plan.budget_mib:,.0f} that a plan may use: {verdict} ({_rule(plan)})"
    )
    if plan.flops is not None:
        lines.append(f"matrix products: {plan.flops / 1e9:,.0f} GFLOP a step")
    for kind, size in (plan.sent or {}).items():
        if size or plan.needed(kind):
            lines.append(f"{kind}: {size / MIB:,.2f} MiB a step, ideal {plan.needed(kind) / MIB:,.2f}")
    if plan.step_ms is None:
        lines.append("time: not known, because the program has a loop of unknown length")
    else:
        lines.append(
            f"predicted, nothing measured: {plan.arithmetic_ms:,.1f} ms arithmetic and memory + "
            f"{plan.collectives_ms:,.1f} ms collectives = {plan.step_ms:,.1f} ms a step"
        )
    return lines


def _rule(plan: "DevicePlan") -> str:
    return f"{plan.budget_mib / plan.memory_mib:.0%} of the {plan.memory_mib:,.0f} MiB of a device"


def whole_run(plan: "DevicePlan", config: RunConfig, sequences: int) -> list[str]:
    """The tokens and the time of all steps, in lines. Empty if the time of a step is not known.

    Scaling is weak, so the tokens of a step grow with the devices. `sequences` are those of one device.
    """
    from moe_jax.training.expected_time import duration

    if plan.step_ms is None:
        return []
    here = sequences * config.model.seq_len
    tokens, steps = plan.devices * here, config.train.steps
    lines = [
        f"{tokens:,} tokens a step, {here:,} on each device: {1e3 * tokens / plan.step_ms:,.0f} tokens/s, "
        f"{duration(steps * plan.step_ms / 1e3)} for {steps:,} steps"
    ]
    if plan.devices > 1:
        fewer = -(-steps // plan.devices)
        lines.append(
            f"these steps read {plan.devices} times the tokens that they would on one device; for the same tokens "
            f"--steps {fewer} are enough, {duration(fewer * plan.step_ms / 1e3)}"
        )
    return lines


def table_row(plan: "DevicePlan", base: "DevicePlan | None") -> str:
    """A row of the scaling table. A star: the program of another row."""
    efficiency = plan.efficiency(base) if base else None
    return COLUMNS.format(
        f"{plan.devices}{'*' * (plan.program_of != plan.devices)}",
        str(MeshShape.parse(plan.mesh)),
        f"{plan.total_mib:,.0f}{'' if plan.fits else ' !'}",
        "" if plan.sent is None else f"{sum(plan.sent.values()) / MIB:,.0f}",
        "" if plan.arithmetic_ms is None else f"{plan.arithmetic_ms:,.1f}",
        "" if plan.collectives_ms is None else f"{plan.collectives_ms:,.1f}",
        "" if plan.step_ms is None else f"{plan.step_ms:,.1f}",
        "" if efficiency is None else f"{efficiency:.1%}",
    ).rstrip()


def notes(plans: "list[DevicePlan]", base: "DevicePlan | None") -> list[str]:
    """What the table means."""
    lines = [
        "\nweak scaling: the same sequences on each device. MiB: memory of one device, of the "
        f"{plans[0].budget_mib:,.0f} that a plan may use ({_rule(plans[0])}). "
        "sent: MiB in the collectives of one device in a step. compute, links: ms of arithmetic and of collectives.",
    ]
    if any(not plan.fits for plan in plans):
        lines.append("!: does not fit")
    if base is not None:
        lines.append(f"efficiency: predicted step on {base.name} / predicted step")
    if any(plan.program_of != plan.devices for plan in plans):
        lines.append(
            "*: not compiled, but read from the largest row's program, which agrees with the smallest such mesh"
        )
    seconds = sum(plan.compile_seconds for plan in plans)
    lines.append(f"compiled in {seconds / 60:,.1f} minutes of processor time of this program")
    return lines


def assumptions(devices: Any) -> str:
    """What a prediction rests on."""
    return (
        "Predicted from the compiled program: no such device was used and nothing was measured. "
        + devices.links.in_words()
        + " Latency is not counted, and collectives wait for the arithmetic."
    )
