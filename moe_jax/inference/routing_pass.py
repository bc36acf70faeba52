"""Forward passes that record every decision of the routers, and statistics of the decisions.

Unless another mode is asked for, the pass is the forward pass of training, with its capacity, but without dropout and
router noise. The model is called with the static argument `trace`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from moe_jax.config import ModelConfig, UserError
from moe_jax.inference.decode import ShardMapWrapper
from moe_jax.model.kernels.cross_entropy import blocked_token_losses
from moe_jax.model.moe.layer import LayerTrace, Mode
from moe_jax.model.transformer import Params, merge

NEXT = 5
"""The likeliest next tokens that a trace keeps."""
_ROWS = 128
"""Rows of logits that exist at once while these tokens are found."""


class TracedPass(NamedTuple):
    """What a traced pass over B windows of T tokens returns."""

    decisions: LayerTrace
    loss: Float[Array, "B T"]
    """Cross-entropy of the token after each token, in nats."""
    next_token: Int[Array, "B T N"]
    """The likeliest next tokens, best first: NEXT of them, or all V."""
    next_prob: Float[Array, "B T N"]


type TraceStep = Callable[[Params, ArrayLike], TracedPass]
type DecisionStep = Callable[[Params, ArrayLike], LayerTrace]


def check_routed(config: ModelConfig) -> None:
    """Raise UserError if the model has no router."""
    if config.dense != "none":
        raise UserError(f"--model.dense {config.dense}: a dense baseline has no router to look into; name an MoE run")


def make_trace_step(graphdef: nnx.GraphDef) -> TraceStep:
    """The jitted (params, tokens int [B, T+1]) -> decisions, losses and likeliest next tokens of the training pass."""

    def step(params: Params, tokens: jax.Array) -> TracedPass:
        model = merge(graphdef, params)
        hidden, stats, _ = model(tokens[:, :-1], Mode.TRAIN, trace=True)
        flat, targets = hidden.reshape(-1, hidden.shape[-1]), tokens[:, 1:].reshape(-1)
        losses = blocked_token_losses(flat, model.head_matrix(), targets)
        most = min(NEXT, model.config.vocab_size)
        prob, likeliest = jax.lax.map(
            lambda row: jax.lax.top_k(jax.nn.softmax(model.logits(row)), most), flat, batch_size=_ROWS
        )
        assert stats is not None and stats.trace is not None  # noqa: PT018, a dense baseline is refused before
        cut = lambda rows: rows.reshape(*hidden.shape[:2], *rows.shape[1:])  # noqa: E731
        return TracedPass(stats.trace, cut(losses), cut(likeliest), cut(prob))

    return jax.jit(step)


def make_decision_step(
    graphdef: nnx.GraphDef, mode: Mode = Mode.TRAIN, spread: ShardMapWrapper = lambda function: function
) -> DecisionStep:
    """The jitted (params, tokens int [B, T]) -> decisions, without attention weights or vocabulary head.

    `mode` says of which pass: with the capacity of training, or as in generation, which drops nothing. `spread` makes
    it a program of several devices (`decode.ShardMapWrapper`).
    """

    def step(params: Params, tokens: jax.Array) -> LayerTrace:
        _, stats, _ = merge(graphdef, params)(tokens, mode, trace=True)
        assert stats is not None and stats.trace is not None  # noqa: PT018, a dense baseline is refused before
        return stats.trace._replace(attention=None)

    return jax.jit(spread(step))


def choice_totals(expert: np.ndarray, experts: int) -> np.ndarray:
    """int [L, E]: how often each expert was chosen, from the chosen experts [L, ..., K]."""
    return np.stack([np.bincount(layer.reshape(-1), minlength=experts) for layer in expert])


def router_entropy(probs: np.ndarray) -> np.ndarray:
    """float [L]: mean entropy of the router's softmax [L, ..., E], divided by ln E. 0: always certain; 1: uniform."""
    nats = -(probs * np.log(np.maximum(probs, np.finfo(np.float32).tiny))).sum(-1)
    return nats.reshape(len(probs), -1).mean(1) / math.log(max(probs.shape[-1], 2))
