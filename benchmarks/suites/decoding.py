"""`benchmark.py decode`: prefill, cached decoding, uncached forward passes, and the memory that decoding must read."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from rich.console import Console

from moe_jax.config import ModelConfig, RunConfig
from moe_jax.inference.decode import NOTHING_GIVEN, TOKENS_AT_ONCE, Decoder, cast_once
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.slots import advance, prefill
from moe_jax.model.costs import count_parameters, totals
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import Forms, Params, abstract_model, create, merge, split
from moe_jax.system import machine
from moe_jax.system.machine import Measured, alternate

from .request import BenchmarkRequest, print_numbers, times_table


def token_call(model: ModelConfig, params: Params) -> Callable[[], Measured]:
    """Write the next tokens of one text, as `generate --temperature 0` does, and give the seconds of one of them.

    Each call writes the same positions, from T/2 on: a benchmark may write more tokens than the context holds.
    """
    length, settings = model.seq_len, Sampling(temperature=0.0)
    decoder = Decoder(abstract_model(model)[0], length, model.vocab_size)
    half, count = np.int32(length // 2), np.int32(min(TOKENS_AT_ONCE, length - length // 2))
    never, tokens = np.int32(-1), [1] * int(half)
    text = [decoder.start(params, tokens, (), settings, jax.random.key(0))]

    def write() -> Measured:
        begin = time.perf_counter()
        again = text[0]._replace(position=jnp.asarray(half)[None])
        written = decoder.write(params, again, NOTHING_GIVEN, count, never)
        text[0] = written.slots
        np.asarray(written.tokens)  # the host reads them
        return Measured((time.perf_counter() - begin) / count)

    return write


def batch_call(model: ModelConfig, params: Params, batch: int) -> Callable[[], Any]:
    """Decode one token at position T/2 of the context, for each sequence of a batch. The host waits for every token."""
    graphdef = abstract_model(model)[0]
    step = jax.jit(partial(advance, graphdef), donate_argnums=1)
    half, tokens = jnp.int32(model.seq_len // 2), jnp.ones((batch, model.seq_len), jnp.int32)
    state = [jax.jit(partial(prefill, graphdef))(params, tokens, half)]
    token = jax.random.randint(jax.random.key(0), (batch,), 0, model.vocab_size)

    def decode() -> Any:
        # The position stays the same, because a benchmark may decode more tokens than the context has positions.
        state[0] = step(params, state[0]._replace(position=half + 0), token)
        return state[0].logits

    return decode


def prefill_call(model: ModelConfig, params: Params, length: int, compute: str = "float32") -> Callable[[], Any]:
    """Prefill of a prompt of `length` tokens: its cache, and the logits of the next token. The matrices are kept in the
    dtype `compute`."""
    graphdef = abstract_model(model, Forms(compute))[0]
    run, params = jax.jit(partial(prefill, graphdef)), cast_once(graphdef, params)
    tokens = jax.random.randint(jax.random.key(1), (1, length), 0, model.vocab_size)
    return lambda: run(params, tokens, jnp.int32(length))


def forward_call(model: ModelConfig, params: Params, tokens: ArrayLike) -> Callable[[], Any]:
    """One forward pass over a batch, without drops, with the logits of every position."""
    graphdef = abstract_model(model)[0]

    @jax.jit
    def run(params: Params, tokens: jax.Array) -> jax.Array:
        merged = merge(graphdef, params)
        return merged.logits(merged(tokens, Mode.EVALUATE)[0])

    return lambda: run(params, tokens)


def uncached_call(model: ModelConfig, params: Params, length: int = 4) -> Callable[[], Any]:
    """One forward pass over a short prompt. Its time is often called latency."""
    return forward_call(model, params, jax.random.randint(jax.random.key(2), (1, length), 0, model.vocab_size))


def active_bytes(config: RunConfig) -> int:
    """Bytes of the parameters that one token touches, in float32. Decoding one token must read at least these bytes."""
    return 4 * totals(count_parameters(config.model)).active


def decode(console: Console, request: BenchmarkRequest) -> dict[str, Any]:
    """The suite: prefill, cached decoding, and an uncached forward pass of four tokens."""
    config = request.config
    _, params = split(create(config.model, jax.random.key(0)))
    model = config.model
    read, read_bytes = machine.memory_read_benchmark()
    times = alternate(
        {
            "memory read": read,
            "decode, batch 1": token_call(model, params),
            "decode, batch 32": batch_call(model, params, 32),
            "prefill, 128 tokens": prefill_call(model, params, 128),
            "uncached forward, 4 tokens": uncached_call(model, params),
        },
        3 * request.rounds,
    )
    bandwidth = read_bytes / times["memory read"].median
    bound = active_bytes(config) / bandwidth
    console.print(times_table("decoding", times))
    numbers = {
        "decode_share_of_bandwidth_bound": bound / times["decode, batch 1"].median,
        "memory_bytes_per_second": bandwidth,
    }
    print_numbers(console, numbers)
    return numbers | {
        **{f"decode_ms_per_token_batch{b}": times[f"decode, batch {b}"].median * 1e3 for b in (1, 32)},
        "prefill_128_ms": times["prefill, 128 tokens"].median * 1e3,
        "uncached_4_token_ms": times["uncached forward, 4 tokens"].median * 1e3,
    }
