"""Prefill and cached decoding against the memory that they must read; and the uncached forward of a short prompt."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.analysis.accounting import count_parameters, totals
from moe_jax.config import RunConfig
from moe_jax.inference.decode import advance, prefill
from moe_jax.model.moe import Mode
from moe_jax.model.transformer import Params, merge
from moe_jax.training.run import abstract_model


class DecodeLoop:
    """One decoded token a call, in the middle of a context, for a batch of sequences."""

    def __init__(self, config: RunConfig, params: Params, batch: int) -> None:
        graphdef, _ = abstract_model(config, "float32")
        length = config.model.seq_len
        self._params = params
        self._step = jax.jit(partial(advance, graphdef), donate_argnums=1)
        tokens = jnp.ones((batch, length), jnp.int32)
        self._half = jnp.int32(length // 2)
        self._state = jax.jit(partial(prefill, graphdef))(params, tokens, self._half)
        self._token = jax.random.randint(jax.random.key(0), (batch,), 0, config.model.vocab_size)

    def __call__(self) -> Any:
        # Always the same position: a run may take more tokens than the context has places.
        self._state = self._step(self._params, self._state._replace(position=self._half + 0), self._token)
        return self._state.logits


def prefill_call(config: RunConfig, params: Params, length: int) -> Callable[[], Any]:
    """Reading a prompt of `length` tokens: its hidden states, its cache, and the logits after it."""
    graphdef, _ = abstract_model(config, "float32")
    run = jax.jit(partial(prefill, graphdef))
    tokens = jax.random.randint(jax.random.key(1), (1, length), 0, config.model.vocab_size)
    return lambda: run(params, tokens, jnp.int32(length))


def uncached_call(config: RunConfig, params: Params, length: int = 4) -> Callable[[], Any]:
    """One forward pass over a short prompt, with the logits of every position: what is often called latency."""
    graphdef, _ = abstract_model(config, "float32")

    @jax.jit
    def run(params: Params, tokens: jax.Array) -> jax.Array:
        model = merge(graphdef, params)
        return model.logits(model(tokens, Mode.EVALUATE)[0])

    tokens = jax.random.randint(jax.random.key(2), (1, length), 0, config.model.vocab_size)
    return lambda: run(params, tokens)


def active_bytes(config: RunConfig) -> int:
    """Float32 bytes of the parameters that one token touches: what decoding must read, whatever it does."""
    return 4 * totals(count_parameters(config.model)).active
