"""A right answer to each exercise. The questions, the hints and likely mistakes are in `exercises.toml`.

A whole number or a fraction must be met exactly, another number to four digits.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.nn import softmax


def _l2_norm_gradient(x: Array, d_n: Array) -> Array:
    length = jnp.sqrt(jnp.sum(x**2))
    n = x / length
    return (d_n - n * jnp.sum(d_n * n)) / length


def _angle_gradient(x: Array, t: Array, d_y: Array) -> Array:
    c, s = jnp.cos(t), jnp.sin(t)
    return d_y[0] * (-s * x[0] - c * x[1]) + d_y[1] * (c * x[0] - s * x[1])


def _sigmoid_gate_gradient(z: Array, d_g: Array) -> Array:
    g = 1.0 / (1.0 + jnp.exp(-z))
    return d_g * g * (1.0 - g)


def _unit_gates_gradient(z: Array, d_g: Array) -> Array:
    g = jnp.exp(z) / jnp.sqrt(jnp.sum(jnp.exp(2.0 * z)))
    return g * (d_g - g * jnp.sum(g * d_g))


def _squared_shares_gradient(z: Array, f: Array) -> Array:
    tokens, experts = z.shape
    p, w = softmax(z), f**2
    mean = jnp.sum(p * w, axis=-1, keepdims=True)
    return experts / tokens * p * (w - mean)


def _merged_answers(a: Array, la: Array, b: Array, lb: Array) -> Array:
    share = 1.0 / (1.0 + jnp.exp(lb - la))[:, None]
    return share * a + (1.0 - share) * b


def _newest_output(q: Array, k: Array, v: Array) -> Array:
    weights = jnp.exp(k @ q / math.sqrt(q.shape[-1]))
    return weights @ v / jnp.sum(weights)


def _weights_under_perplexity(m: Array, n: Array) -> Array:
    share = n / jnp.sum(n)
    return jnp.exp(jnp.sum(share * m)) * share


def _parted(z: Array, h: Array, d_y: Array) -> Array:
    g = jnp.exp(z) / jnp.sum(jnp.exp(z))
    d_g = h @ d_y
    return g * (d_g - g @ d_g)


def _gated_in_parts(x: Array, G: Array, U: Array, W: Array, d_y: Array) -> Array:
    d_h = d_y @ W.mT
    return jnp.sum((d_h * (x @ U)) @ G.mT + (d_h * (x @ G)) @ U.mT, axis=0)


def _unigram_bits(counts: Array, lengths: Array) -> Array:
    n = jnp.abs(counts)
    return -jnp.sum(n * jnp.log2(n / jnp.sum(n))) / jnp.sum(n * jnp.abs(lengths))


def _bonus_gradient(z: Array, r: Array) -> Array:
    p = softmax(z)
    d_p = r - 0.1 * jnp.log(p) - 0.1
    return p * (d_p - jnp.sum(p * d_p))


SOLUTIONS: dict[str, float | Fraction | Callable[..., Any]] = {
    "0.1": 300,
    "0.2": lambda A, d_y: A.T @ d_y,
    "0.3": 0.01,
    "0.4": lambda d_y: jnp.cumsum(d_y[::-1])[::-1],
    "1.1": 4,
    "1.2": lambda x: 1.0 / (1.0 + jnp.exp(-x)),
    "1.3": -2,
    "2.1": lambda x, W, d_y: x.T @ (d_y @ W) + d_y.T @ (x @ W),
    "2.2": 4,
    "2.3": lambda x, d_y: jnp.sum(x * d_y),
    "3.1": lambda x: jnp.where(x > 0, 1.0, 0.1),
    "3.2": 2.0**-20,
    "3.3": 4,
    "4.1": math.log(50_257),
    "4.2": lambda p, onehot: p - (0.9 * onehot + 0.1 / p.shape[-1]),
    "4.3": lambda p, d_p: 2.0 * p * (d_p - jnp.sum(p * d_p)),
    "5.1": lambda q, k, d_S: q.T @ d_S @ k,
    "5.2": 255 / 512,
    "5.3": lambda P, d_o: (1.0 - jnp.sum(P, axis=1)) @ d_o,
    "6.1": _l2_norm_gradient,
    "6.2": 2.0 * math.pi * 10_000.0 ** (62 / 64),
    "6.3": _angle_gradient,
    "7.1": lambda d_y, d_a, d_f, M: d_y + (d_a + d_f) @ M.T,
    "7.2": 53_376,
    "7.3": lambda a, u, d_h: d_h * u * 2.0 * jnp.maximum(a, 0.0),
    "8.1": _sigmoid_gate_gradient,
    "8.2": 8,
    "8.3": _unit_gates_gradient,
    "8.4": _squared_shares_gradient,
    "8.5": 5,
    "9.1": 22,
    "9.2": 0.001 / 6,
    "9.3": lambda d_x, x, d_l: math.sqrt(x.shape[-1]) * jnp.sum(d_x, axis=0) + d_l @ x,
    "10.1": 0.01,
    "10.2": lambda g: jnp.where(jnp.abs(g) == jnp.max(jnp.abs(g)), -jnp.sign(g), 0.0),
    "10.3": lambda g: jnp.mean(g**2, axis=1),
    "11.1": 1.0 + 3.0 * math.exp(-3.0),
    "11.2": _merged_answers,
    "11.3": lambda p_b, d_o, o: -p_b * jnp.sum(d_o * o, axis=-1),
    "12.1": 24_576,
    "12.2": 103,
    "12.3": _newest_output,
    "13.1": 0.4,
    "13.2": _weights_under_perplexity,
    "13.3": lambda f: f.shape[1] / f.shape[0] * (f - jnp.mean(f, axis=0, keepdims=True)),
    "14.1": Fraction(3, 10),
    "14.2": _parted,
    "14.3": 102.4,
    "15.1": 0.625,
    "15.2": lambda u, v: jnp.sum(jnp.minimum(softmax(u), softmax(v))),
    "15.3": 3.439,
    "16.1": 1.2e20,
    "16.2": 990 / 3.35,
    "16.3": 1024,
    "17.1": 192,
    "17.2": 3.25,
    "17.3": lambda x, s: x / jnp.abs(s) - jnp.floor(x / jnp.abs(s)),
    "18.1": Fraction(27, 8),
    "18.2": lambda x, q, d_y: jnp.sum(x * (d_y @ q.T), axis=0),
    "18.3": Fraction(-3, 10),
    "19.1": 8,
    "19.2": lambda d_y: jnp.cumsum(d_y[::-1], axis=0)[::-1],
    "19.3": Fraction(375, 2),
    "19.4": _gated_in_parts,
    "19.5": 38.5,
    "20.1": 4,
    "20.2": 2.8 / 4 / math.log(2.0),
    "20.3": _unigram_bits,
    "21.1": 4 / 3,
    "21.2": _bonus_gradient,
    "21.3": lambda z, q: softmax(z) - softmax(q),
}
