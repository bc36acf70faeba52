"""The stream of tokens: one compiled program each for prefill and decoding, past the context, stopped, repeatable."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.inference.decode import TOKENS_AT_ONCE, Decoder, cast_once
from moe_jax.inference.sampling import Sampling
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import merge
from tests.support import tiny

GREEDY = Sampling(temperature=0.0)
NEVER = -1


@functools.lru_cache
def model():
    graphdef, params = tiny.build(tiny.config())
    return graphdef, params, Decoder(graphdef, tiny.T, tiny.V)


@functools.lru_cache
def whole_pass():
    """Logits of every position of [1, T] tokens, uncached."""
    graphdef, params, _ = model()
    m = merge(graphdef, params)
    return jax.jit(lambda tokens: m.logits(m(tokens, Mode.EVALUATE)[0])[0])


def stream(prompt: list[int], seed: int = 0, **options) -> list[int]:
    _, params, decoder = model()
    options = {"settings": Sampling(temperature=1.0), "stop": NEVER, "limit": 6} | options
    return list(decoder.stream(params, prompt, key=jax.random.key(seed), **options))


def greedy_by_hand(prompt: list[int], limit: int, penalty: float = 1.0) -> list[int]:
    """Run everything anew for each token, without cache; a full context goes on with its later half."""
    context, out = list(prompt)[-tiny.T :], []
    for _ in range(limit):
        padded = np.zeros((1, tiny.T), np.int32)
        padded[0, : len(context)] = context
        logits = whole_pass()(padded)[len(context) - 1]
        for seen in {*prompt, *out}:
            logits = logits.at[seen].set(logits[seen] / penalty if logits[seen] > 0 else logits[seen] * penalty)
        out.append(int(np.argmax(logits)))
        context.append(out[-1])
        if len(context) > tiny.T:
            context = context[-(tiny.T // 2) :]
    return out


def test_greedy_text_is_that_of_uncached_passes_also_past_the_context() -> None:
    for prompt in ([3], [1, 2, 3, 4], tiny.tokens(tiny.T, seed=1).tolist(), tiny.tokens(20, seed=2).tolist()):
        assert stream(prompt, settings=GREEDY, limit=24) == greedy_by_hand(prompt, 24)


def test_the_padding_of_a_prompt_is_not_seen() -> None:
    _, params, decoder = model()
    prompt = tiny.tokens(1, tiny.T, seed=4)
    filled = [np.where(np.arange(tiny.T) < 3, prompt, fill).astype(np.int32) for fill in (0, 7)]
    states = [decoder.prefill(params, tokens, np.int32(3)) for tokens in filled]
    np.testing.assert_allclose(states[0].logits, states[1].logits, atol=1e-5)
    np.testing.assert_allclose(states[0].logits[0], whole_pass()(prompt)[2], atol=1e-5)


def test_the_same_seed_tells_the_same_text_and_another_another() -> None:
    assert stream([1, 2]) == stream([1, 2]) != stream([1, 2], seed=1)


def test_a_longer_limit_changes_no_earlier_token() -> None:
    longest = stream([1, 2], limit=20)
    assert len(longest) == 20
    assert stream([1, 2], limit=5) == longest[:5]
    assert stream([1, 2], limit=1) == longest[:1]


def test_it_ends_before_the_stop_token() -> None:
    text = stream([1, 2], limit=20)
    stop = text[7]
    assert stream([1, 2], limit=20, stop=stop) == text[: text.index(stop)]


def test_the_penalty_covers_prompt_and_new_tokens_also_past_the_context() -> None:
    prompt = tiny.tokens(10, seed=3).tolist()
    text = stream(prompt, settings=Sampling(temperature=0.0, repetition_penalty=1.5), limit=16)
    assert text == greedy_by_hand(prompt, 16, penalty=1.5) != greedy_by_hand(prompt, 16)


def test_one_program_each() -> None:
    _, params, _ = model()
    graphdef = model()[0]
    decoder = Decoder(graphdef, tiny.T, tiny.V)
    for prompt in ([1], [1, 2, 3], tiny.tokens(11).tolist()):
        for _ in decoder.stream(params, prompt, settings=GREEDY, key=jax.random.key(0), stop=NEVER, limit=12):
            pass
    assert decoder.prefill._cache_size() == 1
    assert decoder.write._cache_size() == 1
    assert jnp.isfinite(decoder.prefill(params, np.zeros((1, tiny.T), np.int32), np.int32(1)).logits).all()


def test_no_token_copies_the_cache() -> None:
    """Its one new place is written where the cache lies: the compiled program has no copy of an array of its shape."""
    _, params, decoder = model()
    state = decoder.prefill(params, np.zeros((1, tiny.T), np.int32), np.int32(1))
    one = decoder.advance.lower(params, state, jnp.zeros(1, jnp.int32))
    several = decoder.write.lower(params, state, GREEDY, jax.random.key(0), np.int32(0), np.int32(3), np.int32(NEVER))
    shape = ",".join(str(n) for n in state.cache[0].key.shape)
    for program in (one.compile().as_text(), several.compile().as_text()):
        assert re.search(rf"f32\[{shape}\]\S* (parameter|fusion)\(", program), "the cache is not in the program at all"
        assert not re.findall(rf"f32\[{shape}\]\S* copy\(", program)


def test_the_penalty_does_not_hold_off_the_end_of_a_story() -> None:
    """The separator that a prompt begins with is also the end: unlike other tokens of the prompt it is not seen."""
    seen = []
    graphdef, params, _ = model()
    decoder = Decoder(graphdef, tiny.T, tiny.V)
    write = decoder.write
    decoder.write = lambda *given: seen.append(np.flatnonzero(given[1].seen[0]).tolist()) or write(*given)
    settings = Sampling(temperature=0.0, repetition_penalty=1.5)
    list(decoder.stream(params, [3, 5, 6], settings=settings, key=jax.random.key(0), stop=3, limit=1))
    assert seen == [[5, 6]]


def test_a_call_writes_as_many_tokens_as_it_is_asked_for_and_none_after_the_stop() -> None:
    """Drawn and appended one by one, with the random numbers of their places in the text."""
    _, params, decoder = model()
    key, begin = jax.random.key(2), lambda: decoder.prefill(params, np.ones((1, tiny.T), np.int32), np.int32(1))
    state, expected = begin(), []
    settings = Sampling(temperature=1.0, repetition_penalty=1.2)
    for n in range(5, 5 + TOKENS_AT_ONCE):
        expected.append(int(decoder.draw(state.logits, settings, state.seen, jax.random.fold_in(key, n))[0]))
        state = decoder.advance(params, state, np.array(expected[-1:], np.int32))

    def written(most: int, stop: int) -> tuple[list[int], int]:
        found = decoder.write(params, begin(), settings, key, np.int32(5), np.int32(most), np.int32(stop))
        return found.tokens[: int(found.length)].tolist(), int(found.state.position)

    assert [written(most, NEVER) for most in (1, 3, 8)] == [(expected[:most], 1 + most) for most in (1, 3, 8)]
    end = next(n for n in range(2, 8) if expected[n] not in expected[:n])
    assert written(8, expected[end]) == (expected[: end + 1], 2 + end)


def test_whole_numbers_as_settings_compile_nothing_more() -> None:
    decoder = model()[2]
    before = decoder.write._cache_size()
    assert stream([1, 2], settings=Sampling(temperature=0)) == stream([1, 2], settings=GREEDY)
    assert decoder.write._cache_size() == max(before, 1)


def test_tokens_of_a_padded_vocabulary_are_never_drawn() -> None:
    graphdef, params, _ = model()
    settings = Sampling(temperature=50.0)  # about uniform
    decoder = Decoder(graphdef, tiny.T, tiny.V - 4)
    drawn = list(decoder.stream(params, [1], settings=settings, key=jax.random.key(0), stop=NEVER, limit=100))
    assert set(drawn) == set(range(tiny.V - 4))


def test_matrices_that_are_cast_once_give_the_same_bits() -> None:
    """Every matrix of a block but the router, and the head. Tables and vectors keep their 32 bits."""
    graphdef, params = tiny.build(tiny.config(tied_head=False), compute="bfloat16")
    narrow = cast_once(graphdef, params)
    leaves = {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in jax.tree.leaves_with_path(narrow)}
    wide = {name for name, x in leaves.items() if x.ndim >= 2 and x.dtype == jnp.float32}
    assert wide == {"embedding", "position", "blocks.0.ffn.router", "blocks.1.ffn.router"} & set(leaves)
    assert {x.dtype for x in leaves.values() if x.ndim < 2} == {jnp.dtype("float32")}
    decoder = Decoder(graphdef, tiny.T, tiny.V)
    prompt, length = tiny.tokens(tiny.T, seed=1)[None], np.int32(5)
    for token in (np.array([3]), np.array([7])):
        of_both = [
            decoder.advance(p, decoder.prefill(p, prompt, length), token.astype(np.int32)) for p in (params, narrow)
        ]
        jax.tree.map(np.testing.assert_array_equal, *of_both)
    whole, same = tiny.build(tiny.config())
    assert all(a is b for a, b in zip(jax.tree.leaves(cast_once(whole, same)), jax.tree.leaves(same), strict=True))
