"""Adam whose two moments take one byte each per parameter, in blocks with a scale of their own.

After Dettmers et al. 2022 ("8-bit optimizers via block-wise quantization"): 8-bit codes, small blocks so that an
outlier coarsens its own block only, and small tensors kept in float32 (there section 2). Two things differ. The codes
are a power law instead of a table, which needs no search. And rounding is random, with the exact value as its mean:
with beta2 = 0.999 a second moment moves by 0.1 % a step, less than half the distance of two codes, so rounded to the
nearest it would never move.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

BLOCK = 128
"""Entries that share a scale: 4 / 128 bytes of scale an entry."""
SMALLEST = 4096
"""Entries from which on a tensor is worth it; smaller ones (norms, biases) stay in float32."""
POWER = 4
"""An entry of code c is (c / most)^4 of its block's largest: from 4e-9 of it at c = 1 of 127, in steps of 4 / c."""
ROUND_MOMENTS = 3
"""Purpose of a random key (see `step.DROPOUT`)."""


class Coded(NamedTuple):
    """A tensor in 8-bit codes. int8 holds signed entries, uint8 those that are never negative."""

    codes: Int[Array, "N Block"]
    """Blocks of the flattened tensor, the last one filled up with zeros."""
    scale: Float[Array, "N 1"]
    """The largest magnitude of each block."""


def encode(x: Float[Array, "N Block"], key: Key[Array, ""], dtype: Any) -> Coded:
    """Round each entry to one of the two codes around it, at random such that the decoded mean is the entry.

    An unsigned entry is never rounded to 0: a second moment of 0 under a first moment that is not would make a step
    of any size.
    """
    most = jnp.iinfo(dtype).max
    scale = jnp.abs(x).max(axis=-1, keepdims=True)
    size = jnp.abs(x) / jnp.where(scale > 0, scale, 1)
    low = jnp.floor(most * jnp.sqrt(jnp.sqrt(size)))
    below, above = (low / most) ** POWER, ((low + 1) / most) ** POWER
    code = low + (jax.random.uniform(key, x.shape, x.dtype) * (above - below) < size - below)
    if dtype == jnp.uint8:
        code = jnp.maximum(code, 1)
    return Coded((jnp.clip(code, 0, most) * jnp.where(x < 0, -1, 1)).astype(dtype), scale)


def decode(coded: Coded) -> Float[Array, "N Block"]:
    most = jnp.iinfo(coded.codes.dtype).max
    share = coded.codes.astype(coded.scale.dtype) / most
    return jnp.sign(share) * share**POWER * coded.scale


def _in_blocks(x: Float[Array, "..."]) -> Float[Array, "N Block"]:
    flat = x.reshape(-1)
    return jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)


class Adam8bitState(NamedTuple):
    """Moments by parameter: `Coded`, or an array where the parameter is small."""

    steps: Int[Array, ""]
    first: Any
    second: Any


def scale_by_adam8bit(b1: float, b2: float, eps: float, seed: int) -> optax.GradientTransformation:
    """m / (sqrt(v) + eps) with both moments corrected for their start at zero (Kingma and Ba 2015, algorithm 1)."""

    def init(params: Any) -> Adam8bitState:
        def zeros(dtype: Any) -> Any:
            return jax.tree.map(lambda p: _zeros(p, dtype), params)

        return Adam8bitState(jnp.zeros((), jnp.int32), zeros(jnp.int8), zeros(jnp.uint8))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        count = state.steps + 1
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), ROUND_MOMENTS), count)
        grads, tree = jax.tree.flatten(updates)
        first, second = tree.flatten_up_to(state.first), tree.flatten_up_to(state.second)
        moved = []
        for i, g in enumerate(grads):
            shaped = _in_blocks(g) if isinstance(first[i], Coded) else g
            m = b1 * _read(first[i]) + (1 - b1) * shaped
            v = b2 * _read(second[i]) + (1 - b2) * jnp.square(shaped)
            step = m / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + eps)
            moved.append(step.reshape(-1)[: g.size].reshape(g.shape))
            keys = jax.random.split(jax.random.fold_in(key, i))
            first[i], second[i] = _like(first[i], m, keys[0]), _like(second[i], v, keys[1])
        return tree.unflatten(moved), Adam8bitState(count, tree.unflatten(first), tree.unflatten(second))

    return optax.GradientTransformation(init, update)


def _zeros(parameter: Array, dtype: Any) -> Coded | Array:
    if parameter.size < SMALLEST:
        return jnp.zeros_like(parameter)
    blocks = -(-parameter.size // BLOCK)
    return Coded(jnp.zeros((blocks, BLOCK), dtype), jnp.zeros((blocks, 1), parameter.dtype))


def _read(moment: Coded | Array) -> Array:
    return decode(moment) if isinstance(moment, Coded) else moment


def _like(old: Coded | Array, new: Array, key: Key[Array, ""]) -> Coded | Array:
    return encode(new, key, old.codes.dtype) if isinstance(old, Coded) else new
