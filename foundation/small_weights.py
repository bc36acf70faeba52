"""Weights of few bits, and which way to round them. Derived in chapter 18.

A weight is a whole number times a scale, w ~ s q, with q from -m to m: m is 127 for 8 bits, 7 for 4. The scale max |w|
/ m is one for each output, or for each group of inputs of an output. It leaves the sum of the product:

    y_o = s_o sum_d x_d q_do            d_x = (d_y s) q^T     d_s_o = sum_t d_y_to (x q)_to

The error of the outputs, with stored weights v, tokens X [T, D] and H = X^T X / T, is

    L = (v - w)^T H (v - w)             dL/dv = 2 H (v - w)

If weight k is off by e, the others make L least with d = e H^-1[:, k] / H^-1[k, k], and then L = e^2 / H^-1[k, k].
GPTQ rounds the weights in turn, moves the free ones so, and takes weight k out of H^-1.

Sources: Hassibi and Stork 1993, section 2; Frantar et al. 2023, equations 2 and 3 and section 3.3; Dettmers et al.
2022, section 2.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def quantize(w: Float[Array, "D O"], most: int, group: int) -> tuple[Float[Array, "D O"], Float[Array, "G O"]]:
    """(codes, scales): whole numbers from -most to most, and one scale for each `group` inputs of an output. A group of
    zeros has the scale 0 and the codes 0."""
    blocks = w.reshape(-1, group, w.shape[1])
    scale = jnp.max(jnp.abs(blocks), axis=1) / most
    codes = jnp.round(blocks / jnp.where(scale == 0.0, 1.0, scale)[:, None])
    return codes.reshape(w.shape), scale


def coded_product_forward(
    x: Float[Array, "T D"], scale: Float[Array, " O"], codes: Float[Array, "D O"]
) -> tuple[Float[Array, "T O"], tuple]:
    """x times the matrix that the codes stand for, with one scale for each output."""
    unscaled = x @ codes
    return unscaled * scale, (codes, scale, unscaled)


def coded_product_backward(d_y: Float[Array, "T O"], cache: tuple) -> tuple[Array, Array]:
    """(d_x, d_scale). Codes are whole numbers and have no gradient."""
    codes, scale, unscaled = cache
    return (d_y * scale) @ codes.T, jnp.sum(d_y * unscaled, axis=0)


def output_error_forward(
    v: Float[Array, "D O"], w: Float[Array, "D O"], x: Float[Array, "T D"]
) -> tuple[Float[Array, ""], tuple]:
    """|X (v - w)|^2 / T, added up over the outputs."""
    error = x @ (v - w)
    return jnp.sum(error**2) / len(x), (x, error)


def output_error_backward(d_loss: Float[Array, ""], cache: tuple) -> Float[Array, "D O"]:
    """d_v = 2 H (v - w)."""
    x, error = cache
    return d_loss * 2.0 * x.T @ error / len(x)


def inverse_of_inputs(x: Float[Array, "T D"], damping: float) -> Float[Array, "D D"]:
    """H^-1, with `damping` times the mean of H's diagonal added to it."""
    h = x.T @ x / len(x)
    return jnp.linalg.inv(h + damping * jnp.mean(jnp.diag(h)) * jnp.eye(len(h)))


def moved_by_one(inverse: Float[Array, "D D"], k: int | Int[Array, ""], error: Float[Array, ""]) -> tuple[Array, Array]:
    """(d, L): the best change of all weights of one output where weight k is wrong by `error`, and what it costs."""
    return error * inverse[:, k] / inverse[k, k], error**2 / inverse[k, k]


def without(inverse: Float[Array, "D D"], k: int) -> Float[Array, "D D"]:
    """The inverse of H without row and column k. Its own row and column k become 0."""
    return inverse - jnp.outer(inverse[:, k], inverse[k, :]) / inverse[k, k]


def gptq(w: Float[Array, "D O"], inverse: Float[Array, "D D"], scale: Float[Array, " O"], most: int) -> Array:
    """The codes, [D, O]: weights are rounded input by input, and what is still free makes up for the error."""
    v = w
    for k in range(len(w)):
        code = jnp.clip(jnp.round(v[k] / scale), -most, most)
        error = scale * code - v[k]
        v = v + jnp.outer(inverse[:, k] / inverse[k, k], error)
        inverse = without(inverse, k)
    return jnp.clip(jnp.round(v / scale), -most, most)
