"""Prefill, and a loop of sampling and cached decoding, one compiled program each, and the tokens that they generate.

The loop writes several tokens before the host sees them. Waiting for the host after each token would take longer than
the token itself does in a small model (`benchmarks/trials.md`, 59 to 61).

Chapter 12 of `foundation` derives what the cache may hold, and why generation drops no token.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.inference.sampling import Sampling, sample
from moe_jax.model.attention import KeyValue
from moe_jax.model.kernels.quantized_matmul import QuantizedMatrix
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import Params, merge

type ShardMapWrapper = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Turns a function into the same function on several devices."""


TOKENS_AT_ONCE = 8
"""Most tokens that a call of `Decoder.write` writes. A person sees them appear together, within milliseconds."""


def cast_once(graphdef: nnx.GraphDef, params: Params) -> Params:
    """The parameters, with the matrices that every token multiplies with in the compute dtype, if it is narrower. The
    texts are the same: these matrices would be cast at every token, which reads them in float32.

    Lookup tables (embedding, positions), routers and vectors stay as they are, since they are used in at least float32.
    So does a tied head, which is the embedding.
    """
    compute = merge(graphdef, params).compute

    def cast(path: tuple[Any, ...], leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        multiplied = name == "head" or (name.startswith("blocks.") and not name.endswith(".router"))
        if isinstance(leaf, QuantizedMatrix) or not multiplied or leaf.ndim < 2:
            return leaf
        return leaf.astype(compute) if leaf.dtype.itemsize > compute.itemsize else leaf

    return jax.tree_util.tree_map_with_path(cast, params, is_leaf=lambda leaf: isinstance(leaf, QuantizedMatrix))


class DecodeState(NamedTuple):
    """The state of a generation between two tokens, on the device."""

    logits: Float[Array, "B V"]
    """Logits of the next token."""
    cache: list[KeyValue]
    position: Int[Array, ""]
    """Position of the next token."""
    seen: Bool[Array, "B V"]
    """Tokens that the repetition penalty applies to."""


class Written(NamedTuple):
    """What a call of `write` has written."""

    state: DecodeState
    """After the last token."""
    tokens: Int[Array, " N"]
    """The tokens. Those behind the first `length` mean nothing."""
    length: Int[Array, ""]


class Decoder:
    """Generates text with a model.

    Prompts are padded on the right to T tokens, so one compiled prefill serves every prompt. The padding does not
    change the result: the model is causal, and prefill drops no token.

    `vocab_size` is the size of the tokenizer's vocabulary. The model's vocabulary may be larger; its further tokens are
    never drawn.

    `spread` makes the programs those of several devices (`training.on_mesh.same_on_all_devices`).
    """

    def __init__(
        self, graphdef: nnx.GraphDef, seq_len: int, vocab_size: int, spread: ShardMapWrapper = lambda function: function
    ) -> None:
        self.seq_len = seq_len
        self.draw = jax.jit(partial(draw, vocab_size))
        self.prefill = jax.jit(spread(partial(prefill, graphdef)))
        self.advance = jax.jit(spread(partial(advance, graphdef)), donate_argnums=1)
        self.write = jax.jit(spread(partial(write, graphdef, vocab_size)), donate_argnums=1)

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
        """Tokens after the prompt, until `stop` is drawn (it is not yielded) or until there are `limit` tokens.

        The prompt must have at least one token. Once the context is full, its later half becomes a new prompt, so a
        text can be longer than T. Token n is drawn with fold_in(key, n), so `limit` does not change the tokens.
        """
        settings, context = settings.in_own_types(), list(prompt)[-self.seq_len :]
        # The separator begins a prompt and also ends a text. It gets no repetition penalty, or texts would not end.
        state = self._start(params, context, [token for token in prompt if token != stop])
        n = 0
        while n < limit:
            room = self.seq_len - len(context)
            if room:
                state, tokens = self._write(params, state, context, settings, key, n, min(room, limit - n), stop)
            else:
                tokens = [int(self.draw(state.logits, settings, state.seen, jax.random.fold_in(key, n))[0])]
            for token in tokens:
                if token == stop:
                    return
                yield token
            n += len(tokens)
            context += tokens
            if not room and n < limit:
                context = context[-(self.seq_len // 2) :]
                seen = state.seen.at[0, tokens[0]].set(True)
                state = self._start(params, context, ())._replace(seen=seen)

    def _write(
        self,
        params: Params,
        state: DecodeState,
        context: Sequence[int],
        settings: Sampling,
        key: Key[Array, ""],
        number: int,
        most: int,
        stop: int,
    ) -> tuple[DecodeState, list[int]]:
        """Draw tokens, at least one and at most `most`, and append them to the state. `stop` is the last one if it is
        among them. Token number n of the text is drawn with fold_in(key, n), from n = `number` on. `context` are the
        tokens so far."""
        count = np.int32(min(most, TOKENS_AT_ONCE))
        written = self.write(params, state, settings, key, np.int32(number), count, np.int32(stop))
        return written.state, np.asarray(written.tokens)[: int(written.length)].tolist()

    def _start(self, params: Params, context: Sequence[int], seen: Sequence[int]) -> DecodeState:
        tokens = np.zeros((1, self.seq_len), np.int32)
        tokens[0, : len(context)] = context
        state = self.prefill(params, tokens, np.int32(len(context)))
        mask = np.zeros(state.logits.shape, bool)
        mask[0, list(seen)] = True
        # Made of the state, so that it lies where the rest does: `advance` compiles anew for an argument that does not.
        return state._replace(seen=state.seen | mask)


def draw(
    vocab_size: int, logits: Float[Array, "B V"], settings: Sampling, seen: Bool[Array, "B V"], key: Key[Array, ""]
) -> Int[Array, " B"]:
    """The next token of each row, among the first `vocab_size`."""
    return sample(logits[:, :vocab_size], settings, seen[:, :vocab_size], key)


def prefill(graphdef: nnx.GraphDef, params: Params, tokens: Int[Array, "B T"], length: Int[Array, ""]) -> DecodeState:
    """Read a prompt of `length` tokens, padded on the right to T. The result has the logits after its last token."""
    model = merge(graphdef, params)
    hidden, _, cache = model(tokens, Mode.GENERATE)
    logits = model.logits(jax.lax.dynamic_index_in_dim(hidden, length - 1, axis=1, keepdims=False))
    return DecodeState(logits, cache, length, jnp.zeros(logits.shape, bool))


def advance(graphdef: nnx.GraphDef, params: Params, state: DecodeState, token: Int[Array, " B"]) -> DecodeState:
    """Append one token to each row: add its keys and values to the cache, and compute the logits after it."""
    logits, _, cache = merge(graphdef, params).decode(token, state.cache, state.position)
    seen = state.seen | jax.nn.one_hot(token, logits.shape[-1], dtype=bool)
    return DecodeState(logits, cache, state.position + 1, seen)


def write(
    graphdef: nnx.GraphDef,
    vocab_size: int,
    params: Params,
    state: DecodeState,
    settings: Sampling,
    key: Key[Array, ""],
    number: Int[Array, ""],
    most: Int[Array, ""],
    stop: Int[Array, ""],
) -> Written:
    """Draw tokens and append them, in a loop on the device: `most` of them (1 to TOKENS_AT_ONCE), or those up to
    `stop`, which is appended too. The first is token `number` of the text. For a state of one row."""

    def goes_on(written: Written) -> Bool[Array, ""]:
        ended = (written.length > 0) & (written.tokens[written.length - 1] == stop)
        return (written.length < most) & ~ended

    def one_more(written: Written) -> Written:
        state, tokens, length = written
        token = draw(vocab_size, state.logits, settings, state.seen, jax.random.fold_in(key, number + length))
        state = advance(graphdef, params, state, token)
        return Written(state, tokens.at[length].set(token[0]), length + 1)

    nothing = Written(state, jnp.zeros(TOKENS_AT_ONCE, jnp.int32), jnp.int32(0))
    return jax.lax.while_loop(goes_on, one_more, nothing)
