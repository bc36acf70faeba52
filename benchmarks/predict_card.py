"""A training step on a card, measured and predicted, in one JSON file that can be attached to an issue.

    uv run --extra cuda12 python benchmarks/predict_card.py
    uv run --isolated --extra gpu-plan python benchmarks/predict_card.py --gpu rtx3050-4gb
    uv run python benchmarks/predict_card.py --table

The first line measures the card in this machine, the second predicts for a card that need not be there, and the third
prints the table of docs/gpu.md from the files in benchmarks/cards/. Without a card the first line measures the
processor. The settings are those that `train.py` chooses for the device.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from predicted.card_parts import parts
from predicted.kernels import read_kernels
from predicted.roofline import Rates, predict, predict_program
from rich.console import Console

from moe_jax.cli.main import main
from moe_jax.config import ExecutionConfig, RunConfig
from moe_jax.config.presets import PRESETS, preset, with_vocabulary
from moe_jax.model.costs import training_flops
from moe_jax.model.transformer import Params, merge
from moe_jax.planning.card import target_of_device
from moe_jax.planning.device_memory import Memory
from moe_jax.planning.fitting import room_here
from moe_jax.planning.ladder import Room, walk
from moe_jax.planning.plans import chosen, recorded
from moe_jax.planning.target import Target, load_target
from moe_jax.system import machine
from moe_jax.system.environment import MIB, ask_nvidia_smi
from moe_jax.system.files import json_text
from moe_jax.system.machine import alternate
from moe_jax.system.terminal import working
from moe_jax.training.loss import training_loss
from moe_jax.training.programs import Programs, RandomTokenTrainer

CARDS = Path(__file__).parent / "cards"
"""One file for each card: what this script wrote."""
SCHEMA = 1

type Pair = dict[str, float | None]
"""{"predicted": ..., "measured": ...}. None: not known."""


def pair(predicted: float | None, measured: float | None) -> Pair:
    return {"predicted": predicted, "measured": measured}


def record(config: RunConfig, device: Any, target: Target | None) -> dict[str, Any]:
    """What every file says of the device and of the setting. `device` is a `jax.Device` or a described card."""
    train, programs = config.train, Programs.of(config, device)
    driver = ask_nvidia_smi("driver_version") if device.platform == "gpu" and device is not target else None
    kept = {name: getattr(train, name) for name in ("optimizer", "batch_size", "grad_accum", "param_dtype")}
    return {
        "schema": SCHEMA,
        "device": str(device.device_kind),
        "platform": device.platform,
        "compute_capability": target and target.compute_capability,
        "memory_mib": target and round(target.memory / MIB),
        "driver": driver and driver[0],
        "preset": config.preset,
        "setting": kept
        | {"remat": config.execution.remat, "seq_len": config.model.seq_len, "precision": programs.policy.compute}
        | {"attention": programs.attention.reason},
        "versions": machine.versions(),
        "machine": machine.describe() if device is not target else None,
        "description": target and target.text,
    }


def setting(config: RunConfig, target: Target | None = None) -> tuple[RunConfig, float | None]:
    """The setting that `train.py` chooses on this machine's device, or on a described card, and the planned MiB of its
    step. On a device without a known limit, such as a CPU, what is asked for."""
    room = room_here(config) if target is None else Room.on(target)
    if room is None:
        return config, None
    plans = recorded(config, target)[0] if target else []
    plan = chosen(plans or list(walk(config, room)), room.budget)
    return plan.config, plan.programs.get("step", plan.least)


def speeds(config: RunConfig, predicted: float | None, measured: float | None, rates: Pair) -> dict[str, Pair]:
    """The rows of a step from its seconds. `rates` are those of a matrix product in the same precision: the step's own
    operations (`costs.training_flops`), divided by its time, are a share of them."""
    seconds, flops = pair(predicted, measured), training_flops(config, 1)
    known = {name: (s, rates[name]) for name, s in seconds.items()}
    return {
        "step_ms": {name: s and 1e3 * s for name, (s, _) in known.items()},
        "tokens_per_second": {name: s and config.tokens_per_step / s for name, (s, _) in known.items()},
        "share_of_product_rate": {name: s and rate and flops / s / rate for name, (s, rate) in known.items()},
    }


def product_rate(target: Target | None, precision: str) -> float | None:
    """Operations a second of a matrix product, as the roofline assumes it."""
    if target is None:
        return None
    rates = Rates.of(target)
    return rates.float32 if precision == "float32" else rates.narrow


def predicted_card(config: RunConfig, target: Target, planned: float | None) -> dict[str, Any]:
    """The record of a card that is described only: `planned` MiB of a step, and its predicted time."""
    programs = Programs.of(config, target)
    batch = programs.batch_shapes(config.train.batch_size, config.train.grad_accum)
    with working("compiling the training step for the roofline"):
        prediction = predict_program(target, programs.step, programs.state_shapes, batch)
    seconds = prediction and prediction.milliseconds / 1e3
    rates = pair(product_rate(target, programs.policy.compute), None)
    step = {"step_mib": pair(planned, None)} | speeds(config, seconds, None, rates)
    return record(config, target, target) | step | {"parts_ms": {}, "failed": {}}


def measured_device(console: Console, config: RunConfig, device: Any, rounds: int) -> dict[str, Any]:
    """The record of a device of this machine. What fails is named in the record, and the rest is measured all the same:
    a file with a gap is worth more than none."""
    started, failed, found = time.perf_counter(), dict[str, str](), dict[str, Any]()

    def attempt(name: str, make: Callable[[], Any]) -> Any:
        try:
            with working(f"compiling and measuring: {name}"):
                return make()
        except Exception as error:  # whatever a card or its libraries raise
            failed[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            console.print(f"  {name}: failed: {failed[name]}", soft_wrap=True)
            return None

    on_card = device.platform == "gpu"
    target = attempt("description of the card", lambda: target_of_device(device)) if on_card else None
    found |= attempt("training step", lambda: measured_step(config, device, target, rounds)) or {}
    for name in ("step_mib", "step_ms", "tokens_per_second", "share_of_product_rate"):
        console.print(line(name, found.get(name, pair(None, None))), soft_wrap=True)
    found["parts_ms"], group = {}, ""
    for part in attempt("list of parts", lambda: list(parts(config, device))) or []:
        if part.group != group:
            group = part.group
            console.print(f"\n[bold]{group}, ms[/bold]")
        measured = attempt(part.name, lambda part=part: measured_part(part, target, rounds))
        if measured is not None:
            found["parts_ms"][part.name] = measured
            console.print(line(part.name, measured), soft_wrap=True)
    found["gradients_beside_cpu"] = attempt("gradients", lambda: gradients_beside_cpu(device)) if on_card else None
    found |= {"failed": failed, "seconds": round(time.perf_counter() - started)}
    return record(config, device, target) | found


def measured_step(config: RunConfig, device: Any, target: Target | None, rounds: int) -> dict[str, Pair]:
    """Memory and times of the training step. It is compiled once, for the device itself, so the prediction is of the
    very program that runs. The peak of memory is read before anything else runs."""
    train, programs = config.train, Programs.of(config, device)
    compiled = programs.compiled_step(train.batch_size, train.grad_accum)
    trainer = RandomTokenTrainer.of(config, train.batch_size, train.grad_accum)
    trainer.step = compiled
    for _ in range(2):
        jax.block_until_ready(trainer())
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    size = machine.SIZE if device.platform == "cpu" else machine.LARGE_SIZE
    ((product, operations),) = machine.matmuls(programs.policy.compute, (size,)).values()
    times = alternate({"step": trainer, "product": product}, rounds)
    rates = pair(product_rate(target, programs.policy.compute), operations / times["product"].median)
    mib = pair(Memory.of(compiled).total, peak and peak / MIB)
    return {"step_mib": mib} | speeds(config, predicted_seconds(compiled, target), times["step"].median, rates)


def predicted_seconds(compiled: Any, target: Target | None) -> float | None:
    """The roofline of a compiled program. None without a card, or if a loop has an unknown length."""
    if target is None:
        return None
    with contextlib.suppress(ValueError):
        return predict(read_kernels(compiled.as_text()), Rates.of(target)).milliseconds / 1e3
    return None


def measured_part(part: Any, target: Target | None, rounds: int) -> Pair:
    """Milliseconds of a part."""
    compiled = part.program.lower(*part.shapes).compile()
    predicted = predicted_seconds(compiled, target)
    measured = alternate({"": part._replace(program=compiled).call()}, rounds)[""].median
    return pair(predicted and 1e3 * predicted, 1e3 * measured)


def line(name: str, numbers: Pair) -> str:
    """A row on the screen. What is not known is a question mark."""
    return f"  {name:<38}" + "".join(f"{key:>12} {shown(number):>9}" for key, number in numbers.items())


def shown(number: float | None) -> str:
    return "?" if number is None else f"{number:,.3g}" if number < 1000 else f"{number:,.0f}"


def gradients_beside_cpu(device: Any) -> float:
    """The loss's gradients of `nano` in float32 on a device and on this machine's processor: the largest difference in
    any parameter, over the largest gradient of that parameter."""
    config = dataclasses.replace(with_vocabulary(preset("nano")), execution=ExecutionConfig(compute_dtype="float32"))
    programs = Programs.of(config, device)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (4, config.model.seq_len + 1))

    def loss(params: Params, tokens: jax.Array) -> jax.Array:
        return training_loss(merge(programs.graphdef, params), tokens, None, config.train)[0]

    params = programs.initial_params()
    found = [
        jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(*jax.device_put((params, jnp.asarray(tokens)), place)))
        for place in (jax.devices("cpu")[0], device)
    ]
    return largest_difference(*found)


def largest_difference(expected: Params, found: Params) -> float:
    """Of any two arrays, over the largest magnitude of the expected one. An array of zeros must be zeros."""

    def difference(a: np.ndarray, b: np.ndarray) -> float:
        apart, largest = float(np.abs(a - b).max()), float(np.abs(a).max())
        return apart / largest if largest else (0.0 if apart == 0 else float("inf"))

    return max(jax.tree.leaves(jax.tree.map(difference, expected, found)))


# The table of docs/gpu.md

COLUMNS = ("card, preset", "setting", "step, MiB", "step, ms", "tokens/s", "of product rate")


def table(records: Iterable[dict[str, Any]]) -> list[str]:
    """The lines of the table, a record in each row: predicted / measured, and a dash for what nobody has measured."""
    head, *rows = [f"| {' | '.join(cells)} |" for cells in (COLUMNS, *map(row, records))]
    return [head, "|---" * len(COLUMNS) + "|", *rows]


def row(found: dict[str, Any]) -> tuple[str, ...]:
    setting = found["setting"]
    batch = f"{setting['batch_size']} x {setting['grad_accum']}, {setting['optimizer']}{', remat' * setting['remat']}"
    numbers = (found[name] for name in ("step_mib", "step_ms", "tokens_per_second"))
    share = " / ".join("-" if s is None else f"{s:.0%}" for s in found["share_of_product_rate"].values())
    return (
        f"{found['device'].removeprefix('NVIDIA ')}, `{found['preset']}`",
        f"{setting['precision']}, {batch}",
        *(" / ".join("-" if n is None else f"{n:,.0f}" for n in both.values()) for both in numbers),
        share,
    )


def read_records(folder: Path = CARDS) -> list[dict[str, Any]]:
    """The records in a folder, in the order of their names. Raises ValueError for a file of another schema."""
    found = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    for name, one in found.items():
        if one.get("schema") != SCHEMA:
            raise ValueError(f"{name}: schema {one.get('schema')}, and this script reads {SCHEMA}")
    return list(found.values())


def run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--preset", default="seed-158m", choices=list(PRESETS), help="the model")
    parser.add_argument("--gpu", default="", help="predict for this described card, and measure nothing")
    parser.add_argument("--rounds", type=int, default=9, help="how often each part runs")
    parser.add_argument("--out", type=Path, help="the file to write; unless given, card-NAME.json here")
    parser.add_argument("--table", action="store_true", help="print the table of docs/gpu.md, and do nothing else")
    asked = parser.parse_args(argv)
    if asked.table:
        print(*table(read_records()), sep="\n")
        return 0
    console, config = Console(), with_vocabulary(preset(asked.preset))
    if asked.gpu:
        target = load_target(asked.gpu)
        config, planned = setting(config, target)
        found = predicted_card(config, target, planned)
    else:
        device = jax.devices()[0]
        if device.platform != "gpu":
            console.print("no card is visible to JAX, so the processor is measured; `moe-jax doctor --gpu` says why")
        with working("fitting the run to the device"):
            config, _ = setting(config)
        found = measured_device(console, config, device, asked.rounds)
    path = asked.out or Path(f"card-{'-'.join(found['device'].lower().split())}.json")
    path.write_text(json_text(found, indent=1) + "\n", encoding="utf-8")
    console.print(f"\nwritten: {path}; please attach it to an issue of the project", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(run))
