"""Decoding several independent texts at once: S slots of a batched cache, each with a position, settings and random
numbers of its own.

    place    a prompt that `decode.prefill` has read goes into a slot; the other slots stay as they are
    step     draw the next token of every active slot, and read it

A text's tokens are drawn with the keys that `decode.Decoder` uses. Its logits come from batched products, and those of
a short prompt from a shorter pass. So they may differ from those of `decode.Decoder` in their last bits. With the same
number of slots, a text has the same bits in every slot and beside any other texts: each row of a product is summed in
the same order (`model/moe/layer.py`, `Mode.SERVE`, says how the experts keep to that).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.inference.decode import DecodeState, draw, prefill
from moe_jax.inference.prompt_pass import MOST_ALTERNATIVES, ReadPrompt, make_prompt_pass
from moe_jax.inference.sampling import Sampling
from moe_jax.model.attention import KeyValue
from moe_jax.model.transformer import Params, merge
from moe_jax.system.random_keys import Purpose, purpose_key

SHORT_PROMPT = 64
"""Tokens of a short prompt. Reading it as a prompt of T tokens would take longer, in proportion to T."""


class Slots(NamedTuple):
    """The state of S texts between two tokens, on the device."""

    logits: Float[Array, "S V"]
    """Logits of the next token."""
    cache: list[KeyValue]
    seen: Bool[Array, "S V"]
    """Tokens that the repetition penalty applies to."""
    position: Int[Array, " S"]
    """Position of the next token. T: the context is full, and the slot must be refilled after the next token."""
    drawn: Int[Array, " S"]
    """Tokens drawn so far. The next one is drawn with fold_in(key, drawn)."""
    key: Key[Array, " S"]
    settings: Sampling
    """Each field is an array `[S]`."""
    detailed: Bool[Array, " S"]
    """Whether log-probabilities are computed for the slot."""


class Writing(NamedTuple):
    """How a text is to be written."""

    settings: Sampling
    seed: int | Int[Array, ""]
    number: int | Int[Array, ""]
    """One of the texts of the seed, as in `generate.TextGenerator`."""
    detailed: bool | Bool[Array, ""]


class Drawn(NamedTuple):
    """What a step has drawn for each slot. Rows of slots that are not active mean nothing."""

    token: Int[Array, " S"]
    logprob: Float[Array, " S"]
    """Of the token under the model's own distribution: before temperature, penalty and filters. 0 if not detailed."""
    likeliest: Int[Array, "S N"]
    """The N likeliest tokens, best first."""
    likeliest_logprob: Float[Array, "S N"]
    expert: Int[Array, "L S K"] | None
    """The experts that have read the token, best first. None for a dense model."""
    gate: Float[Array, "L S K"] | None


class SlotDecoder:
    """The programs of S slots. Each is compiled once."""

    def __init__(self, graphdef: nnx.GraphDef, seq_len: int, vocab_size: int, slots: int) -> None:
        """`vocab_size` is the tokenizer's, as in `decode.Decoder`."""
        self.seq_len, self.slots = seq_len, slots
        self.prompt_lengths = sorted({min(SHORT_PROMPT, seq_len), seq_len})
        """Prompts are padded to the first of these that they fit. Each has a program of its own."""
        self._prefill = jax.jit(partial(_prefill, graphdef, seq_len))
        self._look = make_prompt_pass(graphdef, vocab_size)
        self._empty = jax.jit(partial(_empty, slots))
        self._place = jax.jit(place, donate_argnums=0)
        self._refill = jax.jit(refill, donate_argnums=0)
        self.step = jax.jit(partial(step, graphdef, vocab_size), donate_argnums=1)
        """(params, slots, active bool [S]) -> the slots after one more token in each active slot, and `Drawn`."""

    def empty(self, params: Params) -> Slots:
        """Slots without texts. They are put on the device of a state that was read, as later slots are. Otherwise jax
        would compile `place` twice: for them, and at the first text."""
        read = self.read(params, [0])
        return jax.device_put(self._empty(read), read.logits.sharding)

    def read(self, params: Params, tokens: list[int]) -> DecodeState:
        """The state after a prompt of 1 to T tokens."""
        length = next(length for length in self.prompt_lengths if len(tokens) <= length)
        return self._prefill(params, self._padded(tokens, length), np.int32(len(tokens)))

    def look(self, params: Params, tokens: list[int]) -> ReadPrompt:
        """The log-probabilities and the experts of a prompt of 1 to T tokens, as NumPy arrays."""
        return jax.tree.map(np.asarray, self._look(params, self._padded(tokens, self.seq_len)))

    def _padded(self, tokens: list[int], length: int) -> np.ndarray:
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(tokens)] = tokens
        return padded

    def place(self, slots: Slots, slot: int, read: DecodeState, seen: list[int], writing: Writing) -> Slots:
        """Begin a text in a slot, after a prompt that was read. The repetition penalty applies to the tokens `seen`."""
        mask = np.zeros(slots.seen.shape[1], bool)
        mask[seen] = True
        return self._place(slots, slot, read, mask, writing)

    def refill(self, slots: Slots, slot: int, read: DecodeState) -> Slots:
        """Go on with a text whose context was full, after its later half was read as a new prompt."""
        return self._refill(slots, slot, read)


def _prefill(
    graphdef: nnx.GraphDef, seq_len: int, params: Params, tokens: Int[Array, "1 N"], length: Int[Array, ""]
) -> DecodeState:
    """`decode.prefill` of a prompt that is padded to N <= T tokens. Its cache has T places."""
    state = prefill(graphdef, params, tokens, length)
    unused, all_used = (0, seq_len - tokens.shape[1]), (0, 0)
    grown = [
        KeyValue(
            jnp.pad(layer.key, (all_used, all_used, all_used, unused)),
            jnp.pad(layer.value, (all_used, all_used, unused, all_used)),
        )
        for layer in state.cache
    ]
    return state._replace(cache=grown)


def _empty(count: int, read: DecodeState) -> Slots:
    """`count` slots with arrays like those of a state of one sequence."""
    grown = lambda one: jnp.zeros((count, *one.shape[1:]), one.dtype)  # noqa: E731
    zeros = jnp.zeros(count, jnp.int32)
    settings = jax.tree.map(lambda value: jnp.full(count, value), Sampling())
    key = jax.vmap(jax.random.key)(zeros)
    logits, cache, seen = jax.tree.map(grown, (read.logits, read.cache, read.seen))
    return Slots(logits, cache, seen, zeros, zeros, key, settings, jnp.zeros(count, bool))


def place(
    slots: Slots, slot: int | Int[Array, ""], read: DecodeState, seen: Bool[Array, " V"], writing: Writing
) -> Slots:
    """The slots with a new text in one of them."""
    slots = refill(slots, slot, read)
    put = lambda rows, row: rows.at[slot].set(row)  # noqa: E731
    return slots._replace(
        seen=put(slots.seen, seen),
        drawn=put(slots.drawn, 0),
        key=put(slots.key, purpose_key(writing.seed, Purpose.SAMPLE, writing.number)),
        settings=jax.tree.map(put, slots.settings, writing.settings),
        detailed=put(slots.detailed, writing.detailed),
    )


def refill(slots: Slots, slot: int | Int[Array, ""], read: DecodeState) -> Slots:
    """The slots with the logits, cache and position of one of them replaced."""
    put = lambda rows, row: jax.lax.dynamic_update_slice_in_dim(rows, row, slot, axis=0)  # noqa: E731
    logits, cache = jax.tree.map(put, (slots.logits, slots.cache), (read.logits, read.cache))
    return slots._replace(logits=logits, cache=cache, position=slots.position.at[slot].set(read.position))


def step(
    graphdef: nnx.GraphDef, vocab_size: int, params: Params, slots: Slots, active: Bool[Array, " S"]
) -> tuple[Slots, Drawn]:
    """Draw the next token of every active slot, and read it: its keys and values go into the cache."""
    token, logprob, likeliest, likeliest_logprob = jax.lax.map(
        partial(_draw_row, vocab_size),
        (slots.logits, slots.settings, slots.seen, slots.key, slots.drawn, active, slots.detailed),
    )
    last = slots.cache[0].key.shape[-1] - 1
    # A full slot is refilled after this step, so its place is free. Nothing is read for a slot without a text.
    position = jnp.where(active, jnp.minimum(slots.position, last), -1)
    logits, stats, cache = merge(graphdef, params).decode(token, slots.cache, position, trace=True)
    seen = slots.seen | (jax.nn.one_hot(token, logits.shape[-1], dtype=bool) & active[:, None])
    grown = active.astype(jnp.int32)
    slots = slots._replace(
        logits=logits, cache=cache, seen=seen, position=slots.position + grown, drawn=slots.drawn + grown
    )
    trace = None if stats is None else stats.trace
    expert, gate = (None, None) if trace is None else (trace.expert_index[:, :, 0], trace.gate[:, :, 0])
    return slots, Drawn(token, logprob, likeliest, likeliest_logprob, expert, gate)


def _draw_row(vocab_size: int, row: tuple) -> tuple[Array, Array, Array, Array]:
    """The next token of one slot, its log-probability, and the likeliest tokens with theirs. Nothing is computed for a
    slot that is not active."""
    logits, settings, seen, key, drawn, active, detailed = row
    most = min(MOST_ALTERNATIVES, vocab_size)

    def of_active() -> Array:
        return draw(vocab_size, logits[None], settings, seen[None], jax.random.fold_in(key, drawn))[0].astype(jnp.int32)

    token = jax.lax.cond(active, of_active, lambda: jnp.int32(0))

    def of_detailed() -> tuple[Array, Array, Array]:
        logprobs = jax.nn.log_softmax(logits[:vocab_size])
        best, index = jax.lax.top_k(logprobs, most)
        return logprobs[token], index, best

    def nothing() -> tuple[Array, Array, Array]:
        return jnp.zeros((), logits.dtype), jnp.zeros(most, jnp.int32), jnp.zeros(most, logits.dtype)

    return (token, *jax.lax.cond(active & detailed, of_detailed, nothing))
