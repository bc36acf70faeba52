"""Each kernel runs the form that is asked for. Two forms that agree cannot be told by their results."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from moe_jax.model.kernels.causal_attention import causal_attention
from moe_jax.model.kernels.cross_entropy import mean_cross_entropy
from moe_jax.model.kernels.grouped_matmul import grouped_matmul

QUERIES = jax.ShapeDtypeStruct((1, 1, 256, 4), jnp.float32)
KERNELS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "attention": (causal_attention, (QUERIES, QUERIES, QUERIES)),
    "cross-entropy": (
        mean_cross_entropy,
        (
            jax.ShapeDtypeStruct((6, 4), jnp.float32),
            jax.ShapeDtypeStruct((4, 9), jnp.float32),
            jax.ShapeDtypeStruct((6,), jnp.int32),
        ),
    ),
    "grouped products": (
        grouped_matmul,
        (jax.ShapeDtypeStruct((3, 5, 4), jnp.float32), jax.ShapeDtypeStruct((3, 4, 2), jnp.float32)),
    ),
}


def traced(kernel: str, **options: Any) -> str:
    function, shapes = KERNELS[kernel]
    return str(jax.make_jaxpr(lambda *operands: function(*operands, **options))(*shapes))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_form_with_gradients_by_hand_is_the_usual_one(kernel: str) -> None:
    assert "custom_vjp" in traced(kernel, implementation="blocked")
    assert "custom_vjp" not in traced(kernel, implementation="reference")
    assert traced(kernel) == traced(kernel, implementation="blocked")


def test_blocks_of_queries_never_hold_all_scores() -> None:
    assert "256,256]" not in traced("attention")
    assert "256,256]" in traced("attention", implementation="reference")
