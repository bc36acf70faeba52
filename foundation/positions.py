"""Positions: a learned table, or a rotation (RoPE). Derived in chapter 6.

A learned table adds one vector per position to the embedding. RoPE turns the pairs (x_i, x_(i + A/2)) of queries and
keys by an angle proportional to the position: with R_t the rotation at position t, <R_s q, R_t k> = <q, R_(t-s) k>. A
rotation is orthogonal, so its adjoint is the rotation back, by -angle.

To read longer texts than in training, slow pairs are slowed further (`slowed_pairs`). A constant 1 / factor for all
pairs is position interpolation.

Sources: learned table: Radford et al. 2018, section 3.1. RoPE: Su et al. 2021, section 3.2.2, equations 14 to 16, with
the pairs (2i, 2i + 1). Longer texts: Chen et al. 2023, equation 4; Peng et al. 2024, section 3.2; Grattafiori et al.
2024, 3.1.1.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

ROPE_BASE = 10_000.0


def learned_positions_forward(
    x: Float[Array, "B T D"], table: Float[Array, "N D"]
) -> tuple[Float[Array, "B T D"], tuple]:
    """y_bt = x_bt + table_t."""
    return x + table[: x.shape[1]], (len(table),)


def learned_positions_backward(
    d_y: Float[Array, "B T D"], cache: tuple
) -> tuple[Float[Array, "B T D"], Float[Array, "N D"]]:
    """(d_x, d_table): the table gets the sum over the batch, unused rows get 0."""
    (longest,) = cache
    d_table = jnp.zeros((longest, d_y.shape[-1]), d_y.dtype)
    return d_y, d_table.at[: d_y.shape[1]].set(jnp.sum(d_y, axis=0))


def rope_angles(positions: int, width: int, dtype: jnp.dtype, base: float = ROPE_BASE) -> Float[Array, "T pairs"]:
    """angle_ti = t base^(-2i/A), for the pairs i = 0 ... A/2 - 1."""
    frequencies = base ** (-jnp.arange(0, width, 2, dtype=dtype) / width)
    return jnp.arange(positions, dtype=dtype)[:, None] * frequencies


def slowed_pairs(
    width: int, factor: float, trained: int, base: float = ROPE_BASE, low: float = 1.0, high: float = 4.0
) -> Float[Array, " pairs"]:
    """What each pair's frequency is multiplied by, for a text `factor` times as long as the `trained` one.

    Pairs that turned more than `high` times within the trained length stay. Those that turned less than `low` times
    are slowed by the factor, so that they see no new angle. Between, a blend.
    """
    turns = rope_angles(2, width, jnp.dtype("float64"), base)[1] * trained / (2.0 * jnp.pi)
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept + (1.0 - kept) / factor


def rope_forward(
    x: Float[Array, "*rows T A"], base: float = ROPE_BASE, slowed: Float[Array, " pairs"] | float = 1.0
) -> tuple[Float[Array, "*rows T A"], tuple]:
    """Rotates the pair (x_i, x_(i + A/2)) at position t by angle_ti, times the pair's entry of `slowed`:

    y_i         = x_i cos - x_(i + A/2) sin
    y_(i + A/2) = x_i sin + x_(i + A/2) cos
    """
    angles = rope_angles(x.shape[-2], x.shape[-1], x.dtype, base) * slowed
    return _rotate(x, angles), (angles,)


def rope_at(x: Float[Array, "*rows T A"], first: int, base: float = ROPE_BASE) -> Float[Array, "*rows T A"]:
    """The same for rows whose positions are first, first + 1, ...: what decoding needs."""
    return _rotate(x, rope_angles(first + x.shape[-2], x.shape[-1], x.dtype, base)[first:])


def rope_backward(d_y: Float[Array, "*rows T A"], cache: tuple) -> Float[Array, "*rows T A"]:
    """d_x = R^T d_y: the rotation by the negative angle."""
    (angles,) = cache
    return _rotate(d_y, -angles)


def _rotate(x: Float[Array, "*rows T A"], angles: Float[Array, "T pairs"]) -> Float[Array, "*rows T A"]:
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
