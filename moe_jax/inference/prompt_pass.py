"""What a model made of a prompt: the log-probability of each of its tokens, and the experts that read them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import Params, merge

MOST_ALTERNATIVES = 5
"""Likeliest tokens that are reported beside a token."""
_ROWS = 128
"""Rows of logits that exist at once."""


class ReadPrompt(NamedTuple):
    """Row t belongs to token t. A prompt has 1 to T tokens; the rows behind its last token mean nothing."""

    logprob: Float[Array, " T"]
    """Of token t after the tokens before it. 0 for the first token, which no token precedes."""
    likeliest: Int[Array, "T N"]
    """The likeliest tokens at the place of token t, best first. Row 0 means nothing."""
    likeliest_logprob: Float[Array, "T N"]
    expert: Int[Array, "L T K"] | None
    """The experts that have read token t. None for a dense model."""
    gate: Float[Array, "L T K"] | None


type PromptPass = Callable[[Params, np.ndarray], ReadPrompt]


def make_prompt_pass(graphdef: nnx.GraphDef, vocab_size: int) -> PromptPass:
    """The jitted (params, tokens int [1, T]) -> `ReadPrompt`. Nothing is dropped, as in generation.

    Probabilities are those of the first `vocab_size` tokens, the tokenizer's.
    """
    most = min(MOST_ALTERNATIVES, vocab_size)

    def read(params: Params, tokens: Int[Array, "1 T"]) -> ReadPrompt:
        model = merge(graphdef, params)
        hidden, stats, _ = model(tokens, Mode.GENERATE, trace=True)

        def of_row(row: tuple[Array, Array]) -> tuple[Array, Array, Array]:
            logprobs = jax.nn.log_softmax(model.logits(row[0])[:vocab_size])
            best, index = jax.lax.top_k(logprobs, most)
            return logprobs[row[1]], index, best

        found = jax.lax.map(of_row, (hidden[0], jnp.roll(tokens[0], -1)), batch_size=_ROWS)
        logprob, index, best = (jnp.roll(rows, 1, axis=0) for rows in found)
        trace = None if stats is None else stats.trace
        expert, gate = (None, None) if trace is None else (trace.expert_index[:, 0], trace.gate[:, 0])
        return ReadPrompt(logprob.at[0].set(0), index, best, expert, gate)

    return jax.jit(read)
