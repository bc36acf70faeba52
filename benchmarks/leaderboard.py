"""Rows of `benchmarks/leaderboard.md` from the folders of finished runs.

    uv run benchmarks/leaderboard.py RUN [RUN ...]

The row's command starts the run again; the compiled arithmetic is that of the matrix products of one training step,
read from its optimised program on this machine, times the steps. A run that was upcycled has two commands, and costs
what its dense run did besides. Run this in the clone that the run was made in: the commit, the machine and the dense
run are those it finds there.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_jax import cli, environment
from moe_jax.config import ConfigError, RunConfig, UserError, load_config
from moe_jax.flags import flag_of
from moe_jax.presets import preset

HEADER = (
    "| bits/byte | training_flops | compiled | wall clock | drops, training / evaluation | command | commit | machine |"
)


SAID_ELSEWHERE = {("model", "vocab_size"), ("data", "source"), ("train", "seed")}


def command(config: RunConfig) -> str:
    """What to type for this run: the preset, each flag that differs from it, the seed. The text's path is left open."""
    words = [f"uv run train.py --preset {config.preset} --data FOLDER --seed {config.train.seed}"]
    usual = preset(config.preset)
    for section in ("model", "data", "train"):
        ours, theirs = getattr(config, section), getattr(usual, section)
        for name in (f.name for f in dataclasses.fields(ours)):
            value = getattr(ours, name)
            if value == getattr(theirs, name) or (section, name) in SAID_ELSEWHERE:
                continue
            flag = flag_of(section, name)
            if isinstance(value, bool):
                words.append(flag if value else flag.replace(".", ".no-", 1))
            else:
                words.append(f"{flag} {value}")
    return " ".join([*words, "--upcycle DENSE"] if config.upcycle else words)


def finished(run: Path) -> tuple[RunConfig, dict[str, Any]]:
    """Its configuration and summary. Raises UserError where it is not finished."""
    config = load_config(run)
    if config is None:
        raise UserError(f"{run}: holds no run; give the folder that train.py wrote")
    summary = json.loads((run / "summary.json").read_text())
    if not summary["val_whole_stream"]:
        raise UserError(f"{run}: is not finished; go on with train.py --out {run} --resume")
    return config, summary


def compiled_flops(config: RunConfig, steps: int) -> int:
    """Of the matrix products of so many compiled training steps."""
    from moe_jax.analysis.bench.training import compile_step
    from moe_jax.analysis.compiled import read_program

    step = compile_step(config, config.train.batch_size * config.train.grad_accum)
    return steps * read_program(step.as_text()).flops


def row(run: Path) -> str:
    """The run as a row. Raises UserError where it is not finished."""
    from moe_jax.analysis.bench.machine import describe

    config, summary = finished(run)
    commands = f"`{command(config)}`"
    compiled, seconds = compiled_flops(config, summary["steps"]), summary["wall_seconds"]
    if config.upcycle:
        dense, before = finished(Path(config.upcycle))
        commands = f"`{command(dense)} --out DENSE`, then {commands}"
        compiled += compiled_flops(dense, before["best_step"])
        seconds += before["wall_seconds"]
    about = describe()
    cells = [
        f"{summary['val_bits_per_byte']:.4f}",
        f"{summary['training_flops'] + summary['inherited_flops']:.3g}",
        f"{compiled:.3g}",
        f"{seconds / 60:.0f} min",
        f"{summary['train_drop_fraction']:.1%} / {summary['val_drop_fraction']:.1%}",
        commands,
        about["commit"] or "unknown",
        f"{about['cores']} cores, {about['processor']}, {summary['precision']}",
    ]
    return "| " + " | ".join(cells) + " |"


def run(argv: Sequence[str]) -> None:
    if not argv:
        raise ConfigError("no argument: give the folders of finished runs")
    environment.prepare()
    print(HEADER)
    print("|" + "---|" * (HEADER.count("|") - 1))
    for folder in argv:
        print(row(Path(folder)))


if __name__ == "__main__":
    sys.exit(cli.main(run))
