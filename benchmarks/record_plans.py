"""Plan the memory of a run on a GPU that need not be there, by compiling its programs for the GPU.

    uv run --isolated --extra gpu-plan python benchmarks/record_plans.py --model.layers 4
    uv run --isolated --extra gpu-plan python benchmarks/record_plans.py --mesh expert=4
    uv run --isolated --extra gpu-plan python benchmarks/record_plans.py --record

The first tries the settings with which a run may fit the GPU (`moe_jax/training/fit.py`), and prints the plan that
fits. Settings are given by the flags of `train.py`. With a mesh, the training step is compiled for several GPUs, each
with the sequences of a step of the preset, and the memory of one is printed. With `--lora 16 --optimizer adamw` a
fine-tuning by adapters is planned. The exit status is 0 if a setting fits. The last line of the output is JSON.

With --record, the plans of the presets are written for `moe-jax plan`, for all pairs or those that are named, such as
`nano:h100-80gb`. All pairs take hours of processor time.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # compiling for a described card must not occupy a real one

import described_gpu
from described_gpu import Target, bound

from moe_jax.cli.main import main
from moe_jax.cli.settings import parse_settings
from moe_jax.config import ConfigError, MeshShape, RunConfig
from moe_jax.config.presets import PRESETS, preset, with_vocabulary
from moe_jax.parallel.layout import mesh_of
from moe_jax.planning.plans import DEFAULT_GPU, RECORDED
from moe_jax.system import environment
from moe_jax.system.environment import MIB
from moe_jax.system.files import json_text
from moe_jax.system.terminal import say
from moe_jax.training.fit import Device, plans_until_one_fits, program_mib
from moe_jax.training.plan import Plan, chosen, values_of
from moe_jax.training.programs import Programs

CARDS_PER_HOST = 8
"""Cards of one machine, in plans for more of them than this."""


def walk(config: RunConfig, target: Target, budget: float) -> Iterator[Plan]:
    """The plans of the settings of `config`, to the first that fits `budget` MiB of the described GPU."""
    device = Device(target, budget, lambda *program: bound(target, *program, most=budget))
    return plans_until_one_fits(config, device)


def with_adapters(config: RunConfig) -> RunConfig:
    """The settings of a fine-tuning by adapters of this model: AdamW for the adapters, on conversations."""
    train = dataclasses.replace(config.train, optimizer="adamw", muon_router=False)
    return dataclasses.replace(config, train=train, data=dataclasses.replace(config.data, format="chat"))


def mesh_mib(config: RunConfig, target: Target) -> float:
    """MiB of one card in a training step on the mesh of the configuration. Raises ConfigError, UserError."""
    mesh = config.execution.mesh
    count = MeshShape.parse(mesh).devices
    if count > CARDS_PER_HOST and count % CARDS_PER_HOST:
        raise ConfigError(f"mesh {mesh}: has {count} places; give at most {CARDS_PER_HOST}, or a multiple")
    hosts = -(-count // CARDS_PER_HOST)
    described = described_gpu.gpu_devices(target, f"1x{hosts}x{count // hosts}")
    programs = Programs.of(config, target, mesh=mesh_of(mesh, described))
    batch = programs.batch_shapes(config.train.batch_size, config.train.grad_accum)
    if programs.layout is None:  # a mesh of one place
        lowered = described_gpu.lower_for(target, programs.step, programs.state_shapes, batch)
    else:
        lowered = programs.step.lower(programs.state_shapes, batch)  # pyright: ignore[reportFunctionMemberAccess]
    return program_mib(described_gpu.compile_for_gpu(lowered, {}))


def on_mesh(config: RunConfig, mesh: str, sequences: int) -> RunConfig:
    """The run on a mesh, with `sequences` sequences of one micro-batch on each device. Raises ConfigError if the model
    cannot be divided."""
    batch = sequences * MeshShape.parse(mesh).devices
    sizes = {("train", "batch_size"): batch, ("train", "grad_accum"): 1}
    return config.override(sizes | {("execution", "mesh"): mesh})


def plan(asked: argparse.Namespace) -> int:
    """Plan the settings that were asked for, and print the result."""
    target = Target.load(asked.gpu)
    flags = ["--preset", asked.preset, *asked.settings]
    arguments, start = parse_settings(flags, "record_plans.py", __doc__, {}, hidden=["base"])
    config, usual = arguments.config, start.defaults.train
    sequences = usual.batch_size * usual.grad_accum
    budget = config.execution.memory_bytes / MIB or target.facts().budget
    if mesh := config.execution.mesh:
        config = on_mesh(config, mesh, sequences)
    config = with_vocabulary(with_adapters(config) if config.train.lora_rank else config)
    say(f"{config.preset} on {target.device_kind}: a run may use {budget:,.0f} MiB")
    if mesh:
        total = mesh_mib(config, target)
        fits, setting = total <= budget, values_of(config) | {"execution.mesh": mesh}
    else:
        plans = []
        for tried in walk(config, target, budget):
            plans.append(tried)
            programs = ", ".join(f"{name} {mib:,.0f} MiB" for name, mib in tried.programs.items())
            say(f"{tried.name}: {programs or f'at least {tried.least:,.0f} MiB'}")
        best = chosen(plans, budget)
        fits, total, setting = best.fits(budget), best.total, best.setting
    result = {"preset": config.preset, "gpu": target.name, "fits": fits, "total_mib": round(total, 1)}
    print(json_text(result | {"budget_mib": round(budget, 1)} | setting))
    return 0 if fits else 1


def record(pairs: Sequence[str]) -> int:
    """Write the plans of pairs PRESET:GPU, and the facts of every described GPU."""
    cards = {name: Target.load(name).facts()._asdict() for name in described_gpu.names()}
    for card in cards.values():
        del card["name"]
    for pair in pairs or [f"{name}:{gpu}" for name in PRESETS for gpu in cards]:
        name, _, gpu = pair.partition(":")
        config, target = with_vocabulary(preset(name)), Target.load(gpu)
        plans = [rounded(plan) for plan in walk(config, target, target.facts().budget)]
        found = json.loads(RECORDED.read_text())["plans"]
        found[f"{name} {gpu}"] = {"jaxlib": importlib.metadata.version("jaxlib"), "plans": plans}
        write({"cards": cards, "plans": found})
        print(pair, plans[-1]["setting"], plans[-1]["programs"], flush=True)
    return 0


def rounded(plan: Plan) -> dict[str, Any]:
    """A plan for JSON, with tenths of a MiB."""
    programs = {name: round(mib, 1) for name, mib in plan.programs.items()}
    return plan._asdict() | {"least": round(plan.least, 1), "programs": programs}


def write(document: dict[str, dict[str, Any]]) -> None:
    """Write plans.json, a card or a pair a line."""
    parts = []
    for part, entries in document.items():
        lines = [f"{json.dumps(key)}: {json_text(entries[key])}" for key in sorted(entries)]
        parts.append(f"{json.dumps(part)}: {{\n" + ",\n".join(lines) + "\n}")
    RECORDED.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def run(argv: Sequence[str]) -> int:
    about, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--preset", default="seed-158m", choices=list(PRESETS), help="the settings to start from")
    parser.add_argument("--gpu", default=DEFAULT_GPU, help="name of a described GPU, or a file that describes one")
    parser.add_argument("--record", nargs="*", metavar="PRESET:GPU", help="write the plans for `moe-jax plan`")
    asked, asked.settings = parser.parse_known_args(argv)
    environment.prepare_environment()
    return plan(asked) if asked.record is None else record(asked.record)


if __name__ == "__main__":
    sys.exit(main(run))
