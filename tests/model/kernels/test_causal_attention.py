"""Causal attention: each form equals all scores at once, forward and backward; and the choice of cuDNN's form.

Only the last test runs cuDNN, which needs a card. `-m plan` compiles training steps that call it.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from moe_jax.config import ExecutionConfig
from moe_jax.config.presets import preset
from moe_jax.model.kernels import (
    LONGEST_KEPT,
    QUERY_BLOCK,
    SPANS,
    computed_scores,
    kept_scores,
    library_attention,
    query_blocks,
    query_spans,
)
from moe_jax.model.kernels.causal_attention import causal_attention
from moe_jax.model.kernels.library_attention import AttentionForm, choose_attention, failure
from moe_jax.model.kernels.processor import split_heads
from moe_jax.model.precision import Card
from tests.support import plain_kernels


def test_spans_are_whole_blocks_and_cover_every_query() -> None:
    for length in (1, 128, 1024, 1025, 5000, 8192, 2**20):
        spans = query_spans(length)
        assert [s for s, _ in spans] == [0, *(e for _, e in spans[:-1])]
        assert spans[-1][1] == length
        assert len(spans) <= SPANS
        assert all(first % QUERY_BLOCK == 0 for first, _ in spans)


def test_scores_that_are_computed_and_kept_by_hand() -> None:
    """200 positions: 128 queries of 128 keys, and 72 of 200. 1,025 are longer than those whose weights are kept: two
    blocks of 128 are a span, so four spans end at 256, 512, 768, 1,024, and a last block is filled up with 127 rows."""
    assert (computed_scores(200), kept_scores(200)) == (128 * 128 + 72 * 200, 20_000)
    assert kept_scores(LONGEST_KEPT) == 512 * 1024
    assert computed_scores(1024) == sum(128 * 128 * n for n in range(1, 9))
    assert computed_scores(1025) == 256 * (256 + 512 + 768 + 1024) + 128 * 1025
    assert kept_scores(1025) == 128 * 1025
    assert query_blocks(257) == [(0, 128), (128, 256), (256, 257)]


def test_long_sequences_keep_no_weights() -> None:
    """The compiled program's memory for as many tokens in sequences four times as long. Kept weights would take four
    times as much; here a block's scores do, of which the compiler may hold one more."""

    def temporary(batch: int, length: int) -> int:
        shape = jax.ShapeDtypeStruct((batch, 2, length, 16), jnp.float32)
        loss = jax.grad(lambda q, k, v: causal_attention(q, k, v).sum(), argnums=(0, 1, 2))
        analysis = jax.jit(loss).lower(shape, shape, shape).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    one_block = 2 * 128 * 8192 * 4
    assert temporary(1, 8192) <= temporary(4, 2048) + one_block


def test_narrow_operands_give_narrow_results() -> None:
    """In bfloat16 all forms have bfloat16 outputs and gradients, near the float32 ones (8 bits: 2^-8 a rounding)."""
    rng = np.random.default_rng(1)
    wide = [jnp.asarray(rng.normal(size=(1, 2, 140, 8)), jnp.float32) for _ in range(4)]

    @partial(jax.jit, static_argnums=0)
    def run(attend, *args):
        out, pull = jax.vjp(attend, *args[:3])
        return out, *pull(args[3])

    exact = run(plain_kernels.causal_attention, *wide)
    for attend in (causal_attention, partial(causal_attention, implementation="recomputed")):
        for one, other in zip(run(attend, *(x.astype(jnp.bfloat16) for x in wide)), exact, strict=True):
            assert one.dtype == jnp.bfloat16
            error = np.linalg.norm(np.asarray(one, np.float32) - other) / np.linalg.norm(other)
            assert error < 6 * 2**-8


@pytest.mark.parametrize("key_heads", [2, 4])
def test_the_gradient_of_the_heads_is_their_concatenation(key_heads: int) -> None:
    """As numbers, and in the program, where padded arrays would be slow on a CPU."""
    heads = 4 + 2 * key_heads
    qkv = jnp.arange(2 * 3 * heads * 5, dtype=jnp.float32).reshape(2, 3, heads, 5)
    parts, pull = jax.vjp(lambda qkv: split_heads(qkv, 4), qkv)
    assert [part.shape[2] for part in parts] == [4, key_heads, key_heads]
    np.testing.assert_array_equal(jnp.concatenate(parts, axis=2), qkv)
    np.testing.assert_array_equal(pull(parts)[0], qkv)
    assert "stablehlo.pad" not in jax.jit(pull).lower(parts).as_text()


# The choice between cuDNN's attention and this project's own form


AMPERE = Card("gpu", "NVIDIA GeForce RTX 3050 Laptop GPU", 8.6)
TURING = Card("gpu", "NVIDIA GeForce RTX 2060", 7.5)


def choice(card: Card = AMPERE, compute: str = "bfloat16", here: bool = False, devices: int = 1, **changed: Any):
    """The form for a small model without dropout; `changed` are fields of the model, or `deterministic`."""
    execution = ExecutionConfig(deterministic=changed.pop("deterministic", False))
    model = dataclasses.replace(preset("story-4gb").model, **changed)
    return choose_attention(model, execution, compute, card, here, 2, devices)


def test_cudnn_is_taken_on_a_described_card_that_can_run_it() -> None:
    assert choice().implementation == "cudnn"
    assert choice(compute="float16").implementation == "cudnn"
    assert choice(card=dataclasses.replace(AMPERE, capability=8.0), head_size=128).implementation == "cudnn"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"card": TURING}, "compute capability 8.0"),
        ({"card": dataclasses.replace(AMPERE, capability=7.9)}, "compute capability 8.0"),
        ({"compute": "float32"}, "bfloat16 or float16"),
        ({"attention_dropout": 0.1}, "no dropout"),
        ({"head_size": 12}, "multiple of 8"),
        ({"head_size": 136}, "up to 128"),
        ({"deterministic": True}, "--deterministic"),
        ({"devices": 2}, "one device only"),
    ],
)
def test_the_own_form_stays_for_a_reason_that_is_said(changed: dict[str, Any], said: str) -> None:
    form = choice(**changed)
    assert form.implementation is None
    assert said in form.reason


def test_there_is_nothing_to_choose_on_other_devices() -> None:
    for card in (Card("cpu", "cpu", None), Card("tpu", "TPU v5 lite", None)):
        assert choice(card, here=True) == AttentionForm(None, "")


def test_a_card_where_the_library_fails_keeps_the_own_form() -> None:
    """This machine has no card, so jax's function fails, as it does on a card without the library."""
    failure.cache_clear()
    form = choice(here=True)
    assert form.implementation is None
    assert "cuDNN's fails here (" in form.reason


def rounded_once(*operands: Array) -> Array:
    """A library that stands for cuDNN's: it computes in float32."""
    return causal_attention(*(x.astype(jnp.float32) for x in operands)).astype(operands[0].dtype)


def test_a_card_where_the_library_works_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def working(*operands: Array, implementation: str | None) -> Array:
        return rounded_once(*operands) if implementation == "cudnn" else causal_attention(*operands)

    monkeypatch.setattr(library_attention, "causal_attention", working)
    failure.cache_clear()
    assert choice(here=True, seq_len=64).implementation == "cudnn"
    failure.cache_clear()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda query, key, value: (query, key, 1.05 * value), "the output"),
        (lambda query, key, value: (query, jax.lax.stop_gradient(key), value), "the gradient of the key"),
        (lambda query, key, value: (query, key, jnp.nan * value), "the output is off by nan"),
    ],
)
def test_a_card_where_the_library_computes_wrong_numbers_keeps_the_own_form(
    wrong: Callable[..., Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(*operands: Array, implementation: str | None) -> Array:
        return rounded_once(*wrong(*operands)) if implementation == "cudnn" else causal_attention(*operands)

    monkeypatch.setattr(library_attention, "causal_attention", planted)
    failure.cache_clear()
    form = choice(here=True, seq_len=64)
    failure.cache_clear()
    assert form.implementation is None
    assert f"wrong numbers: {said}" in form.reason


def test_dropout_is_refused_instead_of_left_out() -> None:
    query, key, value = (jnp.zeros((1, 2, 8, 8), jnp.bfloat16) for _ in range(3))
    keys = jax.random.split(jax.random.key(0), 1)
    with pytest.raises(ValueError, match=r"dropout 0\.1: cuDNN's attention has none"):
        causal_attention(query, key, value, 0.1, keys, implementation="cudnn")


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA card, and cuDNN: extra cuda12")
@pytest.mark.parametrize("shape", [(2, 8, 8, 256, 64), (2, 8, 2, 200, 128), (2, 4, 1, 64, 16)])
def test_cudnn_is_as_exact_as_the_own_form(shape: tuple[int, int, int, int, int]) -> None:
    assert failure(shape, "bfloat16") == ""
