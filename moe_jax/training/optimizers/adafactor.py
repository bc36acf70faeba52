"""Adafactor: the second moment has one number for each row and one for each column, instead of one for each entry.

optax's Adafactor is not used, because it factors the two longest axes of an array. For a stack of experts `[E, D, F]`
with E > F these are E and D, so the load of one expert would change the steps of another. For experts `[64, 128, 32]`,
the steps of optax and of this module differ by up to 37 % of the largest step. If E is the shortest axis, both have the
same steps, up to float32 rounding, and the same memory.

Chapter 10 of `foundation` derives the fit by rows and columns, and a test compares the steps.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

DECAY = 0.8
"""The decay of the second moment at step t is 1 - t^-0.8 (Shazeer and Stern 2018, section 7.2)."""
TINY = 1e-30
"""Added to squared gradients, so that the second moment of a row without gradients is not 0 (algorithm 4)."""
LARGEST_STEP = 1.0
"""Largest root mean square of a parameter's step, before the learning rate is applied (section 6)."""


class Factors(NamedTuple):
    """Running means of squared gradients of matrices `[..., R, C]`."""

    row: Float[Array, "*Stack R"]
    column: Float[Array, "*Stack C"]


class AdafactorState(NamedTuple):
    """The second moment of each parameter: `Factors` for a matrix or a stack of matrices, an array for a vector."""

    steps: Int[Array, ""]
    second: Any


def scale_by_adafactor() -> optax.GradientTransformation:
    """g / sqrt(v) without a first moment (Shazeer and Stern 2018, algorithms 4 and 5).

    The paper's scaling by the size of the parameter is left out, because the learning rates here are absolute. v of
    entry (r, c) is row[r] * column[c] / mean(row). This is exact if the squared gradients have rank 1. A stack of
    experts `[E, D, F]` is treated as E matrices.
    """

    def init(params: Any) -> AdafactorState:
        def zeros(p: Array) -> Factors | Array:
            if p.ndim < 2:
                return jnp.zeros_like(p)
            return Factors(jnp.zeros_like(p[..., 0]), jnp.zeros_like(p[..., 0, :]))

        return AdafactorState(jnp.zeros((), jnp.int32), jax.tree.map(zeros, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        count = state.steps + 1
        keep = 1 - count.astype(jnp.float32) ** -DECAY
        grads, tree = jax.tree.flatten(updates)
        second = tree.flatten_up_to(state.second)
        moved = []
        for i, g in enumerate(grads):
            square = jnp.square(g) + TINY
            if isinstance(second[i], Factors):
                row = keep * second[i].row + (1 - keep) * square.mean(-1)
                column = keep * second[i].column + (1 - keep) * square.mean(-2)
                second[i] = Factors(row, column)
                row_factor = jax.lax.rsqrt(row / row.mean(-1, keepdims=True))
                step = g * row_factor[..., None] * jax.lax.rsqrt(column)[..., None, :]
            else:
                second[i] = keep * second[i] + (1 - keep) * square
                step = g * jax.lax.rsqrt(second[i])
            size = jnp.sqrt(jnp.square(step).mean())
            moved.append(step / jnp.maximum(1, size / LARGEST_STEP))
        return tree.unflatten(moved), AdafactorState(count, tree.unflatten(second))

    return optax.GradientTransformation(init, update)
