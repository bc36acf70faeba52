"""Calls to time: prefill, cached decoding, and uncached forward passes; and the memory that decoding must read."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from moe_jax.config import ModelConfig, RunConfig
from moe_jax.inference.decode import TOKENS_AT_ONCE, Decoder, advance, prefill
from moe_jax.inference.sampling import Sampling
from moe_jax.model.costs import count_parameters, totals
from moe_jax.model.moe.layer import Mode, MoE
from moe_jax.model.transformer import Params, abstract_model, merge
from moe_jax.system.machine import Measured


class Model(NamedTuple):
    """A model's shape and its static definition, in float32."""

    config: ModelConfig
    graphdef: nnx.GraphDef

    @classmethod
    def of(cls, config: ModelConfig, moe: type[MoE] = MoE) -> "Model":
        return cls(config, abstract_model(config, moe=moe)[0])


def token_call(model: Model, params: Params) -> Callable[[], Measured]:
    """Write the next tokens of one text, as `generate --temperature 0` does, and give the seconds of one of them.

    Each call writes the same positions, from T/2 on: a benchmark may write more tokens than the context holds.
    """
    length, settings = model.config.seq_len, Sampling(temperature=0.0)
    decoder = Decoder(model.graphdef, length, model.config.vocab_size)
    half, count = np.int32(length // 2), np.int32(min(TOKENS_AT_ONCE, length - length // 2))
    never, tokens = np.int32(-1), [1] * int(half)
    text = [decoder.start(params, tokens, (), settings, jax.random.key(0))]

    def write() -> Measured:
        begin = time.perf_counter()
        again = text[0]._replace(position=jnp.asarray(half)[None])
        written = decoder.write(params, again, count, never)
        text[0] = written.slots
        np.asarray(written.tokens)  # the host reads them
        return Measured((time.perf_counter() - begin) / count)

    return write


class DecodeLoop:
    """Each call decodes one token at position T/2 of the context, for each sequence of a batch. The host waits for
    every token."""

    def __init__(self, model: Model, params: Params, batch: int) -> None:
        length = model.config.seq_len
        self._params = params
        self._step = jax.jit(partial(advance, model.graphdef), donate_argnums=1)
        tokens = jnp.ones((batch, length), jnp.int32)
        self._half = jnp.int32(length // 2)
        self._state = jax.jit(partial(prefill, model.graphdef))(params, tokens, self._half)
        self._token = jax.random.randint(jax.random.key(0), (batch,), 0, model.config.vocab_size)

    def __call__(self) -> Any:
        # The position stays the same, because a benchmark may decode more tokens than the context has positions.
        self._state = self._step(self._params, self._state._replace(position=self._half + 0), self._token)
        return self._state.logits


def prefill_call(model: Model, params: Params, length: int) -> Callable[[], Any]:
    """Prefill of a prompt of `length` tokens: its cache, and the logits of the next token."""
    run = jax.jit(partial(prefill, model.graphdef))
    tokens = jax.random.randint(jax.random.key(1), (1, length), 0, model.config.vocab_size)
    return lambda: run(params, tokens, jnp.int32(length))


def forward_call(model: Model, params: Params, tokens: ArrayLike) -> Callable[[], Any]:
    """One forward pass over a batch, without drops, with the logits of every position."""

    @jax.jit
    def run(params: Params, tokens: jax.Array) -> jax.Array:
        merged = merge(model.graphdef, params)
        return merged.logits(merged(tokens, Mode.EVALUATE)[0])

    return lambda: run(params, tokens)


def uncached_call(model: Model, params: Params, length: int = 4) -> Callable[[], Any]:
    """One forward pass over a short prompt. Its time is often called latency."""
    return forward_call(model, params, jax.random.randint(jax.random.key(2), (1, length), 0, model.config.vocab_size))


def active_bytes(config: RunConfig) -> int:
    """Bytes of the parameters that one token touches, in float32. Decoding one token must read at least these bytes."""
    return 4 * totals(count_parameters(config.model)).active
