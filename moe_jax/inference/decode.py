"""Prefill and cached decoding, one compiled program each, and a stream of tokens made of them."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.inference.sampling import Sampling, sample
from moe_jax.model.attention import KeyValue
from moe_jax.model.moe import Mode
from moe_jax.model.transformer import Params, merge

SAMPLE = 2
"""Purpose of a random key (see `training.step.DROPOUT`)."""


class DecodeState(NamedTuple):
    """Where a generation stands, on the device."""

    logits: Float[Array, "B V"]
    """For the next token."""
    cache: list[KeyValue]
    position: Int[Array, ""]
    """Of the next token."""
    seen: Bool[Array, "B V"]
    """Tokens that the repetition penalty applies to."""
    before: Int[Array, "B _"]
    """The last tokens, as many as the n-grams of the next one take in (`Transformer.before`)."""


class Decoder:
    """Generates text with a model. Prompts are padded to T, so every prompt shares one compiled prefill; causality
    hides the padding, and prefill drops no token, so the padding takes nothing from the prompt.

    `vocab_size` is the tokenizer's. A model's vocabulary may be padded beyond it, and no token of the padding is drawn.
    """

    def __init__(self, graphdef: nnx.GraphDef, seq_len: int, vocab_size: int) -> None:
        self.seq_len = seq_len
        self.draw = jax.jit(partial(draw, vocab_size))
        self.prefill = jax.jit(partial(prefill, graphdef))
        self.advance = jax.jit(partial(advance, graphdef), donate_argnums=1)

    def stream(
        self,
        params: Params,
        prompt: Sequence[int],
        *,
        settings: Sampling,
        key: Key[Array, ""],
        stop: int,
        limit: int,
    ) -> Iterator[int]:
        """Tokens after the prompt, until `stop` (not yielded) or until `limit` of them. Needs at least one token.

        A context that is full goes on with its later half as a new prompt, so a story can be longer than T. Token
        n is drawn with fold_in(key, n): the same tokens whatever `limit` is.
        """
        context = list(prompt)[-self.seq_len :]
        # A prompt begins with the separator that ends a story, and a penalty on that would make stories run on.
        state = self._start(params, context, [token for token in prompt if token != stop])
        for n in range(limit):
            token = self.draw(state.logits, settings, state.seen, jax.random.fold_in(key, n))
            chosen = int(token[0])
            if chosen == stop:
                return
            yield chosen
            context.append(chosen)
            if len(context) > self.seq_len:
                context = context[-(self.seq_len // 2) :]
                seen = state.seen.at[0, chosen].set(True)
                state = self._start(params, context, ())._replace(seen=seen)
            else:
                state = self.advance(params, state, token)

    def _start(self, params: Params, context: Sequence[int], seen: Sequence[int]) -> DecodeState:
        tokens = np.zeros((1, self.seq_len), np.int32)
        tokens[0, : len(context)] = context
        state = self.prefill(params, tokens, np.int32(len(context)))
        mask = np.zeros(state.logits.shape, bool)
        mask[0, list(seen)] = True
        return state._replace(seen=jnp.asarray(mask))


def draw(
    vocab_size: int, logits: Float[Array, "B V"], settings: Sampling, seen: Bool[Array, "B V"], key: Key[Array, ""]
) -> Int[Array, " B"]:
    """The next token of each row, among the first `vocab_size`."""
    return sample(logits[:, :vocab_size], settings, seen[:, :vocab_size], key)


def prefill(graphdef: nnx.GraphDef, params: Params, tokens: Int[Array, "B T"], length: Int[Array, ""]) -> DecodeState:
    """Read a prompt of `length` tokens, padded on the right to T: logits after its last token, and the cache."""
    model = merge(graphdef, params)
    hidden, _, cache = model(tokens, Mode.GENERATE)
    logits = model.logits(jax.lax.dynamic_index_in_dim(hidden, length - 1, axis=1, keepdims=False))
    return DecodeState(logits, cache, length, jnp.zeros(logits.shape, bool), model.before(tokens, length))


def advance(graphdef: nnx.GraphDef, params: Params, state: DecodeState, token: Int[Array, " B"]) -> DecodeState:
    """Append a token a row: its keys and values enter the cache, and the logits are those after it."""
    logits, cache = merge(graphdef, params).decode(token, state.before, state.cache, state.position)
    seen = state.seen | jax.nn.one_hot(token, logits.shape[-1], dtype=bool)
    before = jnp.concatenate([state.before, token[:, None]], axis=1)[:, 1:] if state.before.shape[1] else state.before
    return DecodeState(logits, cache, state.position + 1, seen, before)
