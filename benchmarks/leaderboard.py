"""Rows of `benchmarks/leaderboard.md` from the folders of finished runs.

    uv run benchmarks/leaderboard.py RUN [RUN ...]

The command in a row starts the same run again. The compiled arithmetic is the number of operations of one training
step's matrix products, read from the optimised program on this machine, times the number of steps. An upcycled run has
two commands, and the costs of its dense run are added to its own. Run this script in the clone where the run was made,
because the commit, the machine and the dense run are taken from there.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flags import flags

from moe_jax.cli.main import main
from moe_jax.config import ConfigError, RunConfig, UserError
from moe_jax.config.presets import preset
from moe_jax.runs.catalog import load_config
from moe_jax.system import environment

HEADER = (
    "| bits/byte | training_flops | compiled | wall clock | drops, training / evaluation | command | commit | machine |"
)


SAID_ELSEWHERE = {("model", "vocab_size"), ("data", "source"), ("train", "seed")}
"""Fields that need no flag: the command names them in another way, or the tokenizer sets them."""


def command(config: RunConfig) -> str:
    """The command of a run: the preset, the seed, each flag that differs from it. FOLDER stands for the text."""
    words = f"uv run train.py --preset {config.preset} --data FOLDER --seed {config.train.seed}".split()
    usual = dict(flags(preset(config.preset)))
    for (section, name), given in flags(config, SAID_ELSEWHERE):
        if section and given != usual[section, name]:
            words += given
    return shlex.join([*words, "--upcycle", "DENSE"] if config.upcycle else words)


def finished(run: Path) -> tuple[RunConfig, dict[str, Any]]:
    """The configuration and the summary of a run. Raises UserError if the run is not finished."""
    config = load_config(run)
    if config is None:
        raise UserError(f"{run}: is not the folder of a run; give a folder that train.py wrote")
    summary = json.loads((run / "summary.json").read_text())
    if not summary["val_whole_stream"]:
        raise UserError(f"{run}: is not finished; go on with train.py --out {run} --resume")
    return config, summary


def compiled_flops(config: RunConfig, steps: int) -> int:
    """Operations of the matrix products of `steps` compiled training steps."""
    from moe_jax.certify.hlo import read_program
    from moe_jax.training.programs import Programs

    step = Programs.of(config).compiled_step(config.train.batch_size * config.train.grad_accum)
    return steps * read_program(step.as_text()).flops


def row(run: Path) -> str:
    """The run as a row of the table. Raises UserError if the run is not finished."""
    from suites.request import describe_machine

    config, summary = finished(run)
    commands = f"`{command(config)}`"
    compiled, seconds = compiled_flops(config, summary["steps"]), summary["wall_seconds"]
    if config.upcycle:
        dense, before = finished(Path(config.upcycle))
        commands = f"`{command(dense)} --out DENSE`, then {commands}"
        compiled += compiled_flops(dense, before["best_step"])
        seconds += before["wall_seconds"]
    about = describe_machine()
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
    environment.prepare_environment()
    print(HEADER)
    print("|" + "---|" * (HEADER.count("|") - 1))
    for folder in argv:
        print(row(Path(folder)))


if __name__ == "__main__":
    sys.exit(main(run))
