"""Speculation changes no token: greedy, drawn, past the context, with drops in training, and with wrong guesses."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.inference.decode import Decoder, DecodeState, draw
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.speculative import SpeculativeDecoder, Tally, lookup_draft
from moe_jax.model.transformer import Params
from tests.support import tiny

GUESSES, T, V = 3, 16, 5


@functools.lru_cache
def decoders() -> tuple[Params, Decoder, SpeculativeDecoder]:
    """A model whose experts have slots for half of the pairs in training. Its vocabulary is small, so texts repeat."""
    config = tiny.config(layers=1, seq_len=T, vocab_size=V, capacity_factor=0.5)
    graphdef, params = tiny.build(config)
    return params, Decoder(graphdef, T, V), SpeculativeDecoder(graphdef, T, V, GUESSES)


def text(decoder: Decoder, prompt: list[int], seed: int = 0, **options: Any) -> list[int]:
    options = {"settings": Sampling(0.0), "stop": -1, "limit": 30} | options
    return list(decoder.stream(decoders()[0], prompt, key=jax.random.key(seed), **options))


@pytest.mark.parametrize(
    ("context", "draft"),
    [
        ([1, 2, 3, 9, 1, 2, 3], [9, 1]),  # three tokens match
        ([7, 1, 2, 5, 8, 2, 6, 1, 2], [5, 8]),  # of "1 2" and of "2", the longer one
        ([4, 6, 4, 7, 4], [7, 4]),  # of two equal ones the last
        ([3, 3], [3]),  # its own continuation, as far as it is known
        ([1, 2, 3], []),
        ([1], []),
    ],
)
def test_a_draft_is_what_followed_before(context: list[int], draft: list[int]) -> None:
    assert lookup_draft(context, 2) == draft


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(0.0),
        Sampling(1.0),
        Sampling(0.5, top_k=2),
        Sampling(1.0, repetition_penalty=1.5),
        Sampling(0.0, repetition_penalty=1.5),
    ],
    ids=str,
)
def test_texts_are_those_without_speculation(settings: Sampling) -> None:
    """Past the context too, which is full after 16 tokens: near its end there is no place for all guesses."""
    _, plain, speculative = decoders()
    speculative.tally = Tally()
    for prompt in ([0], [1, 2, 1, 2, 1], tiny.tokens(20, vocabulary=V).tolist()):
        for seed in range(3):
            written = text(speculative, prompt, seed, settings=settings)
            assert written == text(plain, prompt, seed, settings=settings)
    assert 0 < speculative.tally.accepted <= speculative.tally.guessed


def test_the_tally_counts_passes_and_guesses() -> None:
    """Every token is the first of a pass or an accepted guess. The last pass may accept guesses beyond the limit."""
    params, _, speculative = decoders()
    speculative.compile(params)
    assert speculative.tally == Tally()
    written = text(speculative, [1, 2, 1, 2], limit=12)
    tally = speculative.tally
    assert len(written) == 12
    assert tally.passes < 12 <= tally.passes + tally.accepted
    assert str(Tally(4, 6, 2)) == "2 of 6 guesses accepted, 1.50 tokens a pass"


def test_limit_and_stop_hold_within_accepted_guesses() -> None:
    _, plain, speculative = decoders()
    whole = text(plain, [1, 2, 1, 2])
    for limit in range(1, 12):
        assert text(speculative, [1, 2, 1, 2], limit=limit) == whole[:limit]
    for stop, seed in itertools.product(range(V), range(6)):
        options: dict[str, Any] = {"seed": seed, "stop": stop, "settings": Sampling(1.0)}
        assert text(speculative, [1, 2, 1, 2], **options) == text(plain, [1, 2, 1, 2], **options)


def copied(state: DecodeState) -> DecodeState:
    return jax.tree.map(jnp.copy, state)  # a program reuses the memory of the state that it is given


def test_every_draft_is_accepted_as_algorithm_1_says() -> None:
    """All 5^2 drafts of two guesses, with several keys. A guess is accepted where the draw without speculation is that
    guess, so each token has the probability that it has without speculation (Leviathan et al., algorithm 1). The next
    logits are those of the text without the rejected guesses."""
    params, plain, speculative = decoders()
    settings = Sampling(1.0)
    start = plain.prefill(params, np.array([[1, 2] + [0] * (T - 2)], np.int32), np.int32(2))
    token, number = 3, 7
    after: dict[tuple[int, ...], DecodeState] = {(): plain.advance(params, copied(start), jnp.array([token]))}
    for draft in itertools.product(range(V), repeat=2):
        for known in (draft[:1], draft):
            if known not in after:
                after[known] = plain.advance(params, copied(after[known[:-1]]), jnp.array(known[-1:]))
    drawn = {key: int(draw(V, after[()].logits, settings, after[()].seen, fold(key, number))[0]) for key in range(4)}
    for draft in itertools.product(range(V), repeat=2):
        for key, first in drawn.items():
            tokens = np.array([[token, *draft, 0]], np.int32)
            state, count = speculative.verify(
                params, copied(start), tokens, np.int32(2), settings, jax.random.key(key), np.int32(number)
            )
            kept = draft[: int(count)]
            assert (int(count) > 0) == (first == draft[0])
            known = after[draft[:1]]
            second = int(draw(V, known.logits, settings, known.seen, fold(key, number + 1))[0])
            assert (int(count) == 2) == (first == draft[0] and second == draft[1])
            assert int(state.position) == 3 + len(kept)
            assert tiny.relative_error(state.logits, after[kept].logits) < 1e-5
            np.testing.assert_array_equal(state.seen, after[kept].seen)


def fold(key: int, number: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(key), number)


def test_rejected_guesses_leave_no_trace() -> None:
    """The pass after a rejection gives the logits of a text that never had the guesses."""
    params, plain, speculative = decoders()
    start = plain.prefill(params, np.array([[1, 2] + [0] * (T - 2)], np.int32), np.int32(2))
    tokens = np.array([[3, 4, 4, 4]], np.int32)
    state, _ = speculative.verify(
        params, copied(start), tokens, np.int32(0), Sampling(1.0), jax.random.key(0), np.int32(1)
    )
    expected = plain.advance(params, plain.advance(params, copied(start), jnp.array([3])), jnp.array([0]))
    found = plain.advance(params, state, jnp.array([0]))
    assert tiny.relative_error(found.logits, expected.logits) < 1e-5
