"""Embeddings of n-grams: a token's row is summed with rows of it and the tokens before it, together.

What follows a token mostly depends on the last few, and a table says so without any arithmetic: a lookup costs one row
of reading, however many rows there are. There are more n-grams than rows, so each is sent to a row by a hash of its ids
(Huang et al. 2025, "Over-Tokenized Transformer", section 3.2, where ids are taken modulo the rows); those that meet in
one row share it, and the rest of the model has to tell them apart.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from moe_jax.model.layers import look_up


class NgramEmbedding(nnx.Module):
    """One table of `rows` for each order 2..n. Parameters: tables, n - 1 of `[rows, D]`, which start at zero."""

    def __init__(self, n: int, rows: int, vocabulary: int, width: int) -> None:
        self.vocabulary = vocabulary
        self.tables = nnx.List([nnx.Param(jnp.zeros((rows, width))) for _ in range(n - 1)])

    def __call__(self, tokens: Int[Array, "B T"], before: Int[Array, "B _"]) -> Float[Array, "B T D"]:
        """The sum over the orders, for each token; `before` are the n - 1 tokens before the first, oldest first."""
        window = jnp.concatenate([before, tokens], axis=1)
        total = jnp.zeros((), self.tables[0][...].dtype)
        for order, table in enumerate(self.tables, start=2):
            ids = [window[:, before.shape[1] - age : window.shape[1] - age] for age in range(order)]
            total = total + look_up(table[...], row_of(ids, table.shape[0]))
        return total

    def nothing_before(self, batch: int) -> Int[Array, "B n_minus_1"]:
        """The tokens before a text: an id that no token has."""
        return jnp.full((batch, len(self.tables)), self.vocabulary, jnp.int32)


def row_of(ids: list[Int[Array, "*N"]], rows: int) -> Int[Array, "*N"]:
    """The row of each n-gram, by its ids: a polynomial in an odd number modulo 2^32, then shifts and a product that
    bring high bits down, since a remainder by a power of two sees low ones only."""
    h: UInt32[Array, "*N"] = jnp.zeros(ids[0].shape, jnp.uint32)
    for i in ids:
        h = (h + i.astype(jnp.uint32) + 1) * jnp.uint32(0x9E3779B1)
    h = (h ^ (h >> 15)) * jnp.uint32(0x85EBCA6B)
    return ((h ^ (h >> 13)) % jnp.uint32(rows)).astype(jnp.int32)
