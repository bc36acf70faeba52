"""Each group of rows times its expert's matrix: the batched form, the reference, and NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.model.kernels.grouped_matmul import grouped_matmul
from tests.support import kernel_checks, tiny


def test_both_forms_against_loops() -> None:
    kernel_checks.check_grouped_matmul()


@functools.lru_cache
def compiled(implementation: str, indexed: bool):
    def run(rows, weights, group_expert, cotangent):
        index = group_expert if indexed else None
        y, pull = jax.vjp(lambda r, w: grouped_matmul(r, w, index, implementation), rows, weights)
        return y, *pull(cotangent)

    return jax.jit(run)


@given(
    indexed=st.booleans(),
    group_expert=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_batched_is_the_reference(indexed: bool, group_expert: list[int], seed: int) -> None:
    """Any experts for the groups: all one, none of some, in any order. An unused expert's gradient is exactly 0."""
    rng = np.random.default_rng(seed)
    operands = (
        rng.normal(size=(4, 3, 5)),
        rng.normal(size=(4, 5, 2)),
        np.array(group_expert),
        rng.normal(size=(4, 3, 2)),
    )
    with jax.enable_x64(True):
        ours, expected = (compiled(name, indexed)(*operands) for name in ("batched", "reference"))
    for one, other in zip(ours, expected, strict=True):
        assert tiny.relative_error(one, other) < 1e-14
    if indexed:
        unused = sorted({0, 1, 2, 3} - set(group_expert))
        assert (np.asarray(ours[2])[unused] == 0).all()


@pytest.mark.parametrize("implementation", ["batched", "reference"])
@pytest.mark.parametrize("group_expert", [None, [0], [0, 0]], ids=str)
def test_one_expert_for_all_groups(implementation: str, group_expert: list[int] | None) -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(1, 5, 2)).astype(np.float32)
    rows = rng.normal(size=(len(group_expert or [0]), 3, 5)).astype(np.float32)
    index = None if group_expert is None else jnp.asarray(group_expert)
    y = grouped_matmul(jnp.asarray(rows), jnp.asarray(weights), index, implementation)
    np.testing.assert_allclose(y, rows @ weights[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["batched", "reference"])
def test_the_product_has_the_dtype_of_the_rows(implementation: str) -> None:
    """bfloat16 rows, float32 weights: a bfloat16 product, and a float32 gradient for the weights."""
    rows, weights = jnp.ones((3, 2, 4), jnp.bfloat16), jnp.ones((3, 4, 2), jnp.float32)
    y, pull = jax.vjp(lambda r, w: grouped_matmul(r, w, None, implementation), rows, weights)
    d_rows, d_weights = pull(y)
    assert (y.dtype, d_rows.dtype, d_weights.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
