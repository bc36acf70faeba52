"""Checks of chapters 13 and 14: micro-batches, and models that begin where another one ended."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from foundation import feed_forward, losses, low_rank, upcycling
from foundation import micro_batches as micro
from foundation.checks.inputs import Draws, filled_with, router_margin
from foundation.parity import COMPILER_OPTIONS, AnyCheck, Check, OracleCheck


def batch_checks() -> Iterator[AnyCheck]:
    """The accumulated loss three ways, and against the whole batch; the balance loss of groups, and what parts add."""
    draws = Draws("micro_batches")
    logits, targets = draws.normal(4, 3, 5), draws.integers(5, 4, 3)
    uneven = targets.copy()
    uneven[0] = uneven[1, 1:] = losses.IGNORE
    for case, wanted, parts in (
        ("equal counts", targets, 2),
        ("unequal counts", uneven, 2),
        ("a part without tokens", uneven, 4),
        ("nothing counted", np.full_like(targets, losses.IGNORE), 2),
    ):
        if case != "equal counts":  # an easier case of "unequal counts"
            forward = filled_with(micro.accumulated_loss_forward, wanted, parts)
            yield Check("accumulated_loss", case, forward, micro.accumulated_loss_backward, (logits,))
        inputs = (logits, wanted)
        yield OracleCheck("accumulated_value", case, accumulated_value, mean_over_tokens, inputs, (parts,))
    probs = draws.generator.dirichlet([1.0] * 3, (4, 6))
    chosen = np.argsort(-probs, axis=-1)[..., :2]
    for case, groups in (("by sequence", 4), ("by pairs of sequences", 2), ("by batch", 1)):
        forward = filled_with(micro.grouped_balance_forward, chosen, groups)
        yield Check("grouped_balance", case, forward, micro.grouped_balance_backward, (probs,))
    for parts in (2, 4):
        yield OracleCheck("balance_gap", f"{parts} parts", micro.balance_gap, covariance, (probs, chosen), (parts,))


def accumulated_value(logits: Any, targets: Any, parts: int) -> Any:
    """The loss alone."""
    return micro.accumulated_loss_forward(logits, targets, parts)[0]


def mean_over_tokens(logits: Any, targets: Any, parts: int) -> float:
    """One sum over the counted tokens of the whole batch, and one division."""
    z, wanted = np.asarray(logits), np.asarray(targets)
    found = [
        np.log(np.sum(np.exp(row))) - row[target]
        for row, target in zip(z.reshape(-1, z.shape[-1]), wanted.ravel(), strict=True)
        if target != losses.IGNORE
    ]
    return sum(found) / max(len(found), 1)


def covariance(probs: Any, chosen: Any, parts: int) -> float:
    """E times the covariance of f_e and P_e over the parts, summed over the experts."""
    p, wanted = np.asarray(probs), np.asarray(chosen)
    experts = p.shape[-1]
    f = np.array([np.bincount(part.ravel(), minlength=experts) / part.size for part in np.split(wanted, parts)])
    mean = np.array([part.mean(axis=(0, 1)) for part in np.split(p, parts)])
    return experts * sum(np.cov(f[:, e], mean[:, e], bias=True)[0, 1] for e in range(experts))


def upcycling_checks() -> Iterator[AnyCheck]:
    """Copies of one network: three ways with drops; without them the whole gradient against the dense network's."""
    forward = filled_with(upcycling.upcycled_forward, 2, 0.6)
    inputs = upcycled_inputs("top 2, drops")
    yield Check("upcycled", "top 2, drops", forward, upcycling.upcycled_backward, inputs, upcycled_margin)
    for case, top_k, oracle in (
        ("top 2 is the dense net", 2, dense_gradient),
        ("top 1 turns the volume up", 1, volume_gradient),
    ):
        x, dense, router = upcycled_inputs(case)
        inputs = (x, dense, router, Draws(f"upcycled_gradient/{case}").normal(*x.shape))
        yield OracleCheck("upcycled_gradient", case, upcycled_gradient, oracle, inputs, (top_k,))


def low_rank_checks() -> Iterator[AnyCheck]:
    """Both thin matrices three ways, at the start too; and the product against one merged matrix."""
    draws = Draws("low rank")
    x, kernel, a, b = draws.normal(2, 3, 5), draws.normal(5, 4), draws.normal(5, 2), draws.normal(2, 4)
    forward = filled_with(low_rank.low_rank_forward, kernel, 1.5)
    for case, second in (("rank 2", b), ("at the start: B is 0", 0.0 * b)):
        yield Check("low_rank", case, forward, low_rank.low_rank_backward, (x, a, second))
    yield OracleCheck("merged", "as two products", by_merging, two_products, (x, kernel, a, b), (1.5,))


def by_merging(x: Any, kernel: Any, a: Any, b: Any, scale: float) -> Any:
    """x times one matrix."""
    return x @ low_rank.merged(kernel, a, b, scale)


def two_products(x: Any, kernel: Any, a: Any, b: Any, scale: float) -> np.ndarray:
    """Rank by rank, entry by entry."""
    thin = [
        scale * np.outer(np.asarray(x) @ column, row)
        for column, row in zip(np.asarray(a).T, np.asarray(b), strict=True)
    ]
    return np.asarray(x) @ np.asarray(kernel) + np.reshape(sum(thin), (*np.shape(x)[:-1], -1))


def upcycled_inputs(case: str) -> tuple:
    """x, a dense network and a router."""
    draws = Draws(f"upcycled/{case}")
    dense = {name: draws.normal(*shape) for name, shape in (("w_gate", (4, 3)), ("w_in", (4, 3)), ("w_out", (3, 4)))}
    return draws.normal(2, 5, 4), dense, draws.normal(4, 4)


def upcycled_margin(cache: Any) -> Any:
    """How far the choice of two experts is from another one."""
    layer, _ = cache
    return router_margin(layer.router, 2)


def upcycled_gradient(x: Any, dense: Any, router: Any, d_y: Any, top_k: int) -> Any:
    """y and the gradients of everything, in one row of numbers, so that a 0 is judged against the others."""
    y, cache = upcycling.upcycled_forward(x, dense, router, top_k, 4.0)  # nothing is dropped
    d_x, d_dense, d_router = upcycling.upcycled_backward(d_y, cache)
    return in_a_row(y, d_x, d_dense, d_router)


def in_a_row(y: Any, d_x: Any, d_dense: Any, d_router: Any) -> Any:
    """All entries one after another."""
    parts = (y, d_x, *(d_dense[name] for name in ("w_gate", "w_in", "w_out")), d_router)
    return jnp.concatenate([jnp.ravel(part) for part in parts])


@partial(jax.jit, static_argnames="top_k", compiler_options=COMPILER_OPTIONS)
def dense_gradient(x: Any, dense: Any, router: Any, d_y: Any, top_k: int) -> Any:
    """The dense network's output and gradients, and exactly nothing for the router."""
    y, cache = feed_forward.feed_forward_forward(x, dense["w_gate"], dense["w_in"], dense["w_out"])
    d_x, *d_dense = feed_forward.feed_forward_backward(d_y, cache)
    return in_a_row(y, d_x, dict(zip(("w_gate", "w_in", "w_out"), d_dense, strict=True)), jnp.zeros_like(router))


@partial(jax.jit, static_argnames="top_k", compiler_options=COMPILER_OPTIONS)
def volume_gradient(x: Any, dense: Any, router: Any, d_y: Any, top_k: int) -> Any:
    """y = (largest p) h: as if one number per token, the volume, were multiplied to the dense network."""
    h, cache = feed_forward.feed_forward_forward(x, dense["w_gate"], dense["w_in"], dense["w_out"])
    z = x @ router
    p = jnp.exp(z) / jnp.sum(jnp.exp(z), axis=-1, keepdims=True)
    volume = jnp.max(p, axis=-1, keepdims=True)
    d_x, *d_dense = feed_forward.feed_forward_backward(volume * d_y, cache)
    d_volume = jnp.sum(d_y * h, axis=-1, keepdims=True)
    d_z = d_volume * volume * ((p == volume) - p)
    named = dict(zip(("w_gate", "w_in", "w_out"), d_dense, strict=True))
    d_router = jnp.einsum("btd,bte->de", x, d_z)
    return in_a_row(volume * h, d_x + d_z @ router.T, named, d_router)
