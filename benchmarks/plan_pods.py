"""A training step on many GPUs or TPUs that need not be there: memory, what devices send, and the predicted time.

    uv run --isolated --extra gpu-plan python benchmarks/plan_pods.py --mesh expert=4 --gpu rtx3060-12gb
    uv run --group tpu-plan python benchmarks/plan_pods.py --mesh expert=16,data=16 --tpu v5e-256
    uv run --isolated --extra gpu-plan python benchmarks/plan_pods.py --scaling --gpu h100-80gb
    uv run --group tpu-plan python benchmarks/plan_pods.py --scaling --tpu v5e-256 --preset pod-1b

Memory, operations and bytes are read from the compiled program. The times rest on stated rates (`predicted/`), and
nothing was measured. `moe-jax plan --mesh` prints the memory alone. The last line of the output is JSON.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # compiling for described devices must not occupy a real one

from predicted import many_devices as many
from predicted.interconnect import check_gpus, slice_chips
from predicted.many_devices import DevicePlan
from predicted.tpu import Slice

from moe_jax.cli.main import main
from moe_jax.config import DataConfig, ExecutionConfig, MeshShape, ModelConfig, RunConfig, TrainConfig
from moe_jax.config.presets import PRESETS, with_vocabulary
from moe_jax.model.costs import duration
from moe_jax.planning.target import DEFAULT_GPU, Target, load_target
from moe_jax.system.environment import MIB
from moe_jax.system.files import json_text
from moe_jax.system.terminal import say

COLUMNS = "{:>7} {:<18} {:>8} {:>6} {:>8} {:>7} {:>8} {:>10}"
"""Columns of the scaling table, 80 characters at most."""


def pod_1b() -> RunConfig:
    """A mixture of 1.31 billion parameters. No small machine can train it, so it is no preset of `train.py`."""
    return RunConfig(
        model=ModelConfig(layers=8, width=1280, heads=20, seq_len=1024, experts=16, expert_hidden=2432),
        data=DataConfig(source="tinystories", tokenizer="gpt2"),
        train=TrainConfig(batch_size=8, lr=3e-4, weight_decay=0.1, warmup_steps=2000),
        execution=ExecutionConfig(remat=True),
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    about, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="seed-158m", choices=[*PRESETS, "pod-1b"], help="the model")
    chip = parser.add_mutually_exclusive_group()
    chip.add_argument("--gpu", default=DEFAULT_GPU, help="rtx3060-12gb or h100-80gb")
    chip.add_argument("--tpu", default="", help="v5e-1, -4, -8, -16, -32, -64, -128 or -256")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--mesh", default="", help="such as data=2,expert=4")
    what.add_argument("--scaling", action="store_true", help="a table of 1, 2, 4, ... devices")
    parser.add_argument("--sequences", type=int, default=0, help="sequences on each device; those of the preset's step")
    parser.add_argument("--out", default="", help="folder for the picture of --scaling (extra `plots`)")
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> int:
    asked = parse(argv)
    if asked.tpu:
        slice_chips(asked.tpu, asked.mesh)
    else:
        check_gpus(asked.gpu, asked.mesh)
    config = with_vocabulary(pod_1b() if asked.preset == "pod-1b" else PRESETS[asked.preset]())
    sequences = asked.sequences or config.train.batch_size * config.train.grad_accum
    chip = Slice(slice_chips(asked.tpu)) if asked.tpu else load_target(asked.gpu)
    say(f"{asked.preset} on {asked.tpu or asked.gpu}: {sequences} sequences of {config.model.seq_len} tokens a device")
    if asked.scaling:
        return print_table(config, chip, sequences, asked)
    return print_mesh(config, chip, sequences, asked)


def print_mesh(config: RunConfig, chip: Target | Slice, sequences: int, asked: argparse.Namespace) -> int:
    """One mesh, and its efficiency against one device."""
    count = MeshShape.parse(asked.mesh).devices
    devices = many.devices_like(chip, count)
    plan = many.read_plan(many.compiled_for(config, asked.mesh, devices, sequences))
    say(*details(plan), *whole_run(plan, config, sequences))
    base = plan
    if count > 1:
        base = many.read_plan(many.compiled_for(config, "data=1", many.devices_like(chip, 1), sequences))
    efficiency = plan.efficiency(base)
    if efficiency is None or not base.fits:
        why = "its time is not known" if base.fits else "one device cannot hold this step"
        say(f"efficiency against one device: not known, because {why}")
        base = None
    else:
        say(f"efficiency against one device: {efficiency:.1%}, with the same sequences on each device")
    say(assumptions(devices))
    result: dict[str, Any] = {"preset": asked.preset, "chip": chip_name(asked.tpu, asked.gpu)}
    print(json_text(result | {"sequences_per_device": sequences} | many.in_json(plan, base)))
    return 0 if plan.fits else 1


def print_table(config: RunConfig, chip: Target | Slice, sequences: int, asked: argparse.Namespace) -> int:
    """The table of 1, 2, 4, ... devices, each row when it is known."""
    plans: list[DevicePlan] = []
    base = None
    print(COLUMNS.format("devices", "mesh", "MiB", "sent", "compute", "links", "step ms", "efficiency"))
    for plan in many.scaling(config, chip, sequences):
        base = base or (plan if plan.fits else None)
        plans.append(plan)
        print(table_row(plan, base), flush=True)
    say(*notes(plans, base), assumptions(many.devices_like(chip, plans[-1].devices)))
    name = chip_name(asked.tpu, asked.gpu)
    rows = [many.in_json(plan, base) for plan in plans]
    if asked.out:
        from predicted.picture import save_scaling

        Path(asked.out).mkdir(parents=True, exist_ok=True)
        say(*save_scaling(rows, Path(asked.out), f"{asked.preset}-{name}", f"{asked.preset} on {name}"))
    result: dict[str, Any] = {"preset": asked.preset, "chip": name, "sequences_per_device": sequences}
    print(json_text(result | {"rows": rows}))
    return 0 if any(plan.fits for plan in plans) else 1


def chip_name(tpu: str, gpu: str) -> str:
    """v5e of v5e-256; the name of a card as it is."""
    return tpu.partition("-")[0] if tpu else gpu


def details(plan: DevicePlan) -> list[str]:
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


def _rule(plan: DevicePlan) -> str:
    return f"{plan.budget_mib / plan.memory_mib:.0%} of the {plan.memory_mib:,.0f} MiB of a device"


def whole_run(plan: DevicePlan, config: RunConfig, sequences: int) -> list[str]:
    """The tokens and the time of all steps, in lines. Empty if the time of a step is not known.

    Scaling is weak, so the tokens of a step grow with the devices. `sequences` are those of one device.
    """
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


def table_row(plan: DevicePlan, base: DevicePlan | None) -> str:
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


def notes(plans: list[DevicePlan], base: DevicePlan | None) -> list[str]:
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


if __name__ == "__main__":
    sys.exit(main(run))
