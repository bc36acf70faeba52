"""Speculative decoding (Leviathan et al. 2023): guess the next tokens, and verify the guesses in one pass.

The guess is a prompt lookup: the last tokens of the text are looked for earlier in the text, and what followed there is
guessed to follow again. So the draft needs no second model, and its distribution q is a point mass.

Algorithm 1 of the paper accepts a guess x with probability min(1, p(x) / q(x)) = p(x). After a rejection it draws from
max(0, p - q), normalised: that is p without x (chapter 15 of `foundation`). The same holds if y is drawn from p, x is
accepted where y = x, and y is the next token otherwise. This module does that. Token n is drawn with the same random
numbers as without speculation, so a seed gives the same text, up to the rounding of the logits.

One pass over the last token and K guesses gives the logits after each of them. The keys and values of rejected guesses
stay in the cache behind the position. They are masked there, and the next pass writes over them. The experts drop
nothing in generation (`Mode.GENERATE`), so a rejected guess takes no slot from a token of the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.inference.decode import Decoder, DecodeState, draw
from moe_jax.inference.sampling import Sampling
from moe_jax.model.transformer import Params, merge

LONGEST_MATCH = 3
"""Most tokens that are looked for. A longer match is tried first, because its continuation is more often right."""


def lookup_draft(context: Sequence[int], count: int) -> list[int]:
    """At most `count` tokens that followed the last tokens of `context` where these occurred before.

    The longest match of at most LONGEST_MATCH tokens is taken, and of equally long ones the last. Empty if the last
    token has not occurred before.
    """
    for length in range(min(LONGEST_MATCH, len(context) - 1), 0, -1):
        last = list(context[-length:])
        for start in range(len(context) - length - 1, -1, -1):
            if list(context[start : start + length]) == last:
                return list(context[start + length : start + length + count])
    return []


class Verified(NamedTuple):
    """What a pass over a token and its guesses has found."""

    state: DecodeState
    """After the token and the accepted guesses."""
    accepted: Int[Array, ""]
    """Accepted guesses; they are the first ones."""


@dataclass
class Tally:
    """What speculation has done, over all texts."""

    passes: int = 0
    """Passes of decoding. Without speculation there is one for each token."""
    guessed: int = 0
    accepted: int = 0

    def __str__(self) -> str:
        tokens = (self.passes + self.accepted) / max(self.passes, 1)
        return f"{self.accepted:,} of {self.guessed:,} guesses accepted, {tokens:.2f} tokens a pass"


class SpeculativeDecoder(Decoder):
    """A `Decoder` of one sequence that verifies `guesses` guessed tokens in each pass. Its texts are the same."""

    def __init__(self, graphdef: nnx.GraphDef, seq_len: int, vocab_size: int, guesses: int) -> None:
        super().__init__(graphdef, seq_len, vocab_size)
        self.guesses = guesses
        self.tally = Tally()
        self.verify = jax.jit(partial(verify, graphdef, vocab_size), donate_argnums=1)

    def compile(self, params: Params) -> None:
        """Compile `verify` now, so that the first text does not wait for it. The tally starts anew."""
        tokens = np.zeros((1, 1 + self.guesses), np.int32)
        state = self._start(params, [0], ())
        self.verify(params, state, tokens, np.int32(0), Sampling(), jax.random.key(0), np.int32(0))
        self.tally = Tally()

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
        """The same: one token, and the guesses that were accepted behind it. If `most` cuts
        guesses off, the state holds them too: the text ends there, and the state is not used again."""
        token = int(self.draw(state.logits, settings, state.seen, jax.random.fold_in(key, number))[0])
        if token == stop:
            return state, [token]
        self.tally.passes += 1
        draft = lookup_draft([*context, token], self.guesses)
        if not draft or len(context) + 1 + self.guesses > self.seq_len:  # no place for all keys and values
            return self.advance(params, state, np.array([token], np.int32)), [token]
        tokens = np.array([[token, *draft, *[0] * (self.guesses - len(draft))]], np.int32)
        state, accepted = self.verify(params, state, tokens, np.int32(len(draft)), settings, key, np.int32(number + 1))
        self.tally.guessed += len(draft)
        self.tally.accepted += int(accepted)
        return state, [token, *draft[: int(accepted)]][:most]


def verify(
    graphdef: nnx.GraphDef,
    vocab_size: int,
    params: Params,
    state: DecodeState,
    tokens: Int[Array, "1 N"],
    count: Int[Array, ""],
    settings: Sampling,
    key: Key[Array, ""],
    number: Int[Array, ""],
) -> Verified:
    """Append a token and its accepted guesses. `tokens` are the token, `count` guesses and padding; the first guess
    would be token `number` of the text."""
    model = merge(graphdef, params)
    hidden, _, cache = model.extend(tokens, state.cache, state.position)
    logits = model.logits(hidden[0])
    seen = state.seen | _one_hot(tokens[:, 0], logits)

    def is_accepted(carry: tuple[Array, Array]) -> Bool[Array, ""]:
        accepted, seen = carry
        drawn = draw(vocab_size, logits[accepted][None], settings, seen, jax.random.fold_in(key, number + accepted))
        return (accepted < count) & (drawn[0] == tokens[0, accepted + 1])

    def accept(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        accepted, seen = carry
        return accepted + 1, seen | _one_hot(tokens[:, accepted + 1], logits)

    accepted, seen = jax.lax.while_loop(is_accepted, accept, (jnp.int32(0), seen))
    return Verified(DecodeState(logits[accepted][None], cache, state.position + 1 + accepted, seen), accepted)


def _one_hot(token: Int[Array, "1"], logits: Float[Array, "N V"]) -> Bool[Array, "1 V"]:
    return jax.nn.one_hot(token, logits.shape[-1], dtype=bool)
