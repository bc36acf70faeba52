"""The training runs of an experiment: ordinary runs of `train.py`, each in a folder of its own.

A finished run is not trained again, and a stopped run goes on. So calling an experiment again completes it.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moe_jax.config import RunConfig
from moe_jax.data.token_store import prepare_token_store
from moe_jax.runs.catalog import load_config
from moe_jax.runs.folder import locked_for_training
from moe_jax.runs.records import read_summary
from moe_jax.training.run import finish, take_steps
from moe_jax.training.session import Session
from moe_jax.training.start import resumed_run

BITS = "val_bits_per_byte"
EVALUATIONS = 10
"""Evaluations of each run, evenly spaced. As in every run, the checkpoint with the best evaluation is the result."""
NEEDED = (
    *(BITS, "val_drop_fraction", "wall_seconds", "tokens_seen"),
    *("training_flops", "params_total", "params_active"),
)
"""What the result of an experiment takes from the summary of a run."""


class StudyRun(NamedTuple):
    """One run of an experiment."""

    title: str
    """What is printed before its training."""
    config: RunConfig


def with_prepared_text(asked: RunConfig) -> RunConfig:
    """Prepare the text, and return the settings with the vocabulary size of its tokenizer."""
    store = prepare_token_store(asked.data, seq_len=asked.model.seq_len)
    vocab_size = asked.model.vocab_size or store.tokenizer.vocab_size
    return dataclasses.replace(asked, model=dataclasses.replace(asked.model, vocab_size=vocab_size))


def run_config(settings: RunConfig, name: str, steps: int, seed: int, out: Path, evaluations: int = 0) -> RunConfig:
    """The settings of one run of `steps` steps, in the folder OUT/NAME-STEPS-steps-seed-SEED.

    The run knows its last step from the start, so its learning rate reaches its final value there. `evaluations` is
    EVALUATIONS unless given. A run with one has its last step as its result, so the text of the score chooses nothing.
    """
    each = math.ceil(steps / (evaluations or EVALUATIONS))
    train = dataclasses.replace(settings.train, steps=steps, seed=seed, eval_every=each, save_every=each, patience=0)
    return dataclasses.replace(settings, out=str(out / f"{name}-{steps}-steps-seed-{seed}"), train=train)


def train_all(runs: Sequence[StudyRun]) -> list[dict[str, Any]]:
    """Train the runs in turn, and return their summaries. Raises UserError, and SystemExit at a signal."""
    summaries = []
    for number, run in enumerate(runs, 1):
        print(f"\nrun {number} of {len(runs)}: {run.title}, {run.config.train.steps:,} steps", flush=True)
        summaries.append(train_run(run.config))
    return summaries


def train_run(config: RunConfig) -> dict[str, Any]:
    """Train a run, or the rest of it, and return its summary. Raises UserError, and SystemExit at a signal."""
    folder = Path(config.run_dir)
    done = finished(folder, config.train.steps)
    if done is not None:
        return done
    with locked_for_training(folder):
        session = Session.open(config, (saved := load_config(folder)) and resumed_run(saved))
        if (stopped := take_steps(session, "the same command")) is not None:
            raise SystemExit(128 + stopped)
        result = finish(session)
    jax.clear_caches()  # the next run compiles its own programs
    return result


def finished(folder: Path, steps: int) -> dict[str, Any] | None:
    """The summary of a run that reached its last step and was scored on the whole validation stream, else None."""
    summary = read_summary(folder)
    whole = summary.get("val_whole_stream") is True and summary.get("steps") == steps
    return summary if whole and all(summary.get(name) is not None for name in NEEDED) else None
