"""One decoder of texts: prefill, and a loop of sampling and cached decoding, on the device.

It writes S independent texts, each in a slot of a batched cache, with a position, settings and random numbers of its
own. `generate` has one slot and calls `write`, which draws several tokens before the host sees them: in a small model,
waiting for the host after each token takes longer than the token (`benchmarks/trials.md`, 59 to 61). `serve` has
several slots and calls `step`, which draws one token for each.

With the same number of slots, a text has the same bits in every slot and beside any other texts: each row of a product
is summed in the same order (`model/moe/layer.py`, `Mode.SERVE`, says how the experts keep to that). With another number
of slots the last bits of its logits may differ, because they come from other products.

Chapter 12 of `foundation` derives what the cache may hold, and why generation drops no token.
"""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.stages import Compiled
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.inference.kept_programs import kept_programs
from moe_jax.inference.sampling import Sampling, sample
from moe_jax.inference.traced_pass import MOST_ALTERNATIVES, ShardMapWrapper, make_traced_pass
from moe_jax.model.attention import KeyValue
from moe_jax.model.moe.layer import Mode
from moe_jax.model.quantized import QuantizedMatrix
from moe_jax.model.transformer import Params, merge
from moe_jax.system.machine import wide_vectors

TOKENS_AT_ONCE = 8
"""Most tokens that a call of `Decoder.write` writes. A person sees them appear together, within milliseconds."""
SHORT_PROMPT = 64
"""Tokens of a short prompt. Reading it as a prompt of T tokens would take longer, in proportion to T."""


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
    """What a call of `write` has written."""

    slots: Slots
    tokens: Int[Array, " N"]
    """The tokens. Those behind the first `length` mean nothing."""
    length: Int[Array, ""]


class Decoder:
    """Writes texts with a model. Each program is compiled once.

    Prompts are padded on the right to T tokens; or with `short_prompts` to the first of SHORT_PROMPT, 4 times, 16 times
    that, and so on, that they fit. The padding does not change the result: the model is causal, and prefill drops no
    token.

    `vocab_size` is the size of the tokenizer's vocabulary. The model's vocabulary may be larger; its further tokens are
    never drawn.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        seq_len: int,
        vocab_size: int,
        slots: int = 1,
        *,
        short_prompts: bool = False,
        spread: ShardMapWrapper = lambda function: function,
    ) -> None:
        self.seq_len, self.slots, self.vocab_size, self._graphdef = seq_len, slots, vocab_size, graphdef
        shorter = (SHORT_PROMPT * 4**n for n in range(10 if short_prompts else 0))
        self.prompt_lengths = [*itertools.takewhile(lambda length: length < seq_len, shorter), seq_len]
        self.prefill = jax.jit(spread(partial(prefill, graphdef, places=seq_len)))
        self._compiled_prefill: dict[int, Compiled] = {}
        """Length of a prompt -> the program that `compile` has made for it."""
        self.begin: Any = jax.jit(spread(begin))
        once: Any = {"donate_argnums": 1, "compiler_options": wide_vectors()}
        self.write: Any = jax.jit(spread(partial(write, graphdef, vocab_size)), **once)
        self.step = jax.jit(partial(step, graphdef, vocab_size), **once)
        """(params, slots, active bool [S]) -> the slots after one more token in each active slot, and its details."""
        self._place = jax.jit(place, donate_argnums=0)
        self._refill = jax.jit(spread(refill), donate_argnums=0)
        self._repeat = jax.jit(partial(_repeated, slots))
        self._look = make_traced_pass(graphdef, Mode.GENERATE, predict=True, vocab_size=vocab_size)

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
        context = list(prompt)[-self.seq_len :]
        # The separator begins a prompt and also ends a text. It gets no repetition penalty, or texts would not end.
        text = self.start(params, context, [token for token in prompt if token != stop], settings, key)
        n = 0
        while n < limit:
            # A full context still gives one token. Nothing reads it before the slot is refilled.
            most = min(max(self.seq_len - len(context), 1), limit - n, TOKENS_AT_ONCE)
            text, written, length = self.write(params, text, np.int32(most), np.int32(stop))
            tokens = np.asarray(written)[: int(length)].tolist()
            for token in tokens:
                if token == stop:
                    return
                yield token
            n += len(tokens)
            context += tokens
            if len(context) > self.seq_len and n < limit:
                context = context[-(self.seq_len // 2) :]
                text = self.refill(text, 0, self.read(params, context))

    def compile(self, params: Params) -> None:
        """Compile what one text needs after a short prompt. On a CPU the programs are kept for later processes."""
        if jax.default_backend() != "cpu":
            programs = self._compiled(params)
        else:
            kind = jax.tree.map(lambda leaf: f"{leaf.dtype}{leaf.shape}", params)
            facts = [repr(self._graphdef), repr(kind), f"{self.seq_len} {self.prompt_lengths[0]} {self.vocab_size}"]
            programs = kept_programs(facts, lambda: self._compiled(params))
        read, self.write, self.begin = programs
        self._compiled_prefill = {self.prompt_lengths[0]: read}

    def _compiled(self, params: Params) -> list[Compiled]:
        """Prefill, `write` and `begin`. The first two take seconds each, so they are compiled side by side."""
        tokens, one = _padded([0], self.prompt_lengths[0]), np.int32(1)
        state = jax.eval_shape(self.prefill, params, tokens, one)
        arguments = state, np.zeros(state.logits.shape[1], bool), Sampling().in_own_types(), jax.random.key(0), False
        text = jax.eval_shape(self.begin, *arguments)
        with ThreadPoolExecutor(1) as beside:
            read = beside.submit(lambda: self.prefill.lower(params, tokens, one).compile())
            write = self.write.lower(params, text, one, one).compile()
            return [read.result(), write, self.begin.lower(*arguments).compile()]

    def start(
        self, params: Params, context: Sequence[int], seen: Sequence[int], settings: Sampling, key: Key[Array, ""]
    ) -> Slots:
        """One text, after a prompt of 1 to T tokens. The repetition penalty applies to the tokens `seen`."""
        read = self.read(params, context)
        return self.begin(read, _mask(read, seen), settings.in_own_types(), key, False)

    def read(self, params: Params, tokens: Sequence[int]) -> PromptState:
        """The state after a prompt of 1 to T tokens."""
        length = next(length for length in self.prompt_lengths if len(tokens) <= length)
        program = self._compiled_prefill.get(length, self.prefill)
        return program(params, _padded(tokens, length), np.int32(len(tokens)))

    def look(self, params: Params, tokens: Sequence[int]) -> TokenDetails:
        """The log-probabilities and the experts of a prompt of 1 to T tokens, as NumPy arrays. Rows behind its last
        token mean nothing."""
        length = next(length for length in self.prompt_lengths if len(tokens) <= length)
        padded: Any = _padded(tokens, length + 1)
        decisions, predicted = jax.tree.map(np.asarray, self._look(params, padded))
        loss, likeliest, logprob = (np.roll(rows[0], 1, axis=0) for rows in predicted)  # token t is predicted by t - 1
        loss[0] = 0
        experts = (None, None) if decisions is None else (decisions.expert_index[:, 0], decisions.gate[:, 0])
        return TokenDetails(padded[0, :-1], -loss, likeliest, logprob, *experts)

    def empty(self, params: Params) -> Slots:
        """Slots without texts. They are made of a text, so that they lie where later slots lie: jax would compile a
        program twice for arrays that do not."""
        return self._repeat(self.start(params, [0], (), Sampling(), jax.random.key(0)))

    def place(
        self,
        slots: Slots,
        slot: int,
        read: PromptState,
        seen: Sequence[int],
        settings: Sampling,
        key: Key[Array, ""],
        detailed: bool = False,
    ) -> Slots:
        """Begin a text in a slot, after a prompt that was read. The repetition penalty applies to the tokens `seen`."""
        return self._place(slots, slot, read, _mask(read, seen), settings.in_own_types(), key, detailed)

    def refill(self, slots: Slots, slot: int, read: PromptState) -> Slots:
        """Go on with a text whose context was full, after its later half was read as a new prompt."""
        return self._refill(slots, slot, read)


def _padded(tokens: Sequence[int], length: int) -> np.ndarray:
    return np.pad(np.asarray(tokens, np.int32), (0, length - len(tokens)))[None]


def _mask(read: PromptState, seen: Sequence[int]) -> np.ndarray:
    mask = np.zeros(read.logits.shape[1], bool)
    mask[list(seen)] = True
    return mask


def _repeated(count: int, text: Slots) -> Slots:
    return jax.tree.map(lambda row: jnp.broadcast_to(row, (count, *row.shape[1:])), text)


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


def begin(
    read: PromptState,
    seen: Bool[Array, " V"],
    settings: Sampling,
    key: Key[Array, ""],
    detailed: bool | Bool[Array, ""],
) -> Slots:
    """A text of which nothing is drawn yet."""
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
    graphdef: nnx.GraphDef, vocab_size: int, params: Params, slots: Slots, active: Bool[Array, " S"]
) -> tuple[Slots, TokenDetails]:
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
    experts = (None, None) if trace is None else (trace.expert_index[:, :, 0], trace.gate[:, :, 0])
    return slots, TokenDetails(token, logprob, likeliest, likeliest_logprob, *experts)


def _draw_row(vocab_size: int, row: tuple) -> tuple[Array, Array, Array, Array]:
    """The next token of one slot, its log-probability, and the likeliest tokens with theirs. Nothing is computed for a
    slot that is not active."""
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
    most: Int[Array, ""],
    stop: Int[Array, ""],
) -> Written:
    """Draw tokens of one text and append them, in a loop on the device: `most` of them (1 to TOKENS_AT_ONCE), or those
    up to `stop`, which is appended too."""

    def goes_on(written: Written) -> Bool[Array, ""]:
        ended = (written.length > 0) & (written.tokens[written.length - 1] == stop)
        return (written.length < most) & ~ended

    def one_more(written: Written) -> Written:
        slots, drawn = step(graphdef, vocab_size, params, written.slots, jnp.ones(1, bool))
        return Written(slots, written.tokens.at[written.length].set(drawn.token[0]), written.length + 1)

    nothing = Written(slots, jnp.zeros(TOKENS_AT_ONCE, jnp.int32), jnp.int32(0))
    return jax.lax.while_loop(goes_on, one_more, nothing)
