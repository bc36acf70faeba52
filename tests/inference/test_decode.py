"""The decoder: greedy texts against uncached passes, several texts at once that are each the text they are alone to the
last bit, one compiled program each, and no copy of the cache."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.inference import decode
from moe_jax.inference.decode import NOTHING_GIVEN, TOKENS_AT_ONCE, Decoder, cast_once
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.slots import Slots, advance, draw, prefill
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import merge
from moe_jax.system.random_keys import Purpose, purpose_key
from tests.support import short_form, tiny

GREEDY = Sampling(temperature=0.0)
NEVER = -1


@functools.lru_cache
def decoder(slots: int = 1) -> Decoder:
    """Its programs are compiled once for all tests of a process."""
    return Decoder(tiny.build(tiny.config())[0], tiny.T, tiny.V, slots)


def parameters():
    return tiny.build(tiny.config())[1]


@functools.lru_cache
def whole_pass():
    """(tokens [1, T]) -> logits [T, V] and decisions, uncached."""
    graphdef, params = tiny.build(tiny.config())

    @jax.jit
    def run(tokens):
        model = merge(graphdef, params)
        hidden, stats, _ = model(tokens, Mode.GENERATE, trace=True)
        return model.logits(hidden)[0], stats.trace

    return run


def padded(tokens: list[int]) -> np.ndarray:
    return np.array([[*tokens, *[0] * (tiny.T - len(tokens))]], np.int32)


def stream(prompt: list[int], seed: int = 0, **options) -> list[int]:
    options = {"settings": Sampling(temperature=1.0), "stop": NEVER, "limit": 6, "key": jax.random.key(seed)} | options
    return list(decoder().stream(parameters(), prompt, **options))


# One text


def greedy_by_hand(prompt: list[int], limit: int, penalty: float = 1.0) -> list[int]:
    """Run everything anew for each token, without cache; a full context goes on with its later half."""
    context, out = list(prompt)[-tiny.T :], []
    for _ in range(limit):
        logits = whole_pass()(padded(context))[0][len(context) - 1]
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
    penalised = Sampling(temperature=0.0, repetition_penalty=1.5)  # it covers prompt and new tokens
    text = stream(tiny.tokens(10, seed=3).tolist(), settings=penalised, limit=16)
    by_hand = functools.partial(greedy_by_hand, tiny.tokens(10, seed=3).tolist(), 16)
    assert text == by_hand(penalty=1.5) != by_hand()


def test_a_seed_gives_one_text_whatever_the_limit_and_ends_before_the_stop_token() -> None:
    longest = stream([1, 2], limit=20)
    assert (len(longest), stream([1, 2], limit=20, seed=1) == longest) == (20, False)
    assert [stream([1, 2], limit=limit) for limit in (1, 5, 20)] == [longest[:1], longest[:5], longest]
    stop = longest[7]
    assert stream([1, 2], limit=20, stop=stop) == longest[: longest.index(stop)]


def test_the_penalty_does_not_hold_off_the_end_of_a_text() -> None:
    """The separator that a prompt begins with is also the end: unlike other tokens of the prompt it is not seen."""
    seen = []
    alone = Decoder(tiny.build(tiny.config())[0], tiny.T, tiny.V)
    write = alone.write
    alone.write = lambda *arguments: seen.append(np.flatnonzero(arguments[1].seen[0]).tolist()) or write(*arguments)
    settings = Sampling(temperature=0.0, repetition_penalty=1.5)
    list(alone.stream(parameters(), [3, 5, 6], settings=settings, key=jax.random.key(0), stop=3, limit=1))
    assert seen == [[5, 6]]


def test_a_call_writes_as_many_tokens_as_it_is_asked_for_and_none_after_the_stop() -> None:
    """Drawn and appended one by one, with the random numbers of their places in the text."""
    graphdef, params = tiny.build(tiny.config())
    settings, key = Sampling(temperature=1.0, repetition_penalty=1.2), jax.random.key(2)
    state, seen, expected = decoder().read(params, [1]), jnp.zeros((1, tiny.V), bool), []
    append = jax.jit(functools.partial(advance, graphdef))
    for n in range(TOKENS_AT_ONCE):
        token = draw(tiny.V, state.logits, settings, seen, jax.random.fold_in(key, n))
        expected.append(int(token[0]))
        state, seen = append(params, state, token), seen.at[0, expected[-1]].set(True)

    def written(most: int, stop: int) -> tuple[list[int], int]:
        text = decoder().start(params, [1], (), settings, key)
        slots, tokens, length = decoder().write(params, text, NOTHING_GIVEN, np.int32(most), np.int32(stop))
        return tokens[: int(length)].tolist(), int(slots.position[0])

    assert [written(most, NEVER) for most in (1, 3, 8)] == [(expected[:most], 1 + most) for most in (1, 3, 8)]
    end = next(n for n in range(2, 8) if expected[n] not in expected[:n])
    assert written(8, expected[end]) == (expected[: end + 1], 2 + end)


def test_given_tokens_are_read_as_prefill_reads_them() -> None:
    """They are no draws: random numbers, penalty and end are those of the tokens behind them. Token 2 would end it."""
    settings, key, prompt = Sampling(temperature=1.0, repetition_penalty=1.2), jax.random.key(2), [1, 2, 3]
    first = np.concatenate([prompt, NOTHING_GIVEN[3:]], dtype=np.int32)
    empty = decoder().begin_empty(parameters(), np.zeros(tiny.V, bool), settings, key)
    a = decoder().write(parameters(), empty, first, np.int32(7), np.int32(2))
    read = decoder().start(parameters(), prompt, (), settings, key)
    b = decoder().write(parameters(), read, NOTHING_GIVEN, np.int32(4), np.int32(2))
    assert a.tokens[: int(a.length)].tolist() == [*prompt, *b.tokens[: int(b.length)].tolist()]
    assert int(a.length) > 4, "more than one draw is compared"
    for one, other in zip(
        (a.slots.position, a.slots.drawn, a.slots.seen), (b.slots.position, b.slots.drawn, b.slots.seen), strict=True
    ):
        assert np.array_equal(one, other)
    np.testing.assert_allclose(a.slots.logits, b.slots.logits, atol=1e-5)


def test_one_program_each_for_any_prompt_and_settings() -> None:
    """All decoders share the programs without a model: what counts is that a second text compiles nothing."""
    alone, sizes = Decoder(tiny.build(tiny.config())[0], tiny.T, tiny.V), []
    whole = tiny.tokens(tiny.T).tolist()
    for prompt, settings in ((whole, GREEDY), ([1, 2, 3], Sampling(temperature=0)), (whole[:11], GREEDY)):
        list(alone.stream(parameters(), prompt, settings=settings, key=jax.random.key(0), stop=NEVER, limit=12))
        sizes.append([p._cache_size() for p in (alone.prefill, alone.begin_empty, alone.write, alone.refill)])  # pyright: ignore
    assert sizes[1] == sizes[2] == [1, 1, 1, sizes[0][3]], sizes
    assert (sizes[0][0], sizes[0][2]) == (1, 1), "those that hold the model"


def test_tokens_of_a_padded_vocabulary_are_never_drawn_nor_counted() -> None:
    graphdef, params = tiny.build(tiny.config(layers=1))
    uniform, small = Sampling(temperature=50.0), Decoder(graphdef, tiny.T, 4)
    tokens = list(small.stream(params, [1], settings=uniform, key=jax.random.key(0), stop=NEVER, limit=60))
    assert set(tokens) == set(range(4))
    state = small.place(small.empty(params), 0, small.read(params, [1]), [1], uniform, jax.random.key(0), True)
    _, drawn = small.step(params, state, np.array([True]))
    assert np.isclose(np.exp(drawn.likeliest_logprob[0]).sum(), 1, atol=1e-5), "the four probabilities sum to 1"


def test_matrices_that_are_cast_once_give_the_same_bits() -> None:
    """Every matrix of a block but the router, and the head. Tables and vectors keep their 32 bits."""
    graphdef, params = tiny.build(tiny.config(layers=1, tied_head=False), compute="bfloat16")
    narrow = cast_once(graphdef, params)
    leaves = {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in jax.tree.leaves_with_path(narrow)}
    wide = {name for name, x in leaves.items() if x.ndim >= 2 and x.dtype == jnp.float32}
    assert wide == {"embedding", "position", "blocks.0.ffn.router"} & set(leaves)
    assert {x.dtype for x in leaves.values() if x.ndim < 2} == {jnp.dtype("float32")}
    read, append = (jax.jit(functools.partial(f, graphdef)) for f in (prefill, advance))
    prompt, length = tiny.tokens(tiny.T, seed=1)[None], np.int32(5)
    for token in (3, 7):
        after = [append(p, read(p, prompt, length), np.array([token], np.int32)) for p in (params, narrow)]
        jax.tree.map(np.testing.assert_array_equal, *after)
    whole, same = tiny.build(tiny.config())
    assert all(a is b for a, b in zip(jax.tree.leaves(cast_once(whole, same)), jax.tree.leaves(same), strict=True))


# Several texts at once


class Text(NamedTuple):
    """A text to write: prompt, settings, seed and number."""

    prompt: list[int]
    settings: Sampling
    seed: int
    number: int = 0

    @property
    def key(self):
        return purpose_key(self.seed, Purpose.SAMPLE, self.number)


TEXTS = (
    Text([3], GREEDY, 0),
    Text([1, 2, 3, 4], Sampling(temperature=1.0), 5, 2),
    Text(tiny.tokens(tiny.T, seed=1).tolist(), Sampling(temperature=0.7, top_k=3), 7),
    Text([5, 5, 6], Sampling(temperature=1.3, top_p=0.7, repetition_penalty=1.5), 9, 1),
    Text([9, 8], Sampling(temperature=2.0, min_p=0.2), 2**31 - 1),
)


class Writer:
    """Slots, and the texts in them so far."""

    def __init__(self, slots: int) -> None:
        self.decoder, self.params = decoder(slots), parameters()
        self.state: Slots = self.decoder.empty(self.params)
        self.texts: dict[int, list[int]] = {}
        self.contexts: dict[int, list[int]] = {}

    def place(self, slot: int, text: Text, detailed: bool = False) -> None:
        read = self.decoder.read(self.params, text.prompt)
        self.state = self.decoder.place(self.state, slot, read, text.prompt, text.settings, text.key, detailed)
        self.texts[slot], self.contexts[slot] = [], list(text.prompt)

    def step(self):
        """One token for every text. A full context goes on with its later half."""
        active = np.isin(np.arange(self.decoder.slots), list(self.texts))
        self.state, drawn = self.decoder.step(self.params, self.state, active)
        for slot, text in self.texts.items():
            text.append(int(drawn.token[slot]))
            self.contexts[slot].append(text[-1])
            if len(self.contexts[slot]) > tiny.T:
                self.contexts[slot] = self.contexts[slot][-(tiny.T // 2) :]
                read = self.decoder.read(self.params, self.contexts[slot])
                self.state = self.decoder.refill(self.state, slot, read)
        return drawn

    def leave(self, slot: int) -> list[int]:
        """The text in a slot, which is free after this."""
        return self.texts.pop(slot)


def test_slots_are_changed_in_place() -> None:
    """A large cache exists once: the slots before a call are gone after it."""
    writer = Writer(2)

    def changed(change) -> bool:
        before = writer.state
        change()
        return all(leaf.is_deleted() for leaf in jax.tree.leaves(before.cache))

    def refill() -> None:
        writer.state = writer.decoder.refill(writer.state, 0, writer.decoder.read(writer.params, [1, 2]))

    assert changed(lambda: writer.place(0, TEXTS[0]))
    assert changed(refill)
    assert changed(writer.step)


def test_a_short_prompt_is_read_by_a_shorter_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is the same, and so is the cache: its further places are those of no token."""
    monkeypatch.setattr(decode, "SHORT_PROMPT", 4)
    graphdef, params = tiny.build(tiny.config())
    short_too = Decoder(graphdef, tiny.T, tiny.V, 2, short_prompts=True)
    assert (decoder(2).prompt_lengths, short_too.prompt_lengths) == ([tiny.T], [4, tiny.T])
    for prompt in ([3], [1, 2, 3, 4], [1, 2, 3, 4, 5]):
        short, long = short_too.read(params, prompt), decoder(2).read(params, prompt)
        np.testing.assert_allclose(short.logits, long.logits, atol=1e-5)
        assert short.position == len(prompt)
        for a, b in zip(short.cache, long.cache, strict=True):
            assert (a.key.shape, a.value.shape) == (b.key.shape, b.value.shape)
            np.testing.assert_allclose(a.key[..., : len(prompt)], b.key[..., : len(prompt)], atol=1e-5)
            np.testing.assert_allclose(a.value[:, :, : len(prompt)], b.value[:, :, : len(prompt)], atol=1e-5)


@pytest.mark.parametrize("slots", short_form([2, 3], [3]))
def test_a_text_has_the_same_bits_in_every_slot_and_beside_any_texts(slots: int) -> None:
    """Two slots have as many pairs as there are experts, so each pair reads its own expert. Three have more, so the
    pairs of an expert are rows of one block."""
    results = []
    for slot in range(slots):
        for others in (0, 1, slots - 1):
            writer = Writer(slots)
            free = [n for n in range(slots) if n != slot]
            for n, text in zip(free[:others], TEXTS[2:], strict=False):
                writer.place(n, text)
                writer.step()
            writer.place(slot, TEXTS[1])
            bits = []
            for _ in range(6):  # past the context, too
                bits.append(np.asarray(writer.state.logits[slot]).tobytes())
                writer.step()
            results.append((bits, writer.texts[slot]))
    assert all(one == results[0] for one in results)


def test_probabilities_and_experts_are_those_of_a_whole_pass() -> None:
    writer = Writer(3)
    writer.place(0, TEXTS[0])
    writer.place(1, TEXTS[1], detailed=True)
    drawn = [writer.step() for _ in range(3)]
    tokens = [*TEXTS[1].prompt, *writer.texts[1]]
    logits, trace = jax.tree.map(np.asarray, whole_pass()(padded(tokens)))
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for n, one in enumerate(drawn):
        place = len(TEXTS[1].prompt) + n
        before = logprobs[place - 1]
        np.testing.assert_allclose(one.logprob[1], before[tokens[place]], atol=1e-4)
        assert one.likeliest[1].tolist() == np.argsort(-before)[:5].tolist()
        np.testing.assert_allclose(one.likeliest_logprob[1], np.sort(before)[::-1][:5], atol=1e-4)
        assert np.array_equal(one.expert[:, 1], trace.expert_index[:, 0, place])
        np.testing.assert_allclose(one.gate[:, 1], trace.gate[:, 0, place], atol=1e-4)
        assert one.logprob[0] == 0, "nothing is computed for a text that does not ask for it"
    read = writer.decoder.look(writer.params, tokens)
    for place in range(1, len(tokens)):
        np.testing.assert_allclose(read.logprob[place], logprobs[place - 1, tokens[place]], atol=1e-4)
        assert read.likeliest[place].tolist() == np.argsort(-logprobs[place - 1])[:5].tolist()
        assert np.array_equal(read.expert[:, place], trace.expert_index[:, 0, place])  # pyright: ignore
    assert read.logprob[0] == 0


def test_one_program_each_whatever_the_texts_ask_for() -> None:
    """With parameters that were put on a device, as those of a run are."""
    graphdef, params = tiny.build(tiny.config(layers=1))
    params = jax.device_put(params, jax.devices()[0])
    three = Decoder(graphdef, tiny.T, tiny.V, 3)
    state, sizes = three.empty(params), []
    for slot, text in enumerate(TEXTS[:3]):
        read = three.read(params, text.prompt)
        state = three.place(state, slot, read, text.prompt, text.settings, text.key, slot == 1)
        state, _ = three.step(params, state, np.arange(3) <= slot)
        state = three.refill(state, slot, read)
        sizes.append([p._cache_size() for p in (three.prefill, three._place, three.refill, three.step)])  # pyright: ignore
    assert sizes[0] == sizes[1] == sizes[2]


def test_no_token_copies_the_cache() -> None:
    """Its new places are written where the cache lies: the compiled programs have no copy of an array of its shape."""
    params, three = parameters(), decoder(3)
    text, state = decoder().start(params, [1], (), GREEDY, jax.random.key(0)), three.empty(params)
    programs = [
        (text, decoder().write.lower(params, text, NOTHING_GIVEN, np.int32(3), np.int32(NEVER))),
        (state, three.step.lower(params, state, np.ones(3, bool))),
    ]
    for slots, program in programs:
        hlo = program.compile().as_text()
        for array in slots.cache[0]:
            shape = ",".join(str(n) for n in array.shape)
            assert re.search(rf"f32\[{shape}\]\S* (parameter|fusion)\(", hlo), "the cache is not in the program at all"
            assert not re.findall(rf"f32\[{shape}\]\S* copy\(", hlo)


def test_a_slot_without_a_text_computes_nothing_that_a_text_reads() -> None:
    """Its logits are NaN, although an old text is in its cache. The other text has the same bits as before."""
    expected, writer = Writer(2), Writer(2)
    for one in (expected, writer):
        one.place(0, TEXTS[0])
    writer.place(1, TEXTS[1])
    writer.step()
    writer.leave(1)
    writer.step()
    for _ in range(2):
        expected.step()
    assert np.isnan(writer.state.logits[1]).all()
    np.testing.assert_array_equal(writer.state.logits[0], expected.state.logits[0])
    writer.place(1, TEXTS[1])
    assert np.isfinite(writer.state.logits[1]).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(writer.state.cache))
