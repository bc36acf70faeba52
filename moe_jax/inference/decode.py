"""One decoder of texts: prefill, and a loop of sampling and cached decoding, on the device.

It writes S independent texts, each in a slot of a batched cache, with a position, settings and random numbers of its
own. `generate` has one slot and calls `write`, which draws several tokens before the host sees them: in a small model,
waiting for the host after each token takes longer than the token. `serve` has several slots and calls `step`, which
draws one token for each.

With the same number of slots, a text has the same bits in every slot and beside any other texts: each row of a product
is summed in the same order (`model/moe/layer.py`, `Mode.SERVE`, says how the experts keep to that). With another number
of slots the last bits of its logits may differ, because they come from other products.

Chapter 12 of `foundation` derives what the cache may hold, and why generation drops no token.
"""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from jax.stages import Compiled
from jaxtyping import Array, Key

from moe_jax.data.tokenizers import StreamDecoder, Tokenizer, json_digest
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.slots import (
    PromptState,
    Slots,
    TokenDetails,
    begin,
    begin_empty,
    place,
    prefill,
    refill,
    step,
    write,
)
from moe_jax.inference.traced_pass import ShardMapWrapper, make_traced_pass
from moe_jax.model.moe.layer import Mode
from moe_jax.model.quantized import QuantizedMatrix
from moe_jax.model.transformer import Params, merge
from moe_jax.system.files import cache_dir
from moe_jax.system.machine import processor, processor_flags, wide_vectors
from moe_jax.system.random_keys import Purpose, purpose_key

TOKENS_AT_ONCE = 8
"""Most tokens that a call of `Decoder.write` writes. A person sees them appear together, within milliseconds."""
GIVEN = 32
"""Most tokens of a prompt that `Decoder.write` reads, one after another. A text after such a prompt needs no prefill:
compiling both programs takes twice as long (`benchmarks/trials.md`, 261)."""
NOTHING_GIVEN = np.full(GIVEN + TOKENS_AT_ONCE, -1, np.int32)
"""What `write` is given after the prompt was read: no token."""
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


class Decoder:
    """Writes texts with a model. Each program is compiled once.

    `stream` gives a prompt of at most GIVEN tokens to `write`. Prefill reads all others. It pads a prompt on the right
    to T tokens; or with `short_prompts` to the first of SHORT_PROMPT, 4 times, 16 times that, and so on, that it fits.
    The padding does not change the result: the model is causal, and prefill drops no token.

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
        self._given = min(GIVEN, self.prompt_lengths[0] - 1)
        """Most tokens of a prompt that `write` reads."""
        # `keep_unused`: the text then lies where the parameters do, as later ones will. Else `write` is compiled twice.
        self.begin_empty: Any = jax.jit(spread(partial(begin_empty, graphdef, seq_len)), keep_unused=True)
        self.begin = jax.jit(spread(begin))
        once: Any = {"donate_argnums": 1, "compiler_options": wide_vectors()}
        self.write: Any = jax.jit(spread(partial(write, graphdef, vocab_size)), **once)
        self.step = jax.jit(partial(step, graphdef, vocab_size), **once)
        """(params, slots, active bool [S]) -> the slots after one more token in each active slot, and its details."""
        self._place = jax.jit(place, donate_argnums=0)
        self.refill = jax.jit(spread(refill), donate_argnums=0)
        """(slots, slot, read) -> the slots, with the later half of a full context, which was read as a new prompt."""
        wide = lambda row: jnp.broadcast_to(row, (slots, *row.shape[1:]))  # noqa: E731
        self._repeat = jax.jit(lambda text: jax.tree.map(wide, text))
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
        seen = [token for token in prompt if token != stop]
        given = context if len(context) <= self._given else []
        if given:
            text = self.begin_empty(params, self._mask(seen), settings.in_own_types(), key)
        else:
            text = self.start(params, context, seen, settings, key)
        n = 0
        while n < limit:
            # A full context still gives one token. Nothing reads it before the slot is refilled.
            most = min(max(self.seq_len - len(context), 1), limit - n, TOKENS_AT_ONCE)
            read, first = len(given), NOTHING_GIVEN.copy()
            first[:read], given = given, []
            text, written, length = self.write(params, text, first, np.int32(read + most), np.int32(stop))
            tokens = np.asarray(written)[read : int(length)].tolist()
            for token in tokens:
                if token == stop:
                    return
                yield token
            n += len(tokens)
            context += tokens
            if len(context) > self.seq_len and n < limit:
                context = context[-(self.seq_len // 2) :]
                text = self.refill(text, 0, self.read(params, context))

    def compile(self, params: Params, prompt: int = 1) -> None:
        """Compile what one text needs after a prompt of `prompt` tokens. `write` and prefill take seconds each, so they
        are compiled side by side."""
        one, beginning = np.int32(1), (params, self._mask(()), Sampling().in_own_types(), jax.random.key(0))
        text = jax.eval_shape(self.begin_empty, *beginning)
        length = 0 if prompt <= self._given else self._padded_length(min(prompt, self.seq_len))
        with ThreadPoolExecutor(1) as beside:
            read = beside.submit(self.prefill.lower(params, _padded([0], length), one).compile) if length else None
            self.write = self.write.lower(params, text, NOTHING_GIVEN, one, one).compile()
            self.begin_empty = self.begin_empty.lower(*beginning).compile()
        if read is not None:
            self._compiled_prefill[length] = read.result()

    def start(
        self, params: Params, context: Sequence[int], seen: Sequence[int], settings: Sampling, key: Key[Array, ""]
    ) -> Slots:
        """One text, after a prompt of 1 to T tokens. The repetition penalty applies to the tokens `seen`."""
        return self.begin(self.read(params, context), self._mask(seen), settings.in_own_types(), key, False)

    def read(self, params: Params, tokens: Sequence[int]) -> PromptState:
        """The state after a prompt of 1 to T tokens."""
        length = self._padded_length(len(tokens))
        program = self._compiled_prefill.get(length, self.prefill)
        return program(params, _padded(tokens, length), np.int32(len(tokens)))

    def look(self, params: Params, tokens: Sequence[int]) -> TokenDetails:
        """The log-probabilities and the experts of a prompt of 1 to T tokens, as NumPy arrays. Rows behind its last
        token mean nothing."""
        length = self._padded_length(len(tokens))
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
        return self._place(slots, slot, read, self._mask(seen), settings.in_own_types(), key, detailed)

    def _padded_length(self, length: int) -> int:
        return next(padded for padded in self.prompt_lengths if length <= padded)

    def _mask(self, seen: Sequence[int]) -> np.ndarray:
        mask = np.zeros(self.vocab_size, bool)
        mask[list(seen)] = True
        return mask


class TextGenerator:
    """Generates text with a model and its tokenizer. The same prompt, settings, seed and number give the same text."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Params,
        tokenizer: Tokenizer,
        seq_len: int,
        decoder: Decoder | None = None,
    ) -> None:
        """`decoder` may be given to share the compiled programs of another generator of the same definition."""
        self._params, self.tokenizer = cast_once(graphdef, params), tokenizer
        # One more program for a short context would take longer to compile than it saves.
        short = seq_len > 4 * SHORT_PROMPT
        self._decoder = decoder or Decoder(graphdef, seq_len, tokenizer.vocab_size, short_prompts=short)

    def compile(self, prompt: int = 1) -> None:
        """Compile what a text needs after a prompt of `prompt` tokens now, so that it does not wait for it. A text that
        is longer than the context compiles one more program. jax keeps the programs on the disk for later processes."""
        if jax.config.jax_compilation_cache_dir is None:
            # By processor: a program that was compiled for another one may end this process.
            folder = cache_dir() / "programs" / json_digest([processor(), processor_flags()])
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
            compilation_cache.reset_cache()  # jax reads its settings at the first compilation only
        self._decoder.compile(self._params, prompt)

    def pieces(
        self, prompt: str | Sequence[int], settings: Sampling, *, seed: int, number: int = 0, limit: int
    ) -> Iterator[str]:
        """The text after the prompt, one piece for each token, to the end of the text or to `limit` tokens.

        A prompt of tokens begins with the separator. `number` selects one of the texts of a seed.
        """
        text, stop = StreamDecoder(self.tokenizer), self.tokenizer.separator_id
        tokens = [stop, *self.tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
        key = purpose_key(seed, Purpose.SAMPLE, number)
        for token in self._decoder.stream(self._params, tokens, settings=settings, key=key, stop=stop, limit=limit):
            yield text.feed(token)
        yield text.finish()


def _padded(tokens: Sequence[int], length: int) -> np.ndarray:
    return np.pad(np.asarray(tokens, np.int32), (0, length - len(tokens)))[None]
