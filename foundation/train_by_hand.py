"""`python -m foundation.train_by_hand [--steps N]`: the MoE language model, by hand, beside autodiff.

A model of 4 layers of width 128 with 8 experts, 2 per token, learns the stories of `stories.txt` in float64. (The
preset `nano` has 3 such layers.) A token is a character. Two copies start alike. One is trained by the hand-derived
gradient of `transformer.py`, the other by automatic differentiation, which is called through `parity.py` alone. If the
derivations are right, the two loss curves are one curve.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from foundation.optimizers import adam_init, adam_update
from foundation.parity import autodiff_value_and_gradient
from foundation.transformer import ModelConfig, ModelSize, init_params, loss_and_gradient, loss_forward, model_forward

STORIES = Path(__file__).with_name("stories.txt")
"""One story a line, from the grammar of the embedded corpus of `moe_jax`."""
VALIDATION_STORIES = 40
"""The last ones, which no step sees."""
STEPS = 50
BATCH, POSITIONS = 4, 64
LEARNING_RATE = 3e-3
TOLERANCE = 1e-9
CONFIG = ModelConfig(heads=4, top_k=2, capacity_factor=1.25)
SIZE = ModelSize(vocabulary=0, width=128, layers=4, experts=8, hidden=128)


def stories() -> tuple[str, str]:
    """The stories that this folder carries, and those for validation."""
    lines = STORIES.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(lines[:-VALIDATION_STORIES]), "".join(lines[-VALIDATION_STORIES:])


class Corpus(NamedTuple):
    """A text as token ids: one for each different character."""

    tokens: Int[Array, " N"]
    alphabet: str


def corpus() -> Corpus:
    """The stories, without those for validation."""
    text, _ = stories()
    alphabet = "".join(sorted(set(text)))
    return Corpus(jnp.array([alphabet.index(c) for c in text]), alphabet)


def batch(
    tokens: Int[Array, " N"], step: int, positions: int = POSITIONS, windows: int = BATCH
) -> Int[Array, "B window"]:
    """Windows of positions + 1 tokens of the text, chosen by the step alone."""
    starts = jax.random.randint(jax.random.fold_in(jax.random.key(1), step), (windows,), 0, len(tokens) - positions)
    return tokens[starts[:, None] + jnp.arange(positions + 1)]


def by_autodiff(params: dict, tokens: Array, targets: Array, config: ModelConfig) -> tuple[Array, dict]:
    """What `loss_and_gradient` computes by hand."""

    def loss(params: dict) -> Array:
        return loss_forward(params, tokens, targets, config)[0]

    return autodiff_value_and_gradient(loss)(params)


class Curve(NamedTuple):
    """The loss before each step, and the parameters after the last."""

    losses: list[float]
    params: dict


def train(
    gradient: Callable[..., tuple[Array, dict]],
    steps: int = STEPS,
    size: ModelSize = SIZE,
    positions: int = POSITIONS,
    config: ModelConfig = CONFIG,
) -> Curve:
    """AdamW from the same start on the same batches, with the gradient that is given."""
    tokens, alphabet = corpus()
    params: Any = init_params(jax.random.key(0), size._replace(vocabulary=len(alphabet)))
    state = adam_init(params)

    @jax.jit
    def step_once(params: Any, state: Any, window: Array) -> tuple[Any, Any, Array]:
        loss, grads = gradient(params, window[:, :-1], window[:, 1:], config)
        params, state = adam_update(grads, state, params, LEARNING_RATE, beta2=0.95, weight_decay=0.1)
        return params, state, loss

    losses = []
    for step in range(steps):
        params, state, loss = step_once(params, state, batch(tokens, step, positions))
        losses.append(float(loss))
    return Curve(losses, params)


def largest_difference(a: Curve, b: Curve) -> float:
    """The largest difference between two loss curves, in nats."""
    return max(abs(x - y) for x, y in zip(a.losses, b.losses, strict=True))


def main(argv: list[str] | None = None) -> int:
    """Trains both ways; exit status 1 where the curves differ or the loss does not fall."""
    parser = argparse.ArgumentParser(prog="python -m foundation.train_by_hand", description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps (default {STEPS})")
    arguments = parser.parse_args(argv)
    if arguments.steps < 2:  # the loss before the first step and after it
        parser.error(f"--steps {arguments.steps}: must be at least 2")
    jax.config.update("jax_enable_x64", True)

    tokens, alphabet = corpus()
    print(f"{len(tokens)} characters, {len(alphabet)} of them different; {SIZE}, {CONFIG}")
    curves = {}
    for label, gradient in (("by hand", loss_and_gradient), ("by autodiff", by_autodiff)):
        start = time.perf_counter()
        curves[label] = train(gradient, arguments.steps)
        print(f"{arguments.steps} steps {label}: {time.perf_counter() - start:.1f} s, compilation included")
    by_hand, automatic = curves["by hand"], curves["by autodiff"]

    print("\n  step   by hand          by autodiff      difference")
    for step in sorted({*range(0, arguments.steps, 10), arguments.steps - 1}):
        a, b = by_hand.losses[step], automatic.losses[step]
        print(f"  {step:>4}   {a:.12f}   {b:.12f}   {abs(a - b):.1e}")
    window = batch(tokens, arguments.steps)
    output, _ = model_forward(by_hand.params, window[:, :-1], CONFIG)
    difference = largest_difference(by_hand, automatic)
    print(f"\nlargest difference {difference:.1e} (allowed {TOLERANCE:.0e})")
    print(f"balance loss {output.balance:.3f} (1 is even), {100 * output.dropped:.1f} % of choices dropped")
    return 0 if difference < TOLERANCE and by_hand.losses[-1] < by_hand.losses[0] else 1


if __name__ == "__main__":
    sys.exit(main())
