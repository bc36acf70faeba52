"""A run of 8 or 4 bits a weight, made of a trained run. It has one checkpoint, with the codes and scales in place of
the matrices, and it cannot be trained. Every command that only reads a run opens it like any other.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moe_jax.config import ConfigError, UserError
from moe_jax.model.quantize import Weights, quantize
from moe_jax.model.transformer import Params
from moe_jax.runs.checkpoint import CheckpointStore
from moe_jax.runs.folder import RunFolder, locked_for_training
from moe_jax.runs.load import LoadedRun, check_full_weights, open_run
from moe_jax.system.files import Folder
from moe_jax.system.terminal import step_progress
from moe_jax.training.evaluate import Evaluation, evaluate, make_evaluation_step
from moe_jax.training.merge import copy_records, summary_at


class Quantized(NamedTuple):
    """A quantised run, and what the rounding has changed."""

    checkpoint: Path
    bytes_before: int
    """Of the parameters. The optimizer's state is not counted."""
    bytes_after: int
    before: Evaluation | None
    """The score on the whole validation text. None if the text is not here."""
    after: Evaluation | None
    not_scored: str
    """Why there is no score."""


def quantize_run(run: Path, weights: Weights, out: Path, step: int | None = None) -> Quantized:
    """Write the best checkpoint of `run`, or that of a step, with quantised weights as a new run in `out`.

    Raises UserError if the run is quantised already, cannot be read, or has a matrix that cannot be quantised.
    """
    loaded = open_run(run, step)
    check_full_weights("--run", run, loaded.checkpoint)
    params = quantize(loaded.params, weights)
    try:
        before, after = _scores(loaded, loaded.params, "before"), _scores(loaded, params, "after")
        not_scored = ""
    except (ConfigError, UserError) as error:
        before, after, not_scored = None, None, str(error)
    checkpoint = _save(loaded, params, run, weights, out, after)
    return Quantized(checkpoint, _size(loaded.params), _size(params), before, after, not_scored)


def _scores(run: LoadedRun, params: Params, when: str) -> Evaluation:
    """The score on the run's whole validation text. Raises ConfigError or UserError if the text is not here."""
    store, _ = run.validation_text()
    return evaluate(
        make_evaluation_step(run.graphdef),
        params,
        store.valid.stream.tokens,
        seq_len=run.config.model.seq_len,
        token_bytes=run.tokenizer.token_bytes(),
        answers=store.valid.stream.answers,
        progress=lambda batches: step_progress(f"scoring {when}", batches),
    )


def _save(loaded: LoadedRun, params: Params, run: Path, weights: Weights, out: Path, scored: Evaluation | None) -> Path:
    """Write the folder of the new run. Returns the path of its checkpoint."""
    train = dataclasses.replace(loaded.config.train, lora_rank=0, lora_alpha=0.0, train_router=False)
    config = dataclasses.replace(loaded.config, out=str(out), resume=False, train=train)
    old = loaded.checkpoint
    with locked_for_training(out):
        folder = RunFolder(out)
        source = {"quantized_from": str(run), "step": old.step, "weights": weights, "state": old.manifest["state"]}
        run_id = folder.start(config, loaded.tokenizer, [source])
        copy_records(Folder(run), folder)
        folder.write_summary(summary_at(loaded, run) | _scores_in_summary(scored) | {"weights": weights})
        made = {"weights": weights, "made_from": str(run)}
        context = old.manifest["context"] | {"config": config.to_dict(), "run_id": run_id, "quantized": made}
        store = CheckpointStore(out)
        return store.save({"params": params}, old.step, val_loss=None, elapsed=old.elapsed, context=context)


def _scores_in_summary(scored: Evaluation | None) -> dict[str, Any]:
    """The score of the quantised weights on the whole validation text. Null if that text is not here: the scores of the
    weights before the rounding are not theirs."""
    return {
        "val_loss": scored and scored.loss,
        "val_bits_per_byte": scored and scored.bits_per_byte,
        "val_bytes_per_token": scored and scored.bytes / scored.tokens,
        "val_tokens": scored and scored.tokens,
        "val_drop_fraction": scored and scored.drop_fraction,
        "val_loss_in_training": None,
        "val_whole_stream": scored and True,
    } | ({"val_stream": "whole"} if scored else {})


def _size(params: Params) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))
