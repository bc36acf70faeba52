"""The choice between the forms of an operation that CPUs and cards have, and small operations with such forms.

The value is the same in all forms, up to rounding. `benchmarks/performance.md` has the gain of each.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FORMS = "MOE_JAX_FORMS"
"""Name of the environment variable that asks for the forms of a card (`gpu`) on every device."""


def by_platform[T](*operands: Any, cpu: Callable[..., T], default: Callable[..., T]) -> T:
    """`cpu(*operands)` in a program for a CPU, and `default(*operands)` in a program for a card.

    With MOE_JAX_FORMS=gpu it is `default` everywhere. So the forms of a card are tried without one.
    """
    if os.environ.get(FORMS) == "gpu":
        return default(*operands)
    return jax.lax.platform_dependent(*operands, cpu=cpu, default=default)


@jax.custom_vjp
def rotated_pairs(
    x: Float[Array, "B T H A"], cos: Float[Array, "*#B T 1 half"], sin: Float[Array, "*#B T 1 half"]
) -> Float[Array, "B T H A"]:
    """Each pair (a, b) of a head as (a cos - b sin, b cos + a sin).

    The gradient is the rotation back. By autodiff it would be a sum of padded arrays, which XLA computes number by
    number on a CPU.
    """
    return by_platform(x, cos, sin, cpu=_rotated_on_cpu, default=_rotated_by_halves)


def _rotated_by_halves(x: Array, cos: Array, sin: Array) -> Array:
    half = x.shape[-1] // 2
    a, b = x[..., :half].astype(cos.dtype), x[..., half:].astype(cos.dtype)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _rotated_on_cpu(x: Array, cos: Array, sin: Array) -> Array:
    """The same, as (a, b) * (cos, cos) + (b, a) * (-sin, sin). The barrier makes XLA write (b, a) to memory. What
    remains is one loop over whole heads."""
    other = jax.lax.optimization_barrier(jnp.roll(x, x.shape[-1] // 2, axis=-1))
    cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    return (x.astype(cos.dtype) * cos + other.astype(cos.dtype) * sin).astype(x.dtype)


def _rotate_forward(x: Array, cos: Array, sin: Array) -> tuple[Array, tuple[Array, Array]]:
    return rotated_pairs(x, cos, sin), (cos, sin)


def _rotate_backward(residuals: tuple[Array, Array], d_y: Array) -> tuple[Array, None, None]:
    cos, sin = residuals
    return rotated_pairs(d_y, cos, -sin), None, None


rotated_pairs.defvjp(_rotate_forward, _rotate_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def split_heads(
    qkv: Float[Array, "B T heads A"], queries: int
) -> tuple[Float[Array, "B T H A"], Float[Array, "B T KV A"], Float[Array, "B T KV A"]]:
    """The heads of the queries, the keys and the values: the first `queries` heads, and two halves of the others.

    The gradient is written as the concatenation that it is. By autodiff it is a sum of padded arrays, which a CPU
    computes number by number.
    """
    query, key, value = jnp.split(qkv, [queries, (queries + qkv.shape[2]) // 2], axis=2)
    return query, key, value


def _split_backward(queries: int, residuals: None, d_parts: tuple[Array, Array, Array]) -> tuple[Array]:
    return (jnp.concatenate(d_parts, axis=2),)


split_heads.defvjp(lambda qkv, queries: (split_heads(qkv, queries), None), _split_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def rounded_once(
    function: Callable[..., Array], gate: Float[Array, "*G"] | None, *hidden: Float[Array, "*G F"]
) -> Float[Array, "*G F"]:
    """function(gate, *hidden), where `hidden` are narrower than float32. On a CPU it is computed in float32 and rounded
    at the end: there XLA would round the result of each operation."""
    return by_platform(gate, *hidden, cpu=partial(_in_float32, function), default=function)


def _in_float32(function: Callable[..., Array], gate: Array | None, *hidden: Array) -> Array:
    return function(gate, *(h.astype(jnp.float32) for h in hidden)).astype(hidden[0].dtype)


def _rounded_once_forward(function: Callable[..., Array], *arguments: Any) -> tuple[Array, tuple[Any, ...]]:
    return rounded_once(function, *arguments), arguments


def _rounded_once_backward(function: Callable[..., Array], arguments: tuple[Any, ...], d_y: Array) -> tuple[Any, ...]:
    def gradients(function: Callable[..., Array], d_y: Array, *arguments: Any) -> tuple[Any, ...]:
        return jax.vjp(function, *arguments)[1](d_y)

    on_cpu = partial(gradients, partial(_in_float32, function))
    return by_platform(d_y, *arguments, cpu=on_cpu, default=partial(gradients, function))


rounded_once.defvjp(_rounded_once_forward, _rounded_once_backward)
