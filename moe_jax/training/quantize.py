"""A trained run with weights of 8 or 4 bits, as a new run.

It has one checkpoint, with codes and scales in place of the matrices, and it cannot be trained. Every command that only
reads a run opens it like any other.
"""

import dataclasses
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moe_jax.config import UserError
from moe_jax.model.costs import training_flops
from moe_jax.model.quantized import Weights, quantize
from moe_jax.model.transformer import Params
from moe_jax.runs import records
from moe_jax.runs.arrays import named_leaves, write_weights
from moe_jax.runs.checkpoint import CheckpointStore
from moe_jax.runs.folder import RunFolder
from moe_jax.runs.load import LoadedRun, check_full_weights, open_run
from moe_jax.runs.records import read_summary
from moe_jax.system.files import out_folder
from moe_jax.training.evaluate import Evaluation, evaluate_run


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
    before, after, not_scored = None, None, ""
    try:
        stream = loaded.validation_text()[0].valid.stream
        before = evaluate_run(loaded, stream, "scoring before")
        after = evaluate_run(loaded, stream, "scoring after", params)
    except UserError as error:
        not_scored = str(error)
    checkpoint = _write(loaded, run, out, weights, params, _summary_at(loaded, run, after))
    there, here = (sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (loaded.params, params))
    return Quantized(checkpoint, there, here, before, after, not_scored)


def _write(loaded: LoadedRun, run: Path, out: Path, weights: Weights, params: Params, summary: dict[str, Any]) -> Path:
    """Write the folder of the new run, with the records of the old one up to the checkpoint. Adapters are in the
    parameters by now, so the new run has none. Returns the path of its only checkpoint."""
    old = loaded.checkpoint
    train = dataclasses.replace(loaded.config.train, lora_rank=0, lora_alpha=0.0, train_router=False)
    config = dataclasses.replace(loaded.config, out=str(out), resume=False, train=train)
    source = {"quantized_from": str(run), "step": old.step, "weights": weights, "weights_digest": old.weights_digest}
    with out_folder(out, "quantized") as draft:
        folder = RunFolder(draft)
        folder.start(config, loaded.tokenizer, [source])
        for name in (records.METRICS, folder.samples.name):
            if (run / name).exists():
                shutil.copyfile(run / name, draft / name)
        folder.write_summary(summary | {"weights": weights})
        folder.truncate_logs_after(old.step, old.step)
        context = old.context | {"config": config.to_dict()}
        context |= {"quantized": {"weights": weights, "made_from": str(run)}}
        write = partial(write_weights, leaves=named_leaves({"params": params}))
        checkpoint = CheckpointStore(draft).save_weights(write, old.step, elapsed=old.elapsed, context=context)
    return out / checkpoint.relative_to(draft)


def _summary_at(loaded: LoadedRun, run: Path, scored: Evaluation | None) -> dict[str, Any]:
    """The summary of `run`, for a new run that has the weights of the checkpoint `loaded`. The scores are those of the
    quantised weights, or null where they could not be scored: those before the rounding are not theirs."""
    summary, config, step = read_summary(run), loaded.config, loaded.checkpoint.step
    summary |= dict.fromkeys((name for name in summary if name.startswith("val_")), None)
    summary |= {"steps": step, "best_step": step, "tokens_seen": step * config.tokens_per_step}
    summary["training_flops"] = training_flops(config, step)
    if scored is None:
        return summary
    return summary | {
        "val_loss": scored.loss,
        "val_bits_per_byte": scored.bits_per_byte,
        "val_bytes_per_token": scored.bytes / scored.tokens,
        "val_tokens": scored.tokens,
        "val_drop_fraction": scored.drop_fraction,
        "val_stream": "whole",
        "val_whole_stream": True,
    }
