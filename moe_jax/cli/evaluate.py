"""`moe-jax evaluate`."""

import dataclasses
import sys
from pathlib import Path

from moe_jax.cli.options import Active, Json, RunName, StepNumber, checked_run, print_json, starting
from moe_jax.config import DataConfig, DataFormat
from moe_jax.runs.catalog import load_config, title
from moe_jax.system.terminal import say


def evaluate(run: RunName = "", step: StepNumber = None, data: str = "", active: Active = 0, json: Json = False) -> int:
    """Measure loss, bits per byte and drops of a trained model on a text. Without --data it is the validation text of
    the run, beside a trigram model of the training text.

    Of conversations, only the assistant's answers are scored. A tuned run takes them (rows with `messages`) as --data.

    The last line of the output is JSON if it is asked for, or if the output is a file or a pipe.

    Args:
        data: A file, which is scored whole; or a folder or corpus, of which the validation part is scored. Empty: the
            run's validation text.
    """
    folder = checked_run(run, step)
    form = _form_of(folder, data) if data else "text"
    with starting(f"loading {title(folder)}"):
        from moe_jax.data.baselines import corpus_baselines
        from moe_jax.data.corpora import scored_documents
        from moe_jax.data.token_store import token_stream
        from moe_jax.runs.load import open_run, with_fewer_experts
        from moe_jax.training.evaluate import evaluate_run

        opened = open_run(folder, step)
        fewer = with_fewer_experts(opened, active) if active else None
    if data:
        stream, changed = token_stream(scored_documents(data, form), opened.tokenizer), ""
        baselines = None
    else:
        store, changed = opened.validation_text()
        stream, baselines = store.valid.stream, corpus_baselines(opened.config.data, store)
    if changed:
        print(f"warning: {changed}", file=sys.stderr)
    scored = evaluate_run(opened, stream, "scoring")
    result = {
        "val_loss": scored.loss,
        "val_bits_per_byte": scored.bits_per_byte,
        "val_drop_fraction": scored.drop_fraction,
        "tokens": scored.tokens,
        "scored": "all tokens" if stream.answers is None else "answers",
        "text_has_changed": None if data else bool(changed),
        "baselines_bits_per_byte": dataclasses.asdict(baselines) if baselines else None,
    }
    what = "tokens" if stream.answers is None else "tokens of answers (no other token counts)"
    say(f"{scored.tokens:,} {what}, {scored.bytes:,} bytes, checkpoint of step {opened.checkpoint.step}")
    say(f"loss {scored.loss:.4f} nats per token, {scored.bits_per_byte:.4f} bits per byte")
    if fewer:
        less = evaluate_run(fewer, stream, f"scoring with {active} experts")
        result |= {"active": active, "val_loss_active": less.loss}
        loss = f"loss {less.loss:.4f}, {less.bits_per_byte:.4f} bits per byte"
        say(f"with {active} of {opened.config.model.routing.top_k} experts for a token: {loss}")
    if baselines:
        say(f"to compare: {baselines.describe()}")
    print_json(result, json)
    return 0


def _form_of(run: Path, data: str) -> DataFormat:
    """How a file is read: a tuned run reads JSON lines as conversations. Everything else is text. Raises ConfigError if
    there is no such text."""
    from moe_jax.data.corpora import check_source
    from moe_jax.data.documents import JSON_LINES, ending

    config = load_config(run)
    tuned = config is not None and config.data.format == "chat"
    in_rows = ending(Path(data)) in JSON_LINES or any(Path(data).glob("*.jsonl*"))
    form: DataFormat = "chat" if tuned and in_rows else "text"
    check_source(DataConfig(source=data, format=form))
    return form
