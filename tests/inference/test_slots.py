"""Several independent texts at once: each is the text that it is alone, to the last bit."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.inference import slots as slots_module
from moe_jax.inference.decode import Decoder
from moe_jax.inference.prompt_pass import make_prompt_pass
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.slots import SlotDecoder, Slots, Writing
from moe_jax.model.attention import KeyValue
from moe_jax.model.moe.layer import Mode, MoE
from moe_jax.model.transformer import merge
from moe_jax.system.random_keys import Purpose, purpose_key
from tests.support import tiny

NEVER = -1


class Text(NamedTuple):
    """A text to write: prompt, settings, seed and number."""

    prompt: list[int]
    settings: Sampling
    seed: int
    number: int = 0


TEXTS = (
    Text([3], Sampling(temperature=0.0), 0),
    Text([1, 2, 3, 4], Sampling(temperature=1.0), 5, 2),
    Text(tiny.tokens(tiny.T, seed=1).tolist(), Sampling(temperature=0.7, top_k=3), 7),
    Text([5, 5, 6], Sampling(temperature=1.3, top_p=0.7, repetition_penalty=1.5), 9, 1),
    Text([9, 8], Sampling(temperature=2.0, min_p=0.2), 2**31 - 1),
)


@functools.lru_cache
def decoders(slots: int):
    """The decoder of a number of slots, the decoder of one text, and the parameters."""
    graphdef, params = tiny.build(tiny.config())
    return SlotDecoder(graphdef, tiny.T, tiny.V, slots), Decoder(graphdef, tiny.T, tiny.V), params


def alone(text: Text, limit: int) -> list[int]:
    """The text as `generate` writes it."""
    _, decoder, params = decoders(2)
    key = purpose_key(text.seed, Purpose.SAMPLE, text.number)
    return list(decoder.stream(params, text.prompt, settings=text.settings, key=key, stop=NEVER, limit=limit))


class Writer:
    """Slots, and the texts in them so far."""

    def __init__(self, slots: int) -> None:
        self.decoder, _, self.params = decoders(slots)
        self.state: Slots = self.decoder.empty(self.params)
        self.texts: dict[int, list[int]] = {}
        self.contexts: dict[int, list[int]] = {}

    def place(self, slot: int, text: Text, detailed: bool = False) -> None:
        writing = Writing(text.settings, text.seed, text.number, detailed)
        read = self.decoder.read(self.params, text.prompt)
        self.state = self.decoder.place(self.state, slot, read, text.prompt, writing)
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
    decoder, params = writer.decoder, writer.params

    def gone(slots: Slots) -> bool:
        return all(leaf.is_deleted() for leaf in jax.tree.leaves(slots.cache))

    before = writer.state
    writer.place(0, TEXTS[0])
    assert gone(before)
    before = writer.state
    writer.state = decoder.refill(before, 0, decoder.read(params, [1, 2]))
    assert gone(before)
    before = writer.state
    writer.step()
    assert gone(before)


def test_texts_that_begin_at_different_times_are_those_of_generate() -> None:
    """Three slots, five texts, four kinds of settings, and contexts that are full at different steps."""
    writer, waiting, running, done = Writer(3), list(enumerate(TEXTS)), {}, {}
    for turn in range(60):
        for slot in range(3):
            if slot not in running and waiting and turn % 2 == slot % 2:
                running[slot], text = waiting.pop(0)
                writer.place(slot, text)
        writer.step()
        for slot, number in list(running.items()):
            if len(writer.texts[slot]) == 14 + number:
                done[number] = writer.leave(slot)
                del running[slot]
    assert done == {number: alone(text, 14 + number) for number, text in enumerate(TEXTS)}


def test_a_short_prompt_is_read_by_a_shorter_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is the same, and so is the cache: its further places are those of no token."""
    whole, _, _ = decoders(2)  # made before the short pass is shortened
    assert whole.prompt_lengths == [tiny.T]
    monkeypatch.setattr(slots_module, "SHORT_PROMPT", 4)
    graphdef, params = tiny.build(tiny.config())
    decoder = SlotDecoder(graphdef, tiny.T, tiny.V, 2)
    assert decoder.prompt_lengths == [4, tiny.T]
    for prompt in ([3], [1, 2, 3, 4], [1, 2, 3, 4, 5]):
        short, long = decoder.read(params, prompt), whole.read(params, prompt)
        np.testing.assert_allclose(short.logits, long.logits, atol=1e-5)
        assert short.position == len(prompt)
        for a, b in zip(short.cache, long.cache, strict=True):
            assert (a.key.shape, a.value.shape) == (b.key.shape, b.value.shape)
            np.testing.assert_allclose(a.key[..., : len(prompt)], b.key[..., : len(prompt)], atol=1e-5)
            np.testing.assert_allclose(a.value[:, :, : len(prompt)], b.value[:, :, : len(prompt)], atol=1e-5)


@pytest.mark.parametrize("slots", [2, 3])
def test_a_text_has_the_same_bits_in_every_slot_and_beside_any_texts(slots: int) -> None:
    """Two slots have as many pairs as there are experts, so each pair reads its own expert. Three have more, so the
    pairs of an expert are rows of one block."""
    found = []
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
            found.append((bits, writer.texts[slot]))
    assert all(one == found[0] for one in found)


def test_probabilities_and_experts_are_those_of_a_whole_pass() -> None:
    writer = Writer(3)
    writer.place(0, TEXTS[0])
    writer.place(1, TEXTS[1], detailed=True)
    drawn = [writer.step() for _ in range(3)]
    tokens = [*TEXTS[1].prompt, *writer.texts[1]]
    graphdef, params = tiny.build(tiny.config())
    padded = np.zeros((1, tiny.T), np.int32)
    padded[0, : len(tokens)] = tokens

    @jax.jit
    def whole(params, tokens):
        model = merge(graphdef, params)
        hidden, stats, _ = model(tokens, Mode.GENERATE, trace=True)
        return model.logits(hidden)[0], stats.trace

    logits, trace = jax.tree.map(np.asarray, whole(params, padded))
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for n, found in enumerate(drawn):
        place = len(TEXTS[1].prompt) + n
        before = logprobs[place - 1]
        np.testing.assert_allclose(found.logprob[1], before[tokens[place]], atol=1e-4)
        assert found.likeliest[1].tolist() == np.argsort(-before)[:5].tolist()
        np.testing.assert_allclose(found.likeliest_logprob[1], np.sort(before)[::-1][:5], atol=1e-4)
        assert np.array_equal(found.expert[:, 1], trace.expert_index[:, 0, place])
        np.testing.assert_allclose(found.gate[:, 1], trace.gate[:, 0, place], atol=1e-4)
        assert found.logprob[0] == 0, "nothing is computed for a text that does not ask for it"
    read = make_prompt_pass(graphdef, tiny.V)(params, padded)
    for place in range(1, len(tokens)):
        np.testing.assert_allclose(read.logprob[place], logprobs[place - 1, tokens[place]], atol=1e-4)
        assert read.likeliest[place].tolist() == np.argsort(-logprobs[place - 1])[:5].tolist()
        assert np.array_equal(read.expert[:, place], trace.expert_index[:, 0, place])
    assert read.logprob[0] == 0


@pytest.mark.parametrize("placed", [False, True])
def test_one_program_each_whatever_the_texts_ask_for(placed: bool) -> None:
    """Also if the parameters were put on a device, as those of a run are."""
    graphdef, params = tiny.build(tiny.config())
    params = jax.device_put(params, jax.devices()[0]) if placed else params
    decoder = SlotDecoder(graphdef, tiny.T, tiny.V, 3)
    state, sizes = decoder.empty(params), []
    for slot, text in enumerate(TEXTS[:3]):
        read = decoder.read(params, text.prompt)
        writing = Writing(text.settings, text.seed, text.number, slot == 1)
        state = decoder.place(state, slot, read, text.prompt, writing)
        state, _ = decoder.step(params, state, np.arange(3) <= slot)
        state = decoder.refill(state, slot, read)
        sizes.append([p._cache_size() for p in (decoder._prefill, decoder._place, decoder._refill, decoder.step)])
    assert sizes[0] == sizes[1] == sizes[2]


def test_no_token_copies_the_cache() -> None:
    decoder, _, params = decoders(3)
    state = decoder.empty(params)
    program = decoder.step.lower(params, state, np.ones(3, bool)).compile().as_text()
    for array in state.cache[0]:
        shape = ",".join(str(n) for n in array.shape)
        assert re.search(rf"f32\[{shape}\]\S* parameter\(", program), "the cache is not in the program at all"
        assert not re.findall(rf"f32\[{shape}\]\S* copy\(", program)


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


def test_tokens_of_a_padded_vocabulary_are_never_drawn_nor_counted() -> None:
    graphdef, params = tiny.build(tiny.config())
    decoder = SlotDecoder(graphdef, tiny.T, 4, 2)
    text = Text([1], Sampling(temperature=50.0), 0)  # about uniform
    state = decoder.place(decoder.empty(params), 0, decoder.read(params, [1]), [1], Writing(text.settings, 0, 0, True))
    tokens = []
    for _ in range(40):
        state, drawn = decoder.step(params, state, np.array([True, False]))
        tokens.append(int(drawn.token[0]))
        assert np.isclose(np.exp(drawn.likeliest_logprob[0]).sum(), 1, atol=1e-5), "the four probabilities sum to 1"
    assert set(tokens) == set(range(4))


def test_an_expert_has_room_for_a_pair_of_every_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one choice, an expert's fair share of 16 texts is a block of 8 rows. If all texts choose one expert, half of
    them would be in a further block. That is another program, so a text could have other bits in such a company."""
    config = tiny.config(top_k=1, layers=1)
    graphdef, params = tiny.build(config)
    cache = [KeyValue(jnp.zeros((16, 2, 4, tiny.T)), jnp.zeros((16, 2, tiny.T, 4)))]
    decode = jax.jit(lambda tokens: merge(graphdef, params).decode(tokens, cache, jnp.zeros(16, int), trace=True)[:2])
    modes, chosen = set(), MoE.dispatch_for
    monkeypatch.setattr(MoE, "dispatch_for", lambda self, mode, *n: modes.add(mode) or chosen(self, mode, *n))
    mixed = jnp.arange(16) % tiny.V
    for token in range(tiny.V):
        alike, stats = decode(jnp.full(16, token))
        assert len(np.unique(stats.trace.expert_index)) == 1
        assert {row.tobytes() for row in np.asarray(alike)} == {np.asarray(decode(mixed)[0])[token].tobytes()}
    assert modes == {Mode.SERVE}
    layer = merge(graphdef, params).blocks[0].ffn
    dispatch = layer.dispatch_for(Mode.SERVE, 16, 1)
    _, _, used = dispatch.plan(layer.route(jnp.ones((16, 1, 8))))
    assert used == 4, "no further block is used"
