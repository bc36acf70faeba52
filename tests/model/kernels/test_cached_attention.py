"""Attention to a cache, in both forms, against a loop over its tokens in NumPy."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model.kernels import cached_attention as module
from moe_jax.model.kernels.cached_attention import cached_attention


def by_hand(query: np.ndarray, key: np.ndarray, value: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """softmax(q k^T / sqrt(A)) v over the places 0 to the position of each token."""
    out = np.full(query.shape, np.nan)
    shared = query.shape[2] // key.shape[1]
    for b, n, h in np.ndindex(query.shape[:3]):
        used = positions[b, n] + 1
        if used > 0:
            scores = query[b, n, h] @ key[b, h // shared, :, :used] / math.sqrt(query.shape[-1])
            weights = np.exp(scores - scores.max())
            out[b, n, h] = weights / weights.sum() @ value[b, h // shared, :used]
    return out


def made(seed: int, batch: int, tokens: int, heads: int, key_heads: int, width: int, places: int) -> list[Any]:
    draw = np.random.default_rng(seed)
    shapes = (batch, tokens, heads, width), (batch, key_heads, width, places), (batch, key_heads, places, width)
    return [draw.normal(size=shape) for shape in shapes]


pytestmark = pytest.mark.usefixtures("float64")

SHAPES = [
    (3, 1, 4, 2, 6, 20),  # fewer places than a block, and shared key heads
    (2, 1, 2, 2, 4, 300),  # the last two blocks overlap
    (2, 1, 3, 1, 5, 9),  # no number is a multiple of four
    (1, 1, 1, 1, 8, 1),
    (2, 4, 4, 2, 6, 20),  # several tokens
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_each_token_attends_to_the_places_up_to_its_own(shape: tuple[int, ...], dtype: str) -> None:
    """Places behind it hold whatever a former text has left there."""
    tokens, places = shape[1], shape[-1]
    arrays = [jnp.asarray(x, dtype) for x in made(0, *shape)]
    exact = [np.asarray(x, np.float64) for x in arrays]
    attend = jax.jit(cached_attention)
    tolerance = {"float64": 1e-13, "float32": 1e-5, "bfloat16": 0.03}[dtype]
    for last in sorted({0, 1, 3, 4, 126, 127, 128, 171, 172, 255, 256, places - 2, places - 1}):
        if not tokens - 1 <= last < places:
            continue
        positions = np.arange(last - tokens + 1, last + 1)[None]
        found = attend(*arrays, jnp.asarray(positions))
        assert found.dtype == dtype
        expected = by_hand(*exact, np.repeat(positions, shape[0], axis=0))
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance, err_msg=str(last))


def test_each_sequence_has_a_position_of_its_own() -> None:
    """One without a token gets NaN and changes no bit of the others, nor does its cache."""
    query, key, value = made(1, 4, 1, 4, 2, 8, 150)
    positions = np.array([[140], [-1], [0], [64]])
    attend = jax.jit(cached_attention)
    found = np.asarray(attend(query, key, value, positions))
    np.testing.assert_allclose(found, by_hand(query, key, value, positions), atol=1e-13)
    key[1], value[1] = np.nan, np.nan
    again = np.asarray(attend(query, key, value, positions))
    np.testing.assert_array_equal(again, found)


def test_the_forms_agree_on_a_token_of_a_batch() -> None:
    """`_whole_cache` is what a GPU computes."""
    query, key, value = made(2, 3, 1, 6, 3, 4, 40)
    rows, positions = query.reshape(3, 3, 2, 4), np.repeat([[11], [39], [-1]], 2, axis=1)
    forms = (module._one_head_at_a_time, module._whole_cache)
    one, whole = (jax.jit(form)(rows, key, value, positions) for form in forms)
    np.testing.assert_allclose(one, whole, atol=1e-13)


def test_places_that_are_not_used_are_not_read() -> None:
    """Values are read four at a time, and a place that is read without use has the weight 0, so NaN begins later."""
    query, key, value = made(3, 1, 1, 2, 2, 4, 300)
    key[..., 128:], value[:, :, 104:] = np.nan, np.nan
    attend = jax.jit(cached_attention)
    for last in (100, 101, 103):
        positions = np.array([[last]])
        found = attend(query, key, value, positions)
        np.testing.assert_allclose(found, by_hand(query, key, value, positions), atol=1e-13)
