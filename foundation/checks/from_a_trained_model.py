"""Checks of chapter 14: models that begin where another one ended."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from foundation import feed_forward, low_rank, upcycling
from foundation.checks.inputs import Draws, answer, gradient, router_margin
from foundation.parity import AnyCheck, compiled

MATRICES = {"w_gate": (4, 3), "w_in": (4, 3), "w_out": (3, 4)}


def checks() -> Iterator[AnyCheck]:
    """Copies of one network: three ways with drops; without them the whole gradient against the dense network's.

    Both thin matrices three ways, at the start too; and the product against one merged matrix.
    """
    case = "top 2, drops"
    yield gradient(upcycling.upcycled_forward, case, upcycled_inputs(case), 2, 0.6, margin=router_margin(2))
    for case, top_k, oracle in (
        ("top 2 is the dense net", 2, dense_gradient),
        ("top 1 turns the volume up", 1, volume_gradient),
    ):
        inputs = (*upcycled_inputs(case), Draws(f"upcycled_gradient/{case}").normal(2, 5, 4))
        yield answer(upcycled_gradient, case, compiled(oracle), inputs, top_k)

    draws = Draws("low rank")
    x, kernel, a, b = draws.normal(2, 3, 5), draws.normal(5, 4), draws.normal(5, 2), draws.normal(2, 4)
    for case, second in (("rank 2", b), ("at the start: B is 0", 0.0 * b)):
        yield gradient(low_rank.low_rank_forward, case, (x, a, second), kernel, 1.5)
    yield answer(merged, "as two products", two_products, (x, kernel, a, b), 1.5)


def upcycled_inputs(case: str) -> tuple:
    """x, a dense network and a router."""
    draws = Draws(f"upcycled/{case}")
    dense = {name: draws.normal(*shape) for name, shape in MATRICES.items()}
    return draws.normal(2, 5, 4), dense, draws.normal(4, 4)


def upcycled_gradient(x: Any, dense: Any, router: Any, d_y: Any, top_k: int) -> Any:
    """y and the gradients of everything, in one row of numbers, so that a 0 is judged against the others."""
    y, cache = upcycling.upcycled_forward(x, dense, router, top_k, 4.0)  # nothing is dropped
    d_x, d_dense, d_router = upcycling.upcycled_backward(d_y, cache)
    return in_a_row(y, d_x, [d_dense[name] for name in MATRICES], d_router)


def in_a_row(y: Any, d_x: Any, d_dense: list, d_router: Any) -> Any:
    """All entries one after another."""
    return jnp.concatenate([jnp.ravel(part) for part in (y, d_x, *d_dense, d_router)])


def dense_gradient(x: Any, dense: Any, router: Any, d_y: Any, _: Any) -> Any:
    """The dense network's output and gradients, and exactly nothing for the router."""
    y, cache = feed_forward.feed_forward_forward(x, *(dense[name] for name in MATRICES))
    d_x, *d_dense = feed_forward.feed_forward_backward(d_y, cache)
    return in_a_row(y, d_x, d_dense, jnp.zeros_like(router))


def volume_gradient(x: Any, dense: Any, router: Any, d_y: Any, _: Any) -> Any:
    """y = (largest p) h: as if one number per token, the volume, were multiplied to the dense network."""
    h, cache = feed_forward.feed_forward_forward(x, *(dense[name] for name in MATRICES))
    z = x @ router
    p = jnp.exp(z) / jnp.sum(jnp.exp(z), axis=-1, keepdims=True)
    volume = jnp.max(p, axis=-1, keepdims=True)
    d_x, *d_dense = feed_forward.feed_forward_backward(volume * d_y, cache)
    d_volume = jnp.sum(d_y * h, axis=-1, keepdims=True)
    d_z = d_volume * volume * ((p == volume) - p)
    return in_a_row(volume * h, d_x + d_z @ router.T, d_dense, jnp.einsum("btd,bte->de", x, d_z))


def merged(x: Any, kernel: Any, a: Any, b: Any, scale: float) -> Any:
    """x times one matrix."""
    return x @ low_rank.merged(kernel, a, b, scale)


def two_products(x: Any, kernel: Any, a: Any, b: Any, scale: float) -> np.ndarray:
    """Rank by rank, entry by entry."""
    ranks = zip(np.asarray(a).T, np.asarray(b), strict=True)
    thin = sum(scale * np.outer(np.asarray(x) @ column, row) for column, row in ranks)
    return np.asarray(x) @ np.asarray(kernel) + np.reshape(thin, (*np.shape(x)[:-1], -1))
