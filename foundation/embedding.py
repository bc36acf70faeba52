"""Token embedding: a lookup forward, a scatter-add backward; and the head that may share its table. Chapters 6 and 7.

A lookup is the matrix product onehot(token) W, so d_W = onehot^T d_x adds every position's gradient to the row that it
read. A tied head uses the table once more, logits = x W^T, and the two gradients of the table are added.

Source: Press and Wolf 2017, equations 1 to 3 (how the two uses update a tied table).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def embedding_forward(table: Float[Array, "V D"], tokens: Int[Array, "*rows"]) -> tuple[Float[Array, "*rows D"], tuple]:
    """x = table[tokens]."""
    return table[tokens], (tokens, table.shape[0])


def embedding_backward(d_x: Float[Array, "*rows D"], cache: tuple) -> Float[Array, "V D"]:
    """d_table: each position's gradient added to the row that it read."""
    tokens, vocabulary = cache
    d_table = jnp.zeros((vocabulary, d_x.shape[-1]), d_x.dtype)
    return d_table.at[tokens].add(d_x)


def tied_head_forward(x: Float[Array, "*rows D"], table: Float[Array, "V D"]) -> tuple[Float[Array, "*rows V"], tuple]:
    """logits = x W^T: how much the stream points along each token's own embedding."""
    return x @ table.T, (x, table)


def tied_head_backward(
    d_logits: Float[Array, "*rows V"], cache: tuple
) -> tuple[Float[Array, "*rows D"], Float[Array, "V D"]]:
    """(d_x, d_table), the head's share of the table's gradient only: d_x = d_logits W, d_W = d_logits^T x."""
    x, table = cache
    rows_x = x.reshape(-1, x.shape[-1])  # [*rows, D] -> [R, D]
    rows_d = d_logits.reshape(-1, d_logits.shape[-1])  # [*rows, V] -> [R, V]
    return d_logits @ table, rows_d.T @ rows_x
