"""The content of summary.json. Other programs read these keys.

`loop.train` writes the file at each evaluation, and `loop.finish` at the end.
"""

from typing import Any

import jax

from moe_jax.config import RunConfig
from moe_jax.model.costs import adapter_parameters, count_parameters, totals, training_flops
from moe_jax.runs.records import last_train_record
from moe_jax.training.counters import RunCounters
from moe_jax.training.evaluate import Evaluation
from moe_jax.training.session import Session, SessionData


def summary(
    session: Session, scored: Evaluation, best_step: int, training_val_loss: float | None, whole_stream: bool
) -> dict[str, Any]:
    """The summary of a run.

    At the end of the run (`val_whole_stream` is true) `best_step` and the `val_*` keys describe the best checkpoint, on
    the whole validation stream. During training they describe the newest evaluation, on the fixed subset. `val_stream`
    names the stream of the `val_*` keys. `val_loss_in_training` is the same checkpoint's loss as it was scored during
    training, on the fixed subset; null if it was not.

    `train_drop_fraction` is the mean over the `train_drop_steps` counted training steps, `train_drop_fraction_worst`
    the largest of them, and `train_drop_fraction_last` the newest. `opening` is the first words of the validation text,
    and `openings` those of three of its documents.
    """
    config, progress = session.config, session.progress
    last = last_train_record(session.folder.files)
    steps = int(session.state.step)
    device = jax.devices()[0]
    return {
        "preset": config.preset,
        "steps": steps,
        "tokens_seen": steps * config.tokens_per_step,
        "train_loss": last.get("loss"),
        **_scores(session.data, scored),
        "val_whole_stream": whole_stream,
        "val_loss_in_training": training_val_loss,
        "best_step": best_step,
        "opening": session.data.opening,
        "openings": session.data.openings,
        **_costs(config, steps),
        "inherited_flops": progress.origin["training_flops"] if progress.origin else 0,
        **_drops(progress.counters),
        "balance_loss": last.get("balance_loss"),
        "tokens_per_second": last.get("tokens_per_second"),
        "wall_seconds": progress.elapsed,
        "device": f"{device.platform}: {device.device_kind}",
        "precision": session.programs.policy.compute,
        "resumed_from": progress.resumed_from,
    }


def _scores(data: SessionData, scored: Evaluation) -> dict[str, Any]:
    """The score of the model, and those of simple models on the same text."""
    compared = data.baselines
    return {
        "val_loss": scored.loss,
        "val_bits_per_byte": scored.bits_per_byte,
        "val_bytes_per_token": scored.bytes / scored.tokens,
        "val_tokens": scored.tokens,
        "val_drop_fraction": scored.drop_fraction,
        "val_stream": data.stream_of(scored),
        "val_scored": "all tokens" if data.store.valid.answers is None else "answers",
        "entropy_floor_bits_per_byte": compared and compared.entropy_floor,
        "unigram_bits_per_byte": compared and compared.unigram,
        "trigram_bits_per_byte": compared and compared.trigram,
        "kneser_ney_5gram_bits_per_byte": compared and compared.kneser_ney_5gram,
    }


def _costs(config: RunConfig, steps: int) -> dict[str, Any]:
    counts = totals(count_parameters(config.model))
    return {
        "params_total": counts.total,
        "params_active": counts.active,
        "params_trained": adapter_parameters(config).total or counts.total,
        "training_flops": training_flops(config, steps),
    }


def _drops(counters: RunCounters) -> dict[str, Any]:
    return {
        "train_drop_fraction": counters.mean_drop,
        "train_drop_fraction_worst": counters.worst_drop,
        "train_drop_fraction_last": counters.last_drop,
        "train_drop_steps": counters.drop_steps,
    }
