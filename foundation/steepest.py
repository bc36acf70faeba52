"""Which step is steepest: it depends on how long a step is said to be. Derived in chapter 10.

Of all steps d of size 1, the steepest makes <g, d> as small as it gets, with g the gradient:

    size of d                       steepest d       <g, d> is then minus
    root of the sum of squares      -g / |g|         |g|             (gradient descent)
    largest entry                   -sign(g)         sum |g|         (Adam, where gradients do not change)
    largest singular value          -U V^T           sum of the singular values of g = U S V^T         (Muon)

The last column is the dual norm of g. Its gradient *is* the step that attains it, up to the sign. A sign step of
y = x W moves y by lr sum |x_i|, which grows with the width (muP).

Sources: Yang et al. 2022 ("Tensor programs V"), table 3 (muP); Bernstein and Newhouse 2024 ("Old optimizer, new norm"),
propositions 1 to 3; Kingma and Ba 2015, section 2.1.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

NORMS = ("euclidean", "entries", "spectral")
"""Sizes of a step: the root of the sum of squares, the largest entry, the largest singular value."""


def dual_norm_forward(gradient: Float[Array, "I O"], size: str) -> tuple[Float[Array, ""], tuple]:
    """(the dual norm of the gradient, the step of size 1 that attains it)."""
    if size == "euclidean":
        length = jnp.sqrt(jnp.sum(gradient**2))
        return length, (gradient / length,)
    if size == "entries":
        return jnp.sum(jnp.abs(gradient)), (jnp.sign(gradient),)
    u, s, vt = jnp.linalg.svd(gradient, full_matrices=False)
    return jnp.sum(s), (u @ vt,)


def dual_norm_backward(d_length: Float[Array, ""], cache: tuple) -> Float[Array, "I O"]:
    """The gradient of the dual norm is the step that attains it."""
    (attains,) = cache
    return d_length * attains


def steepest_step(gradient: Float[Array, "I O"], size: str) -> Float[Array, "I O"]:
    """The step of size 1 along which the loss falls fastest."""
    _, (attains,) = dual_norm_forward(gradient, size)
    return -attains


def output_change(x: Float[Array, " I"], d_y: Float[Array, " O"], lr: float) -> Float[Array, " O"]:
    """By how much a sign step of y = x W moves y: each of the I entries of x adds |x_i|, with the same sign."""
    return -lr * jnp.sum(jnp.abs(x)) * jnp.sign(d_y)
