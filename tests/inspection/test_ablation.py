"""Experts switched off: an oracle that deletes the expert, one program for all, stories one at a time."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import UserError
from moe_jax.inference.decode import Decoder
from moe_jax.inspection import ablation as ablations
from moe_jax.inspection.ablation import (
    Ablation,
    ablation,
    affordable,
    prompt_of,
)
from moe_jax.inspection.switches import switchable_graphdef, switched_off
from moe_jax.model.costs import count_parameters, totals
from moe_jax.model.transformer import merge
from moe_jax.runs.load import LoadedRun
from moe_jax.system.random_keys import Purpose, purpose_key
from tests.support import oracles, tiny
from tests.support.saved_run import unsaved_run

T = 16
TEXT = "a cat met a dragon and they ran home"


@functools.cache
def opened(**changes: Any) -> LoadedRun:
    return unsaved_run(tiny.config(**({"vocab_size": 257, "seq_len": T} | changes)))


def tokens(run: LoadedRun, text: str = TEXT) -> np.ndarray:
    return np.array([run.tokenizer.separator_id, *run.tokenizer.encode(text)], np.int32)


@functools.cache
def ablated() -> tuple[Ablation, int]:
    """The ablation of `opened()` and TEXT, and how many loss programs were compiled. Nine rows of switches go in
    batches of four, so the last batch is filled up."""
    steps, made = [], ablations.make_switched_losses
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablations, "make_switched_losses", lambda graphdef: steps.append(made(graphdef)) or steps[-1])
        patch.setattr(ablations, "tokens_at_once", lambda config: 4 * T)
        patch.setattr(ablations, "STORY_ROWS", 4)
        found = ablation(opened(), tokens(opened()))
    return found, sum(step._cache_size() for step in steps)


def without(array: Any, e: int | None, axis: int = 0) -> np.ndarray:
    array = np.asarray(array, np.float64)
    return array if e is None else np.delete(array, e, axis)


def layer_oracle(x: np.ndarray, ffn: dict[str, Any], e: int | None, top_k: int) -> np.ndarray:
    """A layer from whose parameters expert e is deleted, one token at a time; nothing is dropped."""
    w = {name: without(ffn["experts"][name], e) for name in ffn["experts"]}
    router, bias = without(ffn["router"], e, 1), without(ffn.get("balance_bias", np.zeros(64)), None)
    bias = without(bias[: router.shape[1] + (e is not None)], e)
    rows = []
    for token in x:
        logits = token @ router
        score = oracles.softmax(logits) + bias if "balance_bias" in ffn else logits
        chosen = oracles.choose(score, min(top_k, len(logits)))
        gates = oracles.gates(logits, chosen)
        outputs = [oracles.expert(token, w["w_in"][c], w["w_out"][c], w["w_gate"][c]) for c in chosen]
        rows.append(sum(g * y for g, y in zip(gates, outputs, strict=True)))
    return np.stack(rows)


@functools.cache
def _parts(graphdef: Any) -> tuple[Any, Any, Any]:
    """Compiled: ids -> the stream; the stream through attention of a layer, and normed for its experts; hidden states
    and the head."""

    def embedded(params: Any, ids: jax.Array) -> jax.Array:
        return merge(graphdef, params)._embed(ids, jnp.arange(ids.shape[1]))

    def attended(params: Any, n: int, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        block = merge(graphdef, params).blocks[n]
        x = x + block.attention(block.attention_norm(x))[0]
        return x, block.ffn_norm(x)

    def scored(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = merge(graphdef, params)
        return model.norm(x)[0], model.head_matrix()

    return jax.jit(embedded), jax.jit(attended, static_argnums=1), jax.jit(scored)


def parts(run: LoadedRun) -> list[Any]:
    return [functools.partial(part, run.params) for part in _parts(run.graphdef)]


def loss_oracle(run: LoadedRun, ids: np.ndarray, layer: int, e: int | None) -> list[float]:
    """Window by window, the loss of each token after the first. Only the expert layers are the oracle's own."""
    config, embedded, attended, scored = run.config.model, *parts(run)
    losses: list[float] = []
    for first in range(0, len(ids), config.seq_len):
        window = ids[first : first + config.seq_len]
        x = embedded(jnp.asarray(window)[None])
        for n in range(config.layers):
            x, normed = attended(n, x)
            off = e if n == layer else None
            ffn = run.params["blocks"][n]["ffn"]
            y = layer_oracle(np.asarray(normed[0], np.float64), ffn, off, config.routing.top_k)
            x = x + y[None].astype(np.float32)
        hidden, head = (np.asarray(part, np.float64) for part in scored(x))
        targets = ids[first + 1 : first + 1 + len(window)]
        losses += oracles.cross_entropy(hidden[: len(targets)], head, targets)
    return losses


def test_the_model_decides_as_if_the_expert_did_not_exist() -> None:
    """Held against a model from which the expert is deleted, for every expert of every layer, in three windows."""
    run, (found, programs) = opened(), ablated()
    np.testing.assert_allclose(found.loss, loss_oracle(run, tokens(run), 0, None), atol=2e-4)
    for layer, e in np.ndindex(2, 4):
        np.testing.assert_allclose(found.without[layer, e], loss_oracle(run, tokens(run), layer, e), atol=2e-4)
    np.testing.assert_array_equal(found.change, found.without - found.loss)
    assert np.abs(found.change).max(-1).min() > 0.03
    assert programs == 1


def test_stories_are_those_of_the_decoder_one_at_a_time() -> None:
    """One text after another, with the decoder and the random numbers of `generate`."""
    run, (found, _) = opened(), ablated()
    assert found.prompt == "a cat"
    prompt = [run.tokenizer.separator_id, *run.tokenizer.encode(found.prompt)]
    key, limit = purpose_key(ablations.SEED, Purpose.SAMPLE, 0), T - len(prompt)
    decoder = Decoder(switchable_graphdef(run.config, "float32"), T, run.tokenizer.vocab_size)

    def told(off: np.ndarray) -> str:
        params, stop = switched_off(run, off)["params"], run.tokenizer.separator_id
        drawn = decoder.stream(params, prompt, settings=ablations.SETTINGS, key=key, stop=stop, limit=limit)
        return run.tokenizer.decode_bytes(list(drawn)).decode(errors="replace")

    assert found.story == told(np.zeros((2, 4), bool))
    for layer, e in np.ndindex(2, 4):
        off = np.zeros((2, 4), bool)
        off[layer, e] = True
        assert found.stories[layer][e] == told(off)
    assert any(story != found.story for stories in found.stories for story in stories)


def test_the_prompt_is_whole_words_of_the_first_text() -> None:
    tokenizer = opened().tokenizer
    ids = lambda text: np.array(tokenizer.encode(text))  # noqa: E731
    separator = [tokenizer.separator_id]
    assert prompt_of(tokenizer, ids("one two three four five six seven"), 256) == "one two three four five six"
    assert prompt_of(tokenizer, np.concatenate([separator, ids("one two"), separator, ids("three")]), 256) == "one two"
    assert prompt_of(tokenizer, ids("one two three"), 20) == "one two"
    assert prompt_of(tokenizer, ids("onetwothree four"), 12) == ""
    assert prompt_of(tokenizer, np.array(separator), 12) == ""


def test_a_large_model_gets_fewer_layers_then_a_shorter_text_and_no_stories(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config(layers=9)
    assert affordable(config, 512) == ([*range(9)], 512, True)
    token = 2 * totals(count_parameters(config)).multiplied * config.experts  # forward, with each expert of a layer off
    for tokens, expected in (
        (3.5 * 640, ([0, 4, 8], 512, True)),
        (639, ([0], 512, False)),
        (511, ([0], 511, False)),
        (1, ([0], 64, False)),
    ):
        monkeypatch.setattr(ablations, "MOST_FLOPS", tokens * token * 1.0001)
        assert affordable(config, 512) == expected


def test_what_cannot_be_ablated_says_why() -> None:
    with pytest.raises(UserError, match="one expert each"):
        ablation(opened(experts=1, top_k=1), tokens(opened()))
    with pytest.raises(UserError, match="no token that could be predicted"):
        ablation(opened(), tokens(opened(), ""))
