"""`python -m moe_jax evaluate`."""

import json
from dataclasses import dataclass

from moe_jax import environment
from moe_jax.commands import check_run_folder


@dataclass(frozen=True)
class Evaluate:
    """Loss, bits per byte and drops of a trained model on any text. The last line is JSON."""

    run: str
    """Folder of a run."""
    data: str = ""
    """A file, scored whole, or a folder, of which valid.txt is scored; the run's own validation text unless given."""
    step: int | None = None
    """Checkpoint to load; the best one unless given."""

    def execute(self) -> int:
        check_run_folder(self.run, self.step)
        from moe_jax.data.corpora import check_source, scored_stories

        if self.data:
            check_source(self.data)
        environment.prepare()
        from moe_jax.data.token_store import prepare, token_stream
        from moe_jax.training.evaluate import evaluate, make_evaluation_step
        from moe_jax.training.run import load_run

        run = load_run(self.run, self.step)
        if self.data:
            tokens = token_stream(scored_stories(self.data), run.tokenizer)
        else:
            tokens = prepare(run.config.data, tokenizer=run.tokenizer).valid.tokens
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
        }
        print(json.dumps(result))
        return 0
