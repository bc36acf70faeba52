"""A trained run of the real model, computed by the hand-derived code alone.

Reads config.json, tokenizer.json, summary.json and the weights.safetensors of
the best checkpoint. Nothing of moe_jax is imported. Computes the validation
loss in float64, beside the loss in summary.json; they may differ by 1e-6 where
the run computed in float32. Then writes the same text as
`python -m moe_jax generate --run FOLDER --temperature 0`.

The validation tokens come from the cache that train.py made on this machine.
They are found by the digest in the checkpoint's manifest. `--text FILE` scores
a text of yours instead, with documents separated by <|endoftext|>.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from foundation.losses import IGNORE, cross_entropy_forward
from foundation.trained import Problem
from foundation.trained.tokens import Vocabulary, read_vocabulary
from foundation.trained.validation import stored_stream, text_stream, windows
from foundation.trained.weights import config_of, parameters_of, read_safetensors
from foundation.transformer import ModelConfig, model_forward
from foundation.writing import write

ALLOWED = 1e-6
"""Difference from the run's own loss, which was summed in float32."""
ALLOWED_NARROW = 0.02
"""The same, where the run multiplied numbers of 8 or 11 bits of mantissa."""
_MOST_LOGITS = 1 << 22


class Trained(NamedTuple):
    """A run, ready to compute."""

    params: dict
    config: ModelConfig
    vocabulary: Vocabulary
    window: int
    step: int
    trained_on: object
    """Digest of its token store."""
    summary: dict[str, Any]


def open_run(folder: Path) -> Trained:
    """The run at its best checkpoint.

    Raises Problem, in one line: also where the run's model, or its loss, is another one than what is computed here.
    """
    settings, summary = _json(folder / "config.json"), _json(folder / "summary.json")
    try:
        if settings["data"].get("format", "text") != "text":
            what = "is tuned on conversations, and its loss counts the answers only"
            raise Problem(f"{folder}: {what}; choose a run that was trained on a text")
        if settings["train"].get("lora_rank"):
            what = "its weights are a model and adapters, which foundation does not add"
            raise Problem(f"{folder}: {what}; choose a run without adapters")
        checkpoint = _checkpoint(folder, summary.get("best_step"))
        model, routing = settings["model"], settings["model"].get("routing") or settings["routing"]
        config = config_of(model, routing)
        params = parameters_of(read_safetensors(checkpoint / "weights.safetensors"), model)
        trained_on = _json(checkpoint / "manifest.json")["context"].get("data")
        vocabulary = read_vocabulary(folder / "tokenizer.json")
        return Trained(params, config, vocabulary, model["seq_len"], int(checkpoint.name[5:]), trained_on, summary)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise Problem(f"{folder}: config.json or a manifest is damaged ({error}); take it from the run again") from None


def _checkpoint(folder: Path, step: object) -> Path:
    """The checkpoint's folder; the newest one where no step is known."""
    there = sorted((folder / "checkpoints").glob("step_" + "[0-9]" * 8))
    found = [path for path in there if step is None or path.name == f"step_{step:0>8}"]
    if not found:
        names = ", ".join(path.name for path in there) or "none"
        raise Problem(f"{folder}: no checkpoint of step {step}; there are: {names}")
    return found[-1]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Problem(f"{path}: cannot be read ({error.strerror}); train a run with `uv run train.py`") from None
    except ValueError:
        raise Problem(f"{path}: no JSON, so it is damaged; take it from the run again") from None
    if not isinstance(found, dict):
        raise Problem(f"{path}: no JSON object, so it is damaged; take it from the run again")
    return found


def validation_loss(run: Trained, stream: np.ndarray) -> float:
    """Nats per predicted token of a stream."""
    if stream.max() >= run.vocabulary.size:
        raise Problem(f"the tokens reach {stream.max()}, the vocabulary {run.vocabulary.size}; they are of another run")

    @jax.jit
    def total(inputs: Array, targets: Array) -> Float[Array, ""]:
        output, _ = model_forward(run.params, inputs, run.config)
        mean, _ = cross_entropy_forward(output.logits, targets)
        return mean * jnp.sum(targets != IGNORE)

    rows = max(1, min(16, _MOST_LOGITS // (run.window * run.params["embedding"].shape[0])))
    found = list(windows(stream, run.window))
    count, empty = len(found), np.full(run.window, IGNORE, np.int32)
    found += [(np.zeros_like(empty), empty)] * (-count % rows)  # one shape, one program
    nats = []
    for first in range(0, count, rows):
        nats.append(float(total(*map(np.stack, zip(*found[first : first + rows], strict=True)))))
        if sys.stderr.isatty():
            done = min(first + rows, count)
            print(f"\r{done} of {count} windows", end="\n" * (done == count), file=sys.stderr, flush=True)
    return math.fsum(nats) / (len(stream) - 1)


def story(run: Trained, prompt: str, limit: int) -> str:
    """What the model writes after the prompt, always the likeliest token."""

    @jax.jit
    def next_logits(tokens: Array, count: Array | int) -> Array:
        output, _ = model_forward(run.params, tokens, run.config)
        return output.logits[0, count - 1, : run.vocabulary.size]

    start = [run.vocabulary.separator, *run.vocabulary.encode(prompt)]
    written = write(next_logits, start, run.window, limit, stop=run.vocabulary.separator)
    return run.vocabulary.decode(list(written))


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 where the losses differ or the run cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m foundation run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a run's folder, as runs/nano")
    parser.add_argument("--prompt", default="", help="how the text begins (default: nothing)")
    parser.add_argument("--max-tokens", type=int, default=400, help="longest text, in tokens (default 400)")
    parser.add_argument("--text", type=Path, help="score this file and not the validation text of the run")
    parser.add_argument("--json", action="store_true", help="end with JSON on a terminal too")
    arguments = parser.parse_args(argv)
    if arguments.max_tokens < 1:
        parser.error(f"--max-tokens {arguments.max_tokens}: must be at least 1")
    jax.config.update("jax_enable_x64", True)
    try:
        return report(arguments)
    except Problem as problem:
        print(problem, file=sys.stderr)
        return 1


def report(arguments: argparse.Namespace) -> int:
    """Computes, prints, and returns the exit status."""
    run = open_run(arguments.folder)
    theirs = None
    if arguments.text is not None:
        stream = text_stream(arguments.text, run.vocabulary)
    else:
        stream = stored_stream(arguments.folder, run.trained_on)
        theirs = run.summary.get("val_loss") if run.summary.get("val_whole_stream") else None
    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.params))
    print(f"{arguments.folder}, step {run.step}: {parameters:,} parameters, float64, by the hand-derived code")
    loss = validation_loss(run, stream)
    print(f"\nloss of {len(stream) - 1:,} tokens       {loss:.10f} nats per token")
    difference, right = None, True
    if theirs is None:
        print("summary.json has no loss of this text to compare with")
    else:
        precision = run.summary.get("precision", "float32")
        allowed = ALLOWED if precision == "float32" else ALLOWED_NARROW
        difference = abs(loss - theirs)
        right = difference <= allowed
        verdict = "the same" if right else "NOT the same"
        print(f"the run's own, in {precision:<10} {theirs:.10f}")
        print(f"difference                   {difference:.1e} (allowed {allowed:.0e}): {verdict}")
    text = story(run, arguments.prompt, arguments.max_tokens)
    print(f"\n{arguments.prompt}{text}")
    if arguments.json or not sys.stdout.isatty():
        found = {"val_loss": loss, "difference": difference, "tokens": len(stream) - 1, "step": run.step, "text": text}
        print(json.dumps(found))
    return 0 if right else 1
