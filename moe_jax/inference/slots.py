"""Texts on the device, each in a slot of a batched cache, and the programs that read and write them.

`decode.py` compiles them and calls them. Each is a function of arrays without side effects.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.inference.sampling import Sampling, sample
from moe_jax.inference.traced_pass import MOST_ALTERNATIVES
from moe_jax.model.attention import KeyValue
from moe_jax.model.kernels.processor import by_platform
from moe_jax.model.moe.layer import Mode
from moe_jax.model.precision import at_least_float32
from moe_jax.model.transformer import Params, merge


class PromptState(NamedTuple):
    """What is left of a prompt that was read, on the device."""

    logits: Float[Array, "B V"]
    """Logits of the next token."""
    cache: list[KeyValue]
    position: Int[Array, ""]
    """Position of the next token."""


class Slots(NamedTuple):
    """The state of S texts between two tokens, on the device."""

    logits: Float[Array, "S V"]
    """Logits of the next token."""
    cache: list[KeyValue]
    position: Int[Array, " S"]
    """Position of the next token. T: the context is full, and the slot must be refilled after the next token."""
    seen: Bool[Array, "S V"]
    """Tokens that the repetition penalty applies to."""
    drawn: Int[Array, " S"]
    """Tokens drawn so far. The next one is drawn with fold_in(key, drawn)."""
    key: Key[Array, " S"]
    settings: Sampling
    """Each field is an array `[S]`."""
    detailed: Bool[Array, " S"]
    """Whether log-probabilities are computed for the slot."""


class TokenDetails(NamedTuple):
    """What is known of N tokens: those drawn for the slots (rows of slots that are not active mean nothing), or those
    of a prompt."""

    token: Int[Array, " N"]
    logprob: Float[Array, " N"]
    """Under the model's own distribution: before temperature, penalty and filters. 0 if not detailed, and for the first
    token of a prompt."""
    likeliest: Int[Array, "N A"]
    """The likeliest tokens in its place, best first."""
    likeliest_logprob: Float[Array, "N A"]
    expert: Int[Array, "L N K"] | None
    """The experts that have read the token, best first. None for a dense model."""
    gate: Float[Array, "L N K"] | None


class Written(NamedTuple):
    """What a call of `write` has appended to a text."""

    slots: Slots
    tokens: Int[Array, " N"]
    """The tokens, those that were given first. Those behind the first `length` mean nothing."""
    length: Int[Array, ""]


def prefill(
    graphdef: nnx.GraphDef, params: Params, tokens: Int[Array, "B N"], length: Int[Array, ""], places: int = 0
) -> PromptState:
    """Read prompts of `length` tokens, padded on the right to N. The result has the logits after their last token, and
    a cache with `places` places, at least N."""
    model = merge(graphdef, params)
    hidden, _, cache = model(tokens, Mode.GENERATE)
    logits = model.logits(jax.lax.dynamic_index_in_dim(hidden, length - 1, axis=1, keepdims=False))
    if (unused := places - tokens.shape[1]) > 0:
        keys, values = ((0, 0), (0, 0), (0, 0), (0, unused)), ((0, 0), (0, 0), (0, unused), (0, 0))
        cache = [KeyValue(jnp.pad(kv.key, keys), jnp.pad(kv.value, values)) for kv in cache]
    return PromptState(logits, cache, length)


def advance(graphdef: nnx.GraphDef, params: Params, state: PromptState, token: Int[Array, " B"]) -> PromptState:
    """Append a known token to each sequence: its keys and values go into the cache, and the logits after it are new."""
    logits, _, cache = merge(graphdef, params).decode(token, state.cache, state.position)
    return PromptState(logits, cache, state.position + 1)


def begin_empty(
    graphdef: nnx.GraphDef,
    places: int,
    params: Params,
    seen: Bool[Array, " V"],
    settings: Sampling,
    key: Key[Array, ""],
) -> Slots:
    """A text of which nothing is read yet. Its first token must be given."""
    model = merge(graphdef, params)
    logits = jnp.zeros((1, model.config.vocab_size), at_least_float32(model.compute))
    return begin(PromptState(logits, model.empty_cache(1, places), jnp.int32(0)), seen, settings, key, False)


def begin(
    read: PromptState,
    seen: Bool[Array, " V"],
    settings: Sampling,
    key: Key[Array, ""],
    detailed: bool | Bool[Array, ""],
) -> Slots:
    """A text of which nothing is drawn yet. `seen` may leave out tokens at the end of the model's vocabulary."""
    seen = jnp.pad(seen, (0, read.logits.shape[1] - len(seen)))
    one = lambda value: jnp.asarray(value)[None]  # noqa: E731
    drawn, own = jnp.zeros(1, jnp.int32), jax.tree.map(one, settings)
    return Slots(read.logits, read.cache, one(read.position), one(seen), drawn, key[None], own, one(detailed))


def place(
    slots: Slots,
    slot: int | Int[Array, ""],
    read: PromptState,
    seen: Bool[Array, " V"],
    settings: Sampling,
    key: Key[Array, ""],
    detailed: bool | Bool[Array, ""],
) -> Slots:
    """The slots with a new text in one of them."""
    return _put(slots, slot, begin(read, seen, settings, key, detailed))


def refill(slots: Slots, slot: int | Int[Array, ""], read: PromptState) -> Slots:
    """The slots with the logits, cache and position of one of them replaced."""
    old = slots.logits, slots.cache, slots.position
    logits, cache, position = _put(old, slot, (read.logits, read.cache, read.position[None]))
    return slots._replace(logits=logits, cache=cache, position=position)


def _put[T](rows: T, slot: int | Int[Array, ""], row: T) -> T:
    """The arrays [S, ...] with one of their rows replaced."""
    return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, slot, axis=0), rows, row)


def draw(
    vocab_size: int, logits: Float[Array, "B V"], settings: Sampling, seen: Bool[Array, "B V"], key: Key[Array, ""]
) -> Int[Array, " B"]:
    """The next token of each row, among the first `vocab_size`."""
    return sample(logits[:, :vocab_size], settings, seen[:, :vocab_size], key)


def step(
    graphdef: nnx.GraphDef,
    vocab_size: int,
    params: Params,
    slots: Slots,
    active: Bool[Array, " S"],
    given: Int[Array, " S"] | None = None,
) -> tuple[Slots, TokenDetails]:
    """Draw the next token of every active slot, and read it: its keys and values go into the cache. Where a token is
    `given` (not negative), it belongs to the prompt: it is read in place of a draw, and no draw is counted."""
    drawing = active if given is None else active & (given < 0)
    # On a card all rows at once: their conditionals become selects, so no step waits for the host.
    draw_row = partial(_draw_row, vocab_size)
    token, logprob, likeliest, likeliest_logprob = by_platform(
        (slots.logits, slots.settings, slots.seen, slots.key, slots.drawn, drawing, slots.detailed),
        cpu=partial(jax.lax.map, draw_row),
        default=jax.vmap(draw_row),
    )
    token = token if given is None else jnp.where(drawing, token, given)
    last = slots.cache[0].key.shape[-1] - 1
    # A full slot is refilled after this step, so its place is free. Nothing is read for a slot without a text.
    position = jnp.where(active, jnp.minimum(slots.position, last), -1)
    logits, stats, cache = merge(graphdef, params).decode(token, slots.cache, position, trace=True)
    seen = slots.seen | (jax.nn.one_hot(token, logits.shape[-1], dtype=bool) & drawing[:, None])
    slots = slots._replace(
        logits=logits,
        cache=cache,
        seen=seen,
        position=slots.position + active.astype(jnp.int32),
        drawn=slots.drawn + drawing.astype(jnp.int32),
    )
    trace = None if stats is None else stats.trace
    experts = (None, None) if trace is None else (trace.expert_index[:, :, 0], trace.gate[:, :, 0])
    return slots, TokenDetails(token, logprob, likeliest, likeliest_logprob, *experts)


def _draw_row(vocab_size: int, row: tuple) -> tuple[Array, Array, Array, Array]:
    """The next token of one slot, its log-probability, and the likeliest tokens with theirs. On a CPU nothing is
    computed for a slot that is not active."""
    logits, settings, seen, key, drawn, active, detailed = row
    most = min(MOST_ALTERNATIVES, vocab_size)

    def next_token() -> Array:
        return draw(vocab_size, logits[None], settings, seen[None], jax.random.fold_in(key, drawn))[0].astype(jnp.int32)

    token = jax.lax.cond(active, next_token, lambda: jnp.int32(0))

    def details() -> tuple[Array, Array, Array]:
        logprobs = jax.nn.log_softmax(logits[:vocab_size])
        best, index = jax.lax.top_k(logprobs, most)
        return logprobs[token], index, best

    def nothing() -> tuple[Array, Array, Array]:
        return jnp.zeros((), logits.dtype), jnp.zeros(most, jnp.int32), jnp.zeros(most, logits.dtype)

    return (token, *jax.lax.cond(active & detailed, details, nothing))


def write(
    graphdef: nnx.GraphDef,
    vocab_size: int,
    params: Params,
    slots: Slots,
    given: Int[Array, " N"],
    most: Int[Array, ""],
    stop: Int[Array, ""],
) -> Written:
    """Append tokens to one text, in a loop on the device. `given` begins with tokens of the prompt, perhaps none, and
    negative numbers follow. The prompt's tokens are appended first. Then tokens are drawn, until `most` are appended in
    all (1 to N), or until `stop` is drawn, which is appended too."""

    def goes_on(written: Written) -> Bool[Array, ""]:
        last = written.length - 1
        ended = (last >= 0) & (given[last] < 0) & (written.tokens[last] == stop)
        return (written.length < most) & ~ended

    def one_more(written: Written) -> Written:
        slots, read = step(graphdef, vocab_size, params, written.slots, jnp.ones(1, bool), given[written.length][None])
        return Written(slots, written.tokens.at[written.length].set(read.token[0]), written.length + 1)

    return jax.lax.while_loop(goes_on, one_more, Written(slots, jnp.zeros_like(given), jnp.int32(0)))
