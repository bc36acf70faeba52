"""A run with adapters becomes an ordinary run: its weights are W + s A B, and it has no adapters.

The new run goes on where the old one was: its step, its progress, its records. Its optimizer starts anew, because it is
for all weights now.
"""

import dataclasses
from pathlib import Path
from typing import Any

from moe_jax.config import UserError
from moe_jax.model.costs import training_flops
from moe_jax.runs import records
from moe_jax.runs.checkpoint import CheckpointStore, restore
from moe_jax.runs.folder import RunFolder, locked_for_training
from moe_jax.runs.load import LoadedRun, open_run
from moe_jax.runs.records import read_summary
from moe_jax.system.files import Folder
from moe_jax.training.counters import RunCounters
from moe_jax.training.programs import Programs

_KEPT = ("step", "loss_scale", "loss_track", "skipped")
"""Fields of the state that the new run takes over."""
_MOST_BYTES = 2**31
"""Largest file of records that is copied."""


def merge(run: Path, out: Path, step: int | None = None) -> Path:
    """Write the best checkpoint of `run`, or that of a step, as a new run without adapters. Returns the path of the new
    checkpoint.

    Raises UserError if the run has no adapters, or cannot be read.
    """
    loaded = open_run(run, step)
    if not loaded.config.train.lora_rank:
        raise UserError(f"--run {run}: has no adapters, so it is an ordinary run already; copy its folder")
    train = dataclasses.replace(loaded.config.train, lora_rank=0, lora_alpha=0.0, train_router=False)
    config = dataclasses.replace(loaded.config, out=str(out), resume=False, train=train)
    checkpoint, programs = loaded.checkpoint, Programs.of(config)
    state = programs.state(loaded.params)
    kept = {name: getattr(state, name) for name in _KEPT}
    state = dataclasses.replace(state, **restore(checkpoint, kept))
    with locked_for_training(out):
        folder = RunFolder(out)
        source = {"merged_from": str(run), "step": checkpoint.step, "state": checkpoint.manifest["state"]}
        run_id = folder.start(config, loaded.tokenizer, [source])
        copy_records(Folder(run), folder)
        folder.write_summary(summary_at(loaded, run))
        context = checkpoint.manifest["context"]
        evaluated = RunCounters.from_json(context.get("progress")).evaluated
        folder.truncate_logs_after(checkpoint.step, evaluated)
        context = context | {"config": config.to_dict(), "run_id": run_id}
        store = CheckpointStore(out)
        scored, seconds = checkpoint.val_loss, checkpoint.elapsed
        return store.save(state, checkpoint.step, val_loss=scored, elapsed=seconds, context=context)


def copy_records(there: Folder, here: RunFolder) -> None:
    """Copy what training has logged."""
    for name in (records.METRICS, here.samples.name):
        if there.exists(name):
            here.files.write(name, there.read(name, _MOST_BYTES))


def summary_at(loaded: LoadedRun, run: Path) -> dict[str, Any]:
    """The summary of `run`, for a new run that has the weights of the checkpoint `loaded`.

    The scores are those of the run's best checkpoint, so for any other one they are null.
    """
    found, config, step = read_summary(run), loaded.config, loaded.checkpoint.step
    if found.get("best_step") != step:
        found |= dict.fromkeys((name for name in found if name.startswith("val_")), None)
    counts = {"tokens_seen": step * config.tokens_per_step, "training_flops": training_flops(config, step)}
    return found | {"steps": step, "best_step": step} | counts
