"""The small parts: initial values, normalisation, rotary positions, dropout."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from moe_jax.config import Norm
from moe_jax.model.precision import at_least_float32


def matrix_init(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float = 1.0) -> Float[Array, "..."]:
    """Normal with variance scale^2 / fan-in (LeCun et al. 1998, section 4.6); fan-in is the last axis but one."""
    return jax.random.normal(rngs.params(), shape) * (scale / math.sqrt(shape[-2]))


def embedding_init(rngs: nnx.Rngs, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Normal with variance 1 / width: rows of length 1, and logits of variance 1 where the head is tied.

    Much smaller rows (0.02 is usual) drown in what the first blocks add to them, and copying a word said before, for
    which the rows must stay legible, is then learned late: measured on preset nano.
    """
    return jax.random.normal(rngs.params(), shape) / math.sqrt(shape[-1])


class Normalisation(nnx.Module):
    """LayerNorm (Ba et al. 2016, equation 4; eps 1e-5) or RMSNorm (Zhang and Sennrich 2019, equation 4; eps 1e-6).

    Statistics in at least float32. Parameters: scale `[D]`, and for LayerNorm with biases bias `[D]`.
    """

    def __init__(self, kind: Norm, width: int, bias: bool) -> None:
        self.kind = kind
        self.scale = nnx.Param(jnp.ones(width))
        if kind == "layernorm" and bias:
            self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        wide = x.astype(at_least_float32(x.dtype))
        if self.kind == "layernorm":
            wide = wide - wide.mean(-1, keepdims=True)
        eps = 1e-5 if self.kind == "layernorm" else 1e-6
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
        wide = wide * self.scale[...]
        if hasattr(self, "bias"):
            wide = wide + self.bias[...]
        return wide.astype(x.dtype)


def rotate(x: Float[Array, "B T H A"], positions: Int[Array, " T"]) -> Float[Array, "B T H A"]:
    """Rotary position embedding (Su et al. 2021, section 3.2), base 10000, pairs (i, i + A/2).

    Pair i of a head is turned by positions * 10000^(-2i/A), so that q . k depends on the distance only.
    """
    half = x.shape[-1] // 2
    dtype = at_least_float32(x.dtype)
    frequency = 10_000.0 ** (-jnp.arange(half, dtype=dtype) / half)
    angle = positions.astype(dtype)[:, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(dtype), x[..., half:].astype(dtype)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def dropout(x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, "..."]:
    """Zero a share `rate` of the entries and scale the rest by 1 / (1 - rate); without a key, or at rate 0, x."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)
