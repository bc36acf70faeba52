"""Adam with 8-bit moments: each moment takes one byte a parameter, plus one float32 scale for each block of entries.

After Dettmers et al. 2022 ("8-bit optimizers via block-wise quantization", section 2): 8-bit codes; small blocks, so
that an outlier makes only its own block less exact; small tensors stay in float32. Two things differ. The codes follow
a power law instead of a table, so no search is needed. And rounding is stochastic, with the exact value as its mean.
With beta2 = 0.999 a second moment decays by 0.1 % a step. This is less than half the distance of two codes, so rounding
to the nearest code would never lower it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from moe_jax.system.random_keys import Purpose, purpose_key

BLOCK = 128
"""Entries of a block, which share one scale: the scale takes 4 / 128 bytes an entry."""
SMALLEST = 4096
"""A tensor with fewer entries (norms, biases) stays in float32."""
POWER = 4
"""Code c stands for (c / most)^4 x the largest magnitude of its block. `most` is the largest code: 127 for int8, 255
for uint8. The smallest value, at c = 1 of 127, is 4e-9 x the largest. Neighbouring values differ by
about 4 / c of their size."""


class Coded(NamedTuple):
    """A tensor in 8-bit codes. int8 holds signed entries, uint8 those that are never negative."""

    codes: Int[Array, "N Block"]
    """Blocks of the flattened tensor, the last one filled up with zeros."""
    scale: Float[Array, "N 1"]
    """The largest magnitude of each block."""


def encode(x: Float[Array, "N Block"], key: Key[Array, ""], dtype: Any) -> Coded:
    """Round each entry to one of the two nearest codes, at random. The mean of the decoded value is the entry.

    An unsigned entry is never rounded to 0: a second moment of 0 with a first moment other than 0 would give a step of
    size m / eps.
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
    """The moments of each parameter: `Coded`, or a plain array if the parameter is small."""

    steps: Int[Array, ""]
    first: Any
    second: Any


def scale_by_adam8bit(b1: float, b2: float, eps: float, seed: int) -> optax.GradientTransformation:
    """m / (sqrt(v) + eps), with both moments corrected for their bias (Kingma and Ba 2015, algorithm 1)."""

    def init(params: Any) -> Adam8bitState:
        def zeros(dtype: Any) -> Any:
            return jax.tree.map(lambda p: _zeros(p, dtype), params)

        return Adam8bitState(jnp.zeros((), jnp.int32), zeros(jnp.int8), zeros(jnp.uint8))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        count = state.steps + 1
        key = purpose_key(seed, Purpose.ROUND_MOMENTS, count)
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
            first[i], second[i] = _encode_as(first[i], m, keys[0]), _encode_as(second[i], v, keys[1])
        return tree.unflatten(moved), Adam8bitState(count, tree.unflatten(first), tree.unflatten(second))

    return optax.GradientTransformation(init, update)


def _zeros(parameter: Array, dtype: Any) -> Coded | Array:
    if parameter.size < SMALLEST:
        return jnp.zeros_like(parameter)
    blocks = -(-parameter.size // BLOCK)
    return Coded(jnp.zeros((blocks, BLOCK), dtype), jnp.zeros((blocks, 1), parameter.dtype))


def _read(moment: Coded | Array) -> Array:
    return decode(moment) if isinstance(moment, Coded) else moment


def _encode_as(old: Coded | Array, new: Array, key: Key[Array, ""]) -> Coded | Array:
    return encode(new, key, old.codes.dtype) if isinstance(old, Coded) else new
