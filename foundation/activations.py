"""Elementwise nonlinearities y = f(x). The Jacobian is diagonal, so d_x = d_y * f'(x). Derived in chapter 3.

tanh and sigmoid compute f' from their output, the others from their input: that is what each cache holds.

Sources: ReLU: Glorot, Bordes and Bengio 2011, section 3.1. GELU: Hendrycks and Gimpel 2016, section 2 (both forms).
SiLU: Elfwing, Uchibe and Doya 2017, equations 2 and 3; Ramachandran et al. 2017 call it Swish.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax.scipy.special import erf
from jaxtyping import Array, Float

Elementwise = Float[Array, "*shape"]

# GELU's tanh form: sqrt(2 / pi) and the cubic coefficient of Hendrycks and Gimpel 2016, section 2.
_GELU_SCALE = math.sqrt(2.0 / math.pi)
_GELU_CUBIC = 0.044715


def tanh_forward(x: Elementwise) -> tuple[Elementwise, tuple]:
    """y = tanh(x)."""
    y = jnp.tanh(x)
    return y, (y,)


def tanh_backward(d_y: Elementwise, cache: tuple) -> Elementwise:
    """tanh' = 1 - tanh^2, from the output alone."""
    (y,) = cache
    return d_y * (1.0 - y**2)


def sigmoid_forward(x: Elementwise) -> tuple[Elementwise, tuple]:
    """y = 1 / (1 + exp(-x)), written as (1 + tanh(x/2)) / 2, which cannot overflow."""
    y = 0.5 * (1.0 + jnp.tanh(0.5 * x))
    return y, (y,)


def sigmoid_backward(d_y: Elementwise, cache: tuple) -> Elementwise:
    """sigmoid' = y (1 - y), from the output alone."""
    (y,) = cache
    return d_y * y * (1.0 - y)


def relu_forward(x: Elementwise) -> tuple[Elementwise, tuple]:
    """y = max(x, 0)."""
    return jnp.where(x > 0, x, 0.0), (x > 0,)


def relu_backward(d_y: Elementwise, cache: tuple) -> Elementwise:
    """relu' = 1 where x > 0, else 0, also at the kink."""
    (positive,) = cache
    return jnp.where(positive, d_y, 0.0)


def gelu_exact_forward(x: Elementwise) -> tuple[Elementwise, tuple]:
    """y = x Phi(x), with Phi(x) = (1 + erf(x / sqrt 2)) / 2: how likely a normal number is below x."""
    return x * _normal_cdf(x), (x,)


def gelu_exact_backward(d_y: Elementwise, cache: tuple) -> Elementwise:
    """Product rule: (x Phi)' = Phi(x) + x phi(x), with phi = Phi' the normal density."""
    (x,) = cache
    density = jnp.exp(-0.5 * x**2) / math.sqrt(2.0 * math.pi)
    return d_y * (_normal_cdf(x) + x * density)


def gelu_forward(x: Elementwise) -> tuple[Elementwise, tuple]:
    """y = x (1 + tanh(u)) / 2 with u = sqrt(2/pi) (x + 0.044715 x^3): the form that the experts use."""
    t = jnp.tanh(_GELU_SCALE * (x + _GELU_CUBIC * x**3))
    return 0.5 * x * (1.0 + t), (x, t)


def gelu_backward(d_y: Elementwise, cache: tuple) -> Elementwise:
    """y' = (1 + t)/2 + x/2 (1 - t^2) u', with t = tanh(u) and u' = sqrt(2/pi) (1 + 3 * 0.044715 x^2)."""
    x, t = cache
    d_u = _GELU_SCALE * (1.0 + 3.0 * _GELU_CUBIC * x**2)
    return d_y * (0.5 * (1.0 + t) + 0.5 * x * (1.0 - t**2) * d_u)


def silu_forward(x: Elementwise) -> tuple[Elementwise, tuple]:
    """y = x s, with s = sigmoid(x)."""
    s, _ = sigmoid_forward(x)
    return x * s, (x, s)


def silu_backward(d_y: Elementwise, cache: tuple) -> Elementwise:
    """Product rule, with s' = s (1 - s): y' = s + x s (1 - s) = s (1 + x (1 - s))."""
    x, s = cache
    return d_y * s * (1.0 + x * (1.0 - s))


def _normal_cdf(x: Elementwise) -> Elementwise:
    return 0.5 * (1.0 + erf(x / math.sqrt(2.0)))


ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {
    "tanh": (tanh_forward, tanh_backward),
    "sigmoid": (sigmoid_forward, sigmoid_backward),
    "relu": (relu_forward, relu_backward),
    "gelu_exact": (gelu_exact_forward, gelu_exact_backward),
    "gelu": (gelu_forward, gelu_backward),
    "silu": (silu_forward, silu_backward),
}
