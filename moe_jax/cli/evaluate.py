"""`moe-jax evaluate`."""

import sys
from dataclasses import dataclass
from typing import ClassVar

from moe_jax.cli.command import Command, check_run_folder
from moe_jax.system import environment
from moe_jax.system.json_text import json_text


@dataclass(frozen=True)
class Evaluate(Command):
    """Measure loss, bits per byte and drops of a trained model on a text. The last line of the output is JSON."""

    interrupted: ClassVar[str] = "the text was not scored to its end; no result"

    run: str
    """Folder of a run."""
    data: str = ""
    """A file, which is scored whole; or a folder, of which valid.txt is scored. Empty: the run's validation text."""
    step: int | None = None
    """Step of the checkpoint to load. The best one unless given."""

    def execute(self) -> int:
        check_run_folder(self.run, self.step)
        from moe_jax.data.corpora import check_source, scored_documents

        if self.data:
            check_source(self.data)
        environment.prepare_environment()
        from moe_jax.data.token_store import token_stream
        from moe_jax.runs.load import open_run
        from moe_jax.training.evaluate import evaluate, make_evaluation_step

        run = open_run(self.run, self.step)
        if self.data:
            tokens, changed = token_stream(scored_documents(self.data), run.tokenizer), ""
        else:
            tokens, changed = run.validation_text()
        if changed:
            print(f"warning: {changed}", file=sys.stderr)
        scored = evaluate(
            make_evaluation_step(run.graphdef),
            run.params,
            tokens,
            seq_len=run.config.model.seq_len,
            token_bytes=run.tokenizer.token_bytes(),
        )
        print(f"{scored.tokens:,} tokens, {scored.bytes:,} bytes, checkpoint of step {run.checkpoint.step}")
        print(f"loss {scored.loss:.4f} nats per token, {scored.bits_per_byte:.4f} bits per byte")
        result = {
            "val_loss": scored.loss,
            "val_bits_per_byte": scored.bits_per_byte,
            "val_drop_fraction": scored.drop_fraction,
            "tokens": scored.tokens,
            "text_has_changed": None if self.data else bool(changed),
        }
        print(json_text(result))
        return 0
