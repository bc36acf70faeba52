"""Rows of a table by index, with a gradient that has the same bits each time.

The gradient of a row of the table is the sum of the gradients of its copies. Autodiff adds them to an array of zeros at
the rows' places, a scatter-add. A CPU adds them in order. On a GPU the copies of one row would be added in no fixed
order, so the rounding would change from run to run. Devices other than CPUs therefore add in another way (`sum_by_id`):

    1. Sort the copies by id, and cut them into blocks.
    2. Number the ids of each block: 0, 1, ... For each number, sum the whole block, with zeros in place of other ids.
    3. The copies of a block's last id may go on in later blocks, where it is the first. Add those sums, too.
    4. For each row of the table, read its sum. So no array of zeros as large as the table is written first.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.model.kernels.processor import by_platform
from moe_jax.model.precision import at_least_float32
from moe_jax.model.quantized import QuantizedMatrix


def embedding_lookup(table: Float[Array, "V D"] | QuantizedMatrix, ids: Int[Array, "*N"]) -> Float[Array, "*N D"]:
    """table[ids]. All ids must be from 0 to V - 1.

    A quantised table is kept as `[D, V]`. It has no gradient, and its rows are given in float32.
    """
    return table.columns(ids) if isinstance(table, QuantizedMatrix) else _rows_of(table, ids)


@jax.custom_vjp
def _rows_of(table: Float[Array, "V D"], ids: Int[Array, "*N"]) -> Float[Array, "*N D"]:
    return table[ids]


def _forward(table: Array, ids: Array) -> tuple[Array, tuple[Array, Array]]:
    return table[ids], (table, ids)


def _backward(residuals: tuple[Array, Array], d_rows: Array) -> tuple[Array, None]:
    table, ids = residuals

    def added_in_order(ids: Array, d_rows: Array) -> Array:
        # The barrier keeps the compiler from writing the zeros at the start of the backward pass, when the activations
        # of all layers still take memory.
        d_rows, zero = jax.lax.optimization_barrier((d_rows, jnp.zeros((), table.dtype)))
        return jnp.full(table.shape, zero).at[ids].add(d_rows.astype(table.dtype))

    def sorted_first(ids: Array, d_rows: Array) -> Array:
        return sum_by_id(ids.reshape(-1), d_rows.reshape(-1, table.shape[1]), len(table)).astype(table.dtype)

    return by_platform(ids, d_rows, cpu=added_in_order, default=sorted_first), None


_rows_of.defvjp(_forward, _backward)


def sum_by_id(ids: Int[Array, " N"], rows: Float[Array, "N D"], entries: int) -> Float[Array, "V D"]:
    """For each id from 0 to `entries` - 1, the sum of its rows in at least float32, in a fixed order."""
    count, wide = len(ids), at_least_float32(rows.dtype)
    size = _block_size(count)
    if missing := -count % size:  # the last block is filled with zeros, for id 0
        ids, rows = jnp.pad(ids, (0, missing)), jnp.pad(rows, ((0, missing), (0, 0)))
    order = jnp.argsort(ids)
    ids, rows = ids[order], rows[order].astype(wide).reshape(-1, size, rows.shape[1])
    begins = jnp.concatenate([jnp.ones(1, bool), ids[1:] != ids[:-1]])
    of_block = ids.reshape(-1, size)
    number = jnp.cumsum(begins.reshape(of_block.shape).at[:, 0].set(False), axis=1)  # of each copy's id in its block

    def of(number: Array) -> Array:
        return number[:, None] == jnp.arange(size)[:, None]

    sums = jnp.where(of(number)[..., None], rows[:, None], 0).sum(2)
    block = jnp.arange(len(of_block))
    goes_on = (of_block[:, -1:] == of_block[:, 0]) & (block[:, None] < block)  # [b, c]: b's last id is c's first
    rest = jnp.where(goes_on[..., None], sums[:, 0], 0).sum(1)
    sums += jnp.where(of(number[:, -1:]), rest[:, None], 0)

    # The sum of an id lies in the block where its copies begin.
    place = (block[:, None] * size + number).reshape(-1)
    of_entry = jnp.full(entries, -1).at[jnp.where(begins, ids, entries)].set(place, mode="drop", unique_indices=True)
    return jnp.where(of_entry[:, None] >= 0, sums.reshape(-1, rows.shape[-1])[of_entry], 0)


def _block_size(count: int) -> int:
    """Copies of a block. Step 2 adds count * size rows, step 3 (count / size)^2, and most are zeros. The sum is least
    at the cube root of 2 * count."""
    return 2 ** round(math.log2(2 * count) / 3)
