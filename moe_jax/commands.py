"""The commands of `python -m moe_jax`: each a dataclass of its arguments, whose `execute` imports what it needs."""

import json
from dataclasses import dataclass
from pathlib import Path

from moe_jax import environment
from moe_jax.config import ConfigError, holds_run


def _check_run(run: str) -> None:
    if not holds_run(Path(run)):
        raise ConfigError(f"--run {run}: no run with a complete checkpoint there; make one with `uv run train.py`")


def _check_range(flag: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{flag} {value}: must be between {low:g} and {high:g}")


@dataclass(frozen=True)
class Generate:
    """Make a trained model tell stories."""

    run: str
    """Folder of a run."""
    prompt: str = ""
    """How each story begins."""
    num_stories: int = 1
    """Stories to tell, each with draws of its own."""
    max_tokens: int = 400
    """Longest continuation of the prompt, in tokens; a story ends earlier where the model ends it."""
    temperature: float = 0.8
    """Above 1 more surprising, below 1 more usual, 0 always the likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest tokens only; 0 is off."""
    top_p: float = 1.0
    """Draw among the fewest tokens that together have this probability; 1 is off."""
    min_p: float = 0.0
    """Draw among tokens at least this share as likely as the likeliest; 0 is off."""
    repetition_penalty: float = 1.0
    """Above 1 discourages tokens seen before; 1 is off."""
    seed: int = 0
    """The same seed tells the same stories."""
    step: int | None = None
    """Checkpoint to load; the best one unless given."""

    def execute(self) -> int:
        self._check()
        environment.prepare()
        import jax

        from moe_jax.data.tokenizers import StreamDecoder
        from moe_jax.inference.decode import SAMPLE, Decoder
        from moe_jax.inference.sampling import Sampling
        from moe_jax.training.run import load_run

        run = load_run(self.run, self.step)
        tokenizer = run.tokenizer
        decoder = Decoder(run.graphdef, run.config.model.seq_len)
        settings = Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        prompt = [tokenizer.separator_id, *tokenizer.encode(self.prompt)]
        key = jax.random.fold_in(jax.random.key(self.seed), SAMPLE)
        for story in range(self.num_stories):
            if self.num_stories > 1:
                print(f"--- {story + 1}")
            print(self.prompt, end="", flush=True)
            text = StreamDecoder(tokenizer)
            for token in decoder.stream(
                run.params,
                prompt,
                settings=settings,
                key=jax.random.fold_in(key, story),
                stop=tokenizer.separator_id,
                limit=self.max_tokens,
            ):
                print(text.feed(token), end="", flush=True)
            print(text.finish(), flush=True)
        return 0

    def _check(self) -> None:
        _check_run(self.run)
        _check_range("--num-stories", self.num_stories, 1, 10_000)
        _check_range("--max-tokens", self.max_tokens, 1, 1_000_000)
        _check_range("--temperature", self.temperature, 0, 100)
        _check_range("--top-k", self.top_k, 0, 2**24)
        _check_range("--top-p", self.top_p, 1e-6, 1)
        _check_range("--min-p", self.min_p, 0, 1)
        _check_range("--repetition-penalty", self.repetition_penalty, 1e-3, 1e3)
        _check_range("--seed", self.seed, 0, 2**31 - 1)


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
        _check_run(self.run)
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
