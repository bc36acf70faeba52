"""The small parts: initial values, normalisation, rotary positions, dropout."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.config import Norm
from moe_jax.config.rope import scaled_rotation
from moe_jax.model.kernels.processor import rotated_pairs
from moe_jax.model.precision import at_least_float32


def matrix_init(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float = 1.0) -> Float[Array, "..."]:
    """Normal with variance scale^2 / fan-in (LeCun et al. 1998, section 4.6). Fan-in is the length of axis -2."""
    return jax.random.normal(rngs.params(), shape) * (scale / math.sqrt(shape[-2]))


def embedding_init(rngs: nnx.Rngs, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Normal with variance 1 / width. So rows have a norm of about 1, and with a tied head the logits have variance 1.

    With much smaller entries (a standard deviation of 0.02 is usual), the blocks' outputs dominate the residual stream
    and hide the embedding. To copy an earlier word, the model needs the embedding in the residual stream, so it then
    learns to copy late. This was measured on preset nano.
    """
    # A product: XLA may turn a division by a constant into one, and then a compiled program has other last bits.
    return jax.random.normal(rngs.params(), shape) * (1 / math.sqrt(shape[-1]))


class Normalisation(nnx.Module):
    """LayerNorm (Ba et al. 2016, equation 4) or RMSNorm (Zhang and Sennrich 2019, equation 4).

    `eps` is added to the variance or to the mean square; 0 stands for 1e-5 with LayerNorm and 1e-6 with RMSNorm.
    Statistics in at least float32. Parameters: scale `[D]`, and for LayerNorm with `bias` also bias `[D]`.

    The backward pass recomputes the values between input and output. Without recomputation, autodiff would keep two
    more arrays of that size, in at least float32. A block keeps input and output in any case.
    """

    def __init__(self, kind: Norm, width: int, bias: bool, eps: float = 0.0) -> None:
        self.kind = kind
        self.eps = eps or (1e-5 if kind == "layernorm" else 1e-6)
        self.scale = nnx.Param(jnp.ones(width))
        if kind == "layernorm" and bias:
            self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        bias = self.bias[...] if hasattr(self, "bias") else None
        return jax.checkpoint(self._normalise)(x, self.scale[...], bias)

    def _normalise(self, x: Array, scale: Array, bias: Array | None) -> Array:
        wide = x.astype(at_least_float32(x.dtype))
        if self.kind == "layernorm":
            wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        wide = wide * scale
        if bias is not None:
            wide = wide + bias
        return wide.astype(x.dtype)


def with_bias(x: Float[Array, "*batch D"], bias: Float[Array, " D"]) -> Float[Array, "*batch D"]:
    """x + bias, rounded once. In at least float32, and so is the gradient of the bias: its sum over all tokens would
    leave the range of float16."""
    wide = at_least_float32(x.dtype)
    return (x.astype(wide) + bias.astype(wide)).astype(x.dtype)


def apply_rope(
    x: Float[Array, "B T H A"], positions: Int[Array, "*B T"], theta: float = 10_000.0, scaling: str = ""
) -> Float[Array, "B T H A"]:
    """Rotary position embedding (Su et al. 2021, section 3.2), base `theta`, pairs (i, i + A/2).

    `positions` are those of all sequences, `[T]`, or each sequence has its own, `[B, T]`.

    Pair i of a head is rotated by the angle position * theta^(-2i/A), so that the positions of q and k enter q . k only
    through their distance. With `scaling`, frequencies, cosines and sines have the factors of `config/rope.py`.
    """
    half = x.shape[-1] // 2
    dtype = at_least_float32(x.dtype)
    frequency = theta ** (-jnp.arange(half, dtype=dtype) / half)
    size = 1.0
    if scaling:
        factors, size = scaled_rotation(scaling, theta, 2 * half)
        frequency = frequency * jnp.asarray(factors, dtype)
    angle = positions.astype(dtype)[..., None, None] * frequency
    return rotated_pairs(x, size * jnp.cos(angle), size * jnp.sin(angle))


def dropout(x: Float[Array, "B ..."], rate: float, keys: Key[Array, " B"] | None) -> Float[Array, "B ..."]:
    """Zero each entry with probability `rate`, and scale the others by 1 / (1 - rate). Without keys, or at 0: x."""
    if keys is None or rate == 0:
        return x
    return jnp.where(keep_mask(keys, rate, x.shape[1:]), x / (1 - rate), 0)


def keep_mask(keys: Key[Array, " B"], rate: float, shape: tuple[int, ...]) -> Bool[Array, "B ..."]:
    """False with probability `rate`, rounded to a multiple of 1 / 65,536. `shape` is the shape of one sequence's mask.

    One draw of 32 random bits serves two entries, because a CPU makes them slowly. With the barrier, the backward pass
    keeps the mask instead of the random bits.
    """
    count, least = math.prod(shape), jnp.uint32(min(round(rate * 2**16), 2**16 - 1) << 16)
    words = jax.vmap(lambda key: jax.random.bits(key, ((count + 1) // 2,), jnp.uint32))(keys)
    # Both halves of a word are compared while it is in a register, the lower one first, and written as two bytes.
    first, second = words << 16 >= least, words >= least
    pairs = first.astype(jnp.uint16) | (second.astype(jnp.uint16) << 8)
    kept = jax.lax.bitcast_convert_type(pairs, jnp.uint8).reshape(len(keys), -1)[:, :count]
    return jax.lax.optimization_barrier(kept.reshape(len(keys), *shape)) != 0
