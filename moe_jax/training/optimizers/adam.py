"""Adam (Kingma and Ba 2015, algorithm 1), written so that the compiler updates its state in place.

A skipped step (`taken` is false) must not change the moments. A step that is taken should need no second copy of the
moments. Two measures achieve this:

- `taken` selects the new or the old value where a moment is computed, entry by entry. If the selection came after the
  update, the whole old state and the whole new state would exist at once.
- On a CPU, the direction is computed from the stored moments, behind a barrier. Without the barrier the compiler
  computes the new moments a second time from the old ones, and for that keeps copies of the old ones: 8 bytes for each
  parameter, as measured for every matrix of `seed-158m`. On a GPU there is no barrier. One kernel then reads both
  moments once, and writes them and the parameter in place: 4.2 GB instead of 5.7 GB for a step of `seed-158m`, in the
  same memory.

Chapter 10 of `foundation` says where the step comes from, and a test compares the steps.

`scale_by_adam8bit` keeps moments of 8 bits: one byte a parameter, and one float32 scale for each block of entries.

It follows Dettmers et al. 2022 ("8-bit optimizers via block-wise quantization", section 2): 8-bit codes; small blocks,
so that an outlier makes only its own block less exact; small tensors stay in float32. Two things differ. The codes
follow a power law instead of a table, so no search is needed. And rounding is stochastic, with the exact value as its
mean. With beta2 = 0.999 a second moment decays by 0.1 % a step. This is less than half the distance of two codes, so
rounding to the nearest code would never lower it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.model.kernels.processor import by_platform
from moe_jax.system.random_keys import Purpose, purpose_key


class AdamState(NamedTuple):
    """Number of steps taken, and the running means of the gradient (mu) and of its square (nu)."""

    steps: Int[Array, ""]
    mu: Any
    nu: Any


def scale_by_adam(b1: float, b2: float, eps: float, mu_dtype: Any = None) -> optax.GradientTransformationExtraArgs:
    """mu_hat / (sqrt(nu_hat) + eps), with mu_hat = mu / (1 - b1^t) and nu_hat = nu / (1 - b2^t).

    If `mu_dtype` is given, mu is stored in it, and the direction is computed from the stored (rounded) mu.
    """

    def init(params: Any) -> AdamState:
        mu = jax.tree.map(lambda p: jnp.zeros(p.shape, mu_dtype or p.dtype), params)
        return AdamState(jnp.zeros((), jnp.int32), mu, jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: Any, state: Any, params: Any = None, *, taken: Bool[Array, ""] | bool = True, **_: Any
    ) -> tuple[Any, Any]:
        del params
        steps = state.steps + jnp.asarray(taken, jnp.int32)

        def first(m: Array, g: Array) -> Array:
            return jnp.where(taken, (b1 * m.astype(g.dtype) + (1 - b1) * g).astype(m.dtype), m)

        def second(v: Array, g: Array) -> Array:
            return jnp.where(taken, b2 * v + (1 - b2) * jnp.square(g), v)

        mu, nu = jax.tree.map(first, state.mu, updates), jax.tree.map(second, state.nu, updates)
        mu, nu = by_platform((mu, nu), cpu=jax.lax.optimization_barrier, default=lambda moments: moments)
        t = jnp.maximum(steps, 1)  # avoids 0 / 0 if the very first step is skipped
        scale_mu, scale_nu = 1 / (1 - b1**t), 1 / (1 - b2**t)

        def direction(m: Array, v: Array) -> Array:
            wide = m.astype(v.dtype)
            return wide * scale_mu.astype(v.dtype) / (jnp.sqrt(v * scale_nu.astype(v.dtype)) + eps)

        return jax.tree.map(direction, mu, nu), AdamState(steps, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def skippable(rule: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The same update rule, but a skipped step (`taken` is false) changes no bit of its state."""

    def update(updates: Any, state: Any, params: Any = None, *, taken: Any = True, **_: Any) -> tuple[Any, Any]:
        updates, new = rule.update(updates, state, params)
        return updates, jax.tree.map(lambda n, o: jnp.where(taken, n, o), new, state)

    return optax.GradientTransformationExtraArgs(rule.init, update)


# Moments in 8 bits


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
    """The values that the codes stand for."""
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
