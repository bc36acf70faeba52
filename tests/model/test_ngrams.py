"""Embeddings of n-grams: which row each takes, and that training, prefill and decoding agree on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.inference.decode import prefill
from moe_jax.model.ngrams import row_of
from moe_jax.model.transformer import merge
from tests import checks, tiny

NGRAMS = {"ngrams": 3, "ngram_rows": 11}


def expected_row(ids: list[int], rows: int) -> int:
    """In Python's integers, the newest id first."""
    h = 0
    for i in ids:
        h = (h + i + 1) * 0x9E3779B1 % 2**32
    h = (h ^ h >> 15) * 0x85EBCA6B % 2**32
    return (h ^ h >> 13) % rows


def test_rows_against_python() -> None:
    ids = np.random.default_rng(0).integers(0, 60_000, (3, 200)).astype(np.int32)
    rows = np.asarray(row_of(list(jnp.asarray(ids)), 32_768))
    assert rows.tolist() == [expected_row(list(map(int, column)), 32_768) for column in ids.T]


def test_all_pairs_of_a_vocabulary_spread_evenly_over_a_power_of_two() -> None:
    """1,024 pairs a row on average: with independent rows the variance would be that too (1,023). Order counts."""
    first, second = jnp.meshgrid(jnp.arange(512), jnp.arange(512))
    counts = np.bincount(np.asarray(row_of([first.ravel(), second.ravel()], 256)), minlength=256)
    assert counts.sum() == 512**2
    assert counts.var() < 2 * 1024
    assert (row_of([first, second], 2**20) != row_of([second, first], 2**20)).mean() > 0.99


def test_the_embedding_is_the_sum_of_the_rows() -> None:
    graphdef, params = tiny.build(tiny.config(**NGRAMS))
    tokens = tiny.tokens(2, tiny.T)
    tables = [np.asarray(t) for t in params["ngrams"]["tables"].values()]
    model = merge(graphdef, params)
    x = np.asarray(model._embed(jnp.asarray(tokens), jnp.arange(tiny.T), model.before(jnp.asarray(tokens), 0)))
    for b in range(2):
        padded = [tiny.V, tiny.V, *map(int, tokens[b])]  # an id beyond the vocabulary stands for nothing
        for t in range(tiny.T):
            expected = np.asarray(params["embedding"])[tokens[b, t]]
            for order, table in zip((2, 3), tables, strict=True):
                ids = padded[t + 2 : t + 2 - order if t + 2 >= order else None : -1]
                expected = expected + table[expected_row(ids, 11)]
            np.testing.assert_allclose(x[b, t], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("changes", [NGRAMS, NGRAMS | {"ngrams": 2}, NGRAMS | {"ngrams": 6}], ids=str)
def test_cached_decoding(changes: dict) -> None:
    """With six, the three tokens of the prompt are fewer than the n-grams take in."""
    checks.check_cached_decoding(**changes)


def test_what_comes_before_a_padded_prompts_next_token() -> None:
    graphdef, params = tiny.build(tiny.config(**NGRAMS))
    tokens = jnp.asarray(tiny.tokens(2, tiny.T))
    for length, expected in ((1, [[tiny.V, t] for t in np.asarray(tokens)[:, 0]]), (5, np.asarray(tokens)[:, 3:5])):
        state = jax.jit(lambda t, n: prefill(graphdef, params, t, n))(tokens, np.int32(length))
        assert np.asarray(state.before).tolist() == np.asarray(expected).tolist()
