"""Sums of rows against NumPy, for any number of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model.kernels.row_sum import part_at, row_at, row_sum


@pytest.mark.parametrize("rows", [1, 2, 7, 12, 48])
def test_each_row_is_added_once(rows: int) -> None:
    """The term of row i is 1 at place i and 0 elsewhere, so that the sum counts how often each row was added."""
    total = jnp.asarray(np.random.default_rng(0).integers(0, 9, (2, rows)), jnp.float32)
    found = jax.jit(lambda total: row_sum(lambda i: jax.nn.one_hot(i, rows), rows, total))(total)
    np.testing.assert_array_equal(found, total + 1)


def test_a_row_of_an_index(float64: None) -> None:
    """With indices of both types, as loops and routers have them."""
    matrix = np.arange(24.0, dtype=np.float32).reshape(2, 3, 4)
    at = jax.jit(lambda matrix, expert, i: row_at(matrix, expert, i))
    for expert in range(2):
        for i in range(3):
            np.testing.assert_array_equal(at(matrix, jnp.int32(expert), i), matrix[expert, i])
    np.testing.assert_array_equal(row_at(jnp.asarray(matrix), jnp.int32(1)), matrix[1])
    part = jax.jit(lambda matrix, i: part_at(matrix, jnp.int32(1), i, jnp.int32(2), sizes=(2,)))
    np.testing.assert_array_equal(part(matrix, 1), matrix[1, 1, 2:])
