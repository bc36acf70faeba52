"""Norms in bfloat16, dropout masks, and rows of a table with their gradient. The bridge has norms and rotation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from described_gpu import Target, for_described_gpu

from moe_jax.config import ExecutionConfig, RunConfig
from moe_jax.model.kernels import embedding_lookup as lookup
from moe_jax.model.layers import Normalisation, keep_mask, with_bias
from moe_jax.training.programs import Programs
from tests.support import tiny
from tests.support.programs import scatter_adds_of_floats


def test_norm_statistics_are_float32_in_bfloat16() -> None:
    """The mean square of 2,048 ones and one 256: bfloat16 sums would stall long before, float32 ones are exact."""
    x = jnp.ones(2049, jnp.bfloat16).at[0].set(256)
    y = Normalisation("rmsnorm", 2049, False)(x[None])[0]
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(float(y[0]), 256 / np.sqrt((65536 + 2048) / 2049), rtol=2**-8)


def one_key(seed: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), 1)


def test_masks_drop_the_named_share_each_entry_by_itself() -> None:
    """90,001 entries, an odd number: a share of 0.3 is known to 0.15 %. The two halves of a word are unrelated."""
    mask = np.asarray(keep_mask(one_key(0), 0.3, (90_001,)))[0]
    assert abs(mask.mean() - 0.7) < 5 * np.sqrt(0.7 * 0.3 / 90_001)
    pairs = mask[:90_000].reshape(-1, 2)
    assert abs(pairs.all(1).mean() - 0.49) < 5 * np.sqrt(0.49 * 0.51 / 45_000)
    assert keep_mask(one_key(0), 0.999999, (90_001,)).sum() < 20
    assert keep_mask(one_key(0), 0.3, (3, 5)).shape == (1, 3, 5)
    assert (mask != np.asarray(keep_mask(one_key(1), 0.3, (90_001,)))[0]).any()


def test_a_mask_is_the_halves_of_random_words_in_order() -> None:
    """The lower 16 bits of a word decide the first entry, the upper 16 the second. A resumed run needs this order."""
    words = np.asarray(jax.random.bits(one_key(0)[0], (3,), jnp.uint32))
    halves = [half for word in words.tolist() for half in (word % 65_536, word // 65_536)]
    for rate in (0.3, 0.999999):
        least = min(round(rate * 65_536), 65_535)
        mask = keep_mask(one_key(0), rate, (5,))
        assert mask.dtype == bool
        assert mask[0].tolist() == [half >= least for half in halves[:5]]


# Rows of a table, and both forms of their gradient, against sums in float64


RNG = np.random.default_rng(3)
CASES = {
    "one copy": ([2], 4),
    "two copies": ([2, 2], 4),
    "one id, whose copies fill many blocks": ([1] * 100, 4),
    "an id that begins in the middle of a block and fills others": ([0] * 5 + [1] * 50 + [2] * 45, 3),
    "ids that end with their blocks": ([n // 8 for n in range(512)], 64),
    "each id once": (RNG.permutation(512).tolist(), 512),
    "most ids are never looked up": (RNG.choice([0, 7, 999], 200).tolist(), 1000),
    "few frequent ids, many seldom ones": (((RNG.zipf(1.3, 1000) - 1) % 300).tolist(), 300),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_sums_by_id_against_float64(case: str, dtype: str) -> None:
    """An error of at most 2^-23 of the sum of magnitudes for each of the additions in a row. Ids without a copy get
    exactly 0, and a second run gives the same bits."""
    ids, entries = CASES[case]
    rows = jnp.asarray(np.random.default_rng(4).normal(size=(len(ids), 3)), dtype)
    run = jax.jit(lookup.sum_by_id, static_argnums=2)
    found, again = run(jnp.asarray(ids), rows, entries), run(jnp.asarray(ids), rows, entries)
    tiny.assert_same_bits(found, again)
    assert found.dtype == jnp.float32
    exact, magnitude = np.zeros((2, entries, 3))
    np.add.at(exact, ids, np.asarray(rows, np.float64))
    np.add.at(magnitude, ids, np.abs(np.asarray(rows, np.float64)))
    additions = lookup._block_size(len(ids)) + len(ids) // lookup._block_size(len(ids)) + 1
    assert (np.abs(np.asarray(found, np.float64) - exact) <= additions * 2.0**-23 * magnitude).all()
    assert (np.asarray(found)[np.setdiff1d(range(entries), ids)] == 0).all()


@pytest.mark.parametrize(
    ("model", "dispatch", "gpu"),
    [
        ({"positions": "rope"}, "capacity", "rtx3050-4gb"),
        ({"positions": "learned", "tied_head": False}, "blocks", "quadro-t1000-4gb"),
    ],
    ids=str,
)
def test_a_training_step_of_a_gpu_has_no_scatter_add(model: dict, dispatch: str, gpu: str) -> None:
    """In no part of it: such sums have no fixed order there."""
    config = RunConfig(model=tiny.config(dispatch=dispatch, **model), execution=ExecutionConfig(remat=True))
    programs = Programs.of(config, Target.load(gpu))
    with for_described_gpu():
        traced = programs.step.trace(programs.state_shapes, programs.batch_shapes(2, 1))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.scatter" in text, "integers are scattered to distinct places"
    assert scatter_adds_of_floats(text) == []


def test_the_gradient_of_a_bias_in_float16_may_exceed_float16() -> None:
    """The sum over 70,000 tokens, each of which gives 1. The largest number of float16 is 65,504."""
    x, bias = jnp.zeros((70_000, 1), jnp.float16), jnp.zeros(1, jnp.float32)
    y, pull = jax.vjp(with_bias, x, bias)
    d_x, d_bias = pull(jnp.ones_like(y))
    assert (y.dtype, d_x.dtype, float(d_bias[0])) == (jnp.float16, jnp.float16, 70_000)
