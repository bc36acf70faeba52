"""The kernels in the plainest form, differentiated by jax, which the tests compare the forms written by hand with."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from moe_jax.model.kernels import causal_attention as by_hand
from moe_jax.model.kernels import query_blocks
from moe_jax.model.kernels.cross_entropy import token_losses
from moe_jax.model.precision import at_least_float32, dot_precision


def causal_attention(
    query: Float[Array, "B H T A"],
    key: Float[Array, "B KV T A"],
    value: Float[Array, "B KV T A"],
    dropout: float = 0.0,
    dropout_keys: Key[Array, " B"] | None = None,
) -> Float[Array, "B H T A"]:
    """All scores at once. The masks of dropout are those of the blocks of queries."""
    positions, shared = query.shape[2], query.shape[1] // key.shape[1]
    weights = by_hand.attention_weights(query, key).astype(query.dtype)
    if dropout and dropout_keys is not None:
        blocks = query_blocks(positions)
        masks = [by_hand._dropout_mask(query, dropout, dropout_keys, *block) for block in blocks]
        whole = [jnp.pad(m, ((0, 0), (0, 0), (0, 0), (0, positions - m.shape[3]))) for m in masks]
        weights = jnp.where(jnp.concatenate(whole, axis=2), weights / (1 - dropout), 0).astype(query.dtype)
    value = jnp.repeat(value, shared, axis=1)
    return jnp.einsum("bhqs,bhsa->bhqa", weights, value, precision=dot_precision(query.dtype))


def grouped_matmul(
    rows: Float[Array, "G R D"],
    weights: Float[Array, "E D F"],
    further_expert: Int[Array, " further"] | None = None,
) -> Float[Array, "G R F"]:
    """One group after another."""
    further = [] if further_expert is None else list(further_expert)
    experts = [*range(len(weights)), *further]
    return jnp.stack([x @ weights[e].astype(rows.dtype) for x, e in zip(rows, experts, strict=True)])


def mean_cross_entropy(
    hidden: Float[Array, "N D"],
    head: Float[Array, "D V"],
    targets: Int[Array, " N"],
    loss_scale: Any = None,
    weights: Float[Array, " N"] | None = None,
) -> Float[Array, ""]:
    """All logits at once. No loss scale is needed: nothing is rounded to float16."""
    del loss_scale
    wide = at_least_float32(hidden.dtype)
    z = jnp.matmul(
        hidden, head.astype(hidden.dtype), precision=dot_precision(hidden.dtype), preferred_element_type=wide
    )
    losses = token_losses(z, targets)
    return losses.mean() if weights is None else (losses * weights.astype(losses.dtype)).sum()
