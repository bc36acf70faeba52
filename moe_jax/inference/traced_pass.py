"""One forward pass over whole sequences that also returns every routing decision, and statistics of the decisions.

By default it is the forward pass of training, with its capacity, but without dropout. The model is called with the
static argument `trace`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from moe_jax.config import ModelConfig, UserError
from moe_jax.model.moe.layer import LayerTrace, Mode
from moe_jax.model.transformer import Params, merge

type ShardMapWrapper = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Turns a function into the same function on several devices (`parallel.layout.Layout.same_on_all_devices`)."""

MOST_ALTERNATIVES = 5
"""Likeliest tokens that are reported beside a token."""
_ROWS = 128
"""Rows of logits that exist at once while these tokens are searched."""


MOST_TOKENS, MOST_BYTES = 4_096, 2**26
"""Most tokens of a pass, and most bytes of the rows that its experts read in float32."""


def tokens_at_once(config: ModelConfig) -> int:
    """Tokens of one pass over many sequences. Of a large model fewer, because its rows take much memory."""
    return min(MOST_TOKENS, MOST_BYTES // (4 * config.routing.top_k * config.width))


class Predictions(NamedTuple):
    """What the model expected after each token."""

    loss: Float[Array, "B T"]
    """Cross-entropy of the token that follows, in nats."""
    likeliest: Int[Array, "B T N"]
    """The N likeliest tokens, best first: MOST_ALTERNATIVES of them, or the whole vocabulary."""
    logprob: Float[Array, "B T N"]
    """Their log-probabilities."""


class TracedPass(NamedTuple):
    """What a traced pass over B sequences of T tokens returns."""

    decisions: LayerTrace | None
    """None for a dense baseline."""
    predictions: Predictions | None


type TracedStep = Callable[[Params, ArrayLike], TracedPass]


def check_routed(config: ModelConfig) -> None:
    """Raise UserError if the model has no router."""
    if config.dense != "none":
        raise UserError(f"--model.dense {config.dense}: a dense baseline has no router to look into; name an MoE run")


def make_traced_pass(
    graphdef: nnx.GraphDef,
    mode: Mode = Mode.TRAIN,
    *,
    predict: bool = False,
    vocab_size: int | None = None,
    attention: bool = False,
    spread: ShardMapWrapper = lambda function: function,
) -> TracedStep:
    """The jitted (params, tokens int [B, T]) -> `TracedPass`.

    With `predict` the tokens are [B, T+1], and the token after each of the first T is predicted, among the first
    `vocab_size` entries of the vocabulary (all unless given). `attention` keeps the attention weights. `mode` selects
    the dispatch: with the capacity of training, or without drops, as in generation. Where training drops nothing, the
    dispatch is that of evaluation, which needs no copies of the experts.
    """

    def step(params: Params, tokens: Int[Array, "B T"]) -> TracedPass:
        model = merge(graphdef, params)
        purpose = Mode.EVALUATE if mode is Mode.TRAIN and model.config.dropless else mode
        hidden, stats, _ = model(tokens[:, :-1] if predict else tokens, purpose, trace=True)
        decisions = None if stats is None else stats.trace
        if decisions is not None and not attention:
            decisions = decisions._replace(attention=None)
        if not predict:
            return TracedPass(decisions, None)
        count = vocab_size or model.config.vocab_size

        def predicted(block: tuple[Array, Array]) -> tuple[Array, Array, Array]:
            logprobs = jax.nn.log_softmax(model.logits(block[0])[:, :count])
            best, index = jax.lax.top_k(logprobs, min(MOST_ALTERNATIVES, count))
            return -jnp.take_along_axis(logprobs, block[1][:, None], axis=1)[:, 0], index, best

        # A block is one product with the head. `lax.map` with a batch size would make each row a product of its own.
        rows = hidden.reshape(-1, hidden.shape[-1]), tokens[:, 1:].reshape(-1)
        size = min(_ROWS, len(rows[1]))
        padding = -len(rows[1]) % size
        blocks = [jnp.pad(x, ((0, padding), *[(0, 0)] * (x.ndim - 1))).reshape(-1, size, *x.shape[1:]) for x in rows]
        flat = [x.reshape(-1, *x.shape[2:])[: len(rows[1])] for x in jax.lax.map(predicted, tuple(blocks))]
        return TracedPass(decisions, Predictions(*(x.reshape(*hidden.shape[:2], *x.shape[1:]) for x in flat)))

    return jax.jit(spread(step))


def choice_mask(expert: np.ndarray, experts: int) -> np.ndarray:
    """bool [..., E]: whether each expert is among the chosen experts [..., K]."""
    mask = np.zeros((*expert.shape[:-1], experts), bool)
    np.put_along_axis(mask, expert, True, axis=-1)
    return mask


def choice_totals(expert: np.ndarray, experts: int) -> np.ndarray:
    """int [L, E]: how often each expert was chosen, from the chosen experts [L, ..., K]."""
    return np.stack([np.bincount(layer.reshape(-1), minlength=experts) for layer in expert])


def router_entropy(probs: np.ndarray) -> np.ndarray:
    """float [L]: mean entropy of the router's softmax [L, ..., E], divided by ln E. 0: always certain; 1: uniform."""
    nats = -(probs * np.log(np.maximum(probs, np.finfo(np.float32).tiny))).sum(-1)
    return nats.reshape(len(probs), -1).mean(1) / math.log(max(probs.shape[-1], 2))
