"""Grouped matrix product: each group of rows times the matrix of its expert."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.model.kernels.matmul import matmul

Implementation = Literal["batched", "reference"]


def grouped_matmul(
    rows: Float[Array, "G R D"],
    weights: Float[Array, "E D F"],
    group_expert: Int[Array, " G"] | None = None,
    implementation: Implementation = "batched",
) -> Float[Array, "G R F"]:
    """rows[g] @ weights[group_expert[g]] for each group g, in the dtype of `rows`. Without `group_expert`, group g
    belongs to expert g.

    batched     one batched product; with `group_expert`, each group gets a copy of its expert's matrix
    reference   one group after another, differentiated by jax; the tests compare `batched` with it
    """
    if implementation == "reference":
        chosen = jnp.arange(len(rows)) if group_expert is None else group_expert
        products = [rows[g] @ weights[chosen[g]].astype(rows.dtype) for g in range(len(rows))]
        return jnp.stack(products)
    if group_expert is not None:
        weights = weights[group_expert]
    if len(weights) == 1:
        # A plain product. The compiler would turn the batched product into one, but lose its name (`named_scope`).
        return matmul(rows[0], weights[0])[None]
    return matmul(rows, weights)
