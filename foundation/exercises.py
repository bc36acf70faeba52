"""The exercises of the notebooks: each checks an answer by code, and knows one right answer.

In a notebook:

    ask("1.1")                 prints the question
    check("1.1", answer)       says right, or gives a hint; None means "not tried yet"
    solution("1.1")            a right answer, for when you have tried
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from foundation.parity import max_relative_error


@dataclass(frozen=True)
class Exercise:
    """One question; `right` judges an answer, `hint` helps, `solution` is a right answer."""

    question: str
    right: Callable[[Any], bool]
    hint: str
    solution: Any


def ask(number: str) -> None:
    """Prints the question."""
    print(f"Exercise {number}. {EXERCISES[number].question}")


def check(number: str, answer: Any) -> bool | None:
    """Says whether the answer is right; None, the state before a try, is neither right nor wrong."""
    if answer is None:
        print(f"{number}: not tried yet.")
        return None
    exercise = EXERCISES[number]
    right = exercise.right(answer)
    print(f"{number}: right." if right else f"{number}: not yet. Hint: {exercise.hint}")
    return right


def solution(number: str) -> Any:
    """A right answer."""
    return EXERCISES[number].solution


def number(expected: float, tolerance: float = 1e-3) -> Callable[[Any], bool]:
    """Right where the answer is this number, to a relative tolerance."""
    return lambda answer: math.isclose(float(answer), expected, rel_tol=tolerance, abs_tol=1e-12)


def function(expected: Callable[..., Any], *shapes: tuple[int, ...]) -> Callable[[Any], bool]:
    """Right where the answer is a function that equals `expected` on random arrays of these shapes."""

    def judge(answer: Callable[..., Any]) -> bool:
        arrays = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
        ours, right = jnp.asarray(answer(*arrays)), jnp.asarray(expected(*arrays))
        return ours.shape == right.shape and max_relative_error(ours, right) < 1e-4

    return judge


def _softplus_slope(x: jax.Array) -> jax.Array:
    return 1.0 / (1.0 + jnp.exp(-x))


def _linear_d_kernel(x: jax.Array, d_y: jax.Array) -> jax.Array:
    return x.T @ d_y


def _leaky_slope(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, 1.0, 0.1)


def _smoothed(p: jax.Array, onehot: jax.Array) -> jax.Array:
    return p - (0.9 * onehot + 0.1 / p.shape[-1])


def _l2_norm_gradient(x: jax.Array, d_y: jax.Array) -> jax.Array:
    length = jnp.sqrt(jnp.sum(x**2))
    n = x / length
    return (d_y - n * jnp.sum(d_y * n)) / length


def _score_gradient(d_scores: jax.Array, q: jax.Array) -> jax.Array:
    return d_scores.T @ q / math.sqrt(q.shape[-1])


def _sigmoid_gate_gradient(z: jax.Array, d_g: jax.Array) -> jax.Array:
    g = _softplus_slope(z)
    return d_g * g * (1.0 - g)


EXERCISES: dict[str, Exercise] = {
    "1.1": Exercise(
        "y = a b + a, at a = 3, b = -2. What is dy/da?",
        number(-1.0),
        "a is used twice; each use contributes, and the contributions add.",
        -1.0,
    ),
    "1.2": Exercise(
        "softplus(x) = ln(1 + e^x). Write its derivative as a function of x.",
        function(_softplus_slope, (7,)),
        "Chain rule: 1/(1 + e^x) times e^x; divide above and below by e^x.",
        _softplus_slope,
    ),
    "2.1": Exercise(
        "y = x W with x [B, I]. Write a function of (x, d_y) that gives d_W.",
        function(_linear_d_kernel, (5, 3), (5, 2)),
        "d_W has the shape of W, [I, O]; only one product of x and d_y has it. And no division by B.",
        _linear_d_kernel,
    ),
    "2.2": Exercise(
        "A batch of 4; d_W is divided by the batch a second time. What is the relative error of d_W?",
        number(0.75),
        "|g - g/4| / |g|.",
        0.75,
    ),
    "3.1": Exercise(
        "leaky ReLU: y = x where x > 0, else x / 10. Write its derivative as a function of x.",
        function(_leaky_slope, (9,)),
        "Two cases, two constants; jnp.where.",
        _leaky_slope,
    ),
    "3.2": Exercise(
        "Var(W) = 1 / fan_in and ReLU. By what factor does the mean square of a signal change over 20 layers?",
        number(2.0**-20),
        "He et al.: ReLU halves the second moment, once a layer.",
        2.0**-20,
    ),
    "4.1": Exercise(
        "The loss of a uniform guess over V = 50,257 tokens, in nats?",
        number(math.log(50_257)),
        "-ln(1/V).",
        math.log(50_257),
    ),
    "4.2": Exercise(
        "Label smoothing: the target is 0.9 onehot + 0.1 / V. Write d_logits of one row as a function of (p, onehot).",
        function(_smoothed, (6,), (6,)),
        "d_logits is p minus the target, for any target that sums to 1.",
        _smoothed,
    ),
    "5.1": Exercise(
        "S = q k^T / sqrt(A). Write a function of (d_S, q) that gives d_k.",
        function(_score_gradient, (4, 5), (4, 3)),
        "The scores' columns are keys: d_k needs d_S transposed, and the 1 / sqrt(A) of the forward pass.",
        _score_gradient,
    ),
    "5.2": Exercise(
        "Causal attention over T = 256 positions: which share of the scores is masked away?",
        number(255 / 512),
        "T (T - 1) / 2 of T^2.",
        255 / 512,
    ),
    "6.1": Exercise(
        "n = x / |x| for one vector x. Write d_x as a function of (x, d_n).",
        function(_l2_norm_gradient, (5,), (5,)),
        "As in RMSNorm: take the part along n out of d_n, then divide by the length.",
        _l2_norm_gradient,
    ),
    "6.2": Exercise(
        "RoPE, A = 64: after how many positions has the slowest pair turned once?",
        number(2.0 * math.pi * 10_000.0 ** (62 / 64)),
        "Its frequency is 10000^(-62/64); a turn is 2 pi.",
        2.0 * math.pi * 10_000.0 ** (62 / 64),
    ),
    "7.1": Exercise(
        "Suppose gates were sigmoid(z) of each chosen logit, not renormalised. Write d_z of (z, d_g).",
        function(_sigmoid_gate_gradient, (6,), (6,)),
        "Without renormalisation gates don't see each other: the Jacobian is diagonal.",
        _sigmoid_gate_gradient,
    ),
    "7.2": Exercise(
        "E = 8, and every token sends its one choice to expert 0 with probability 1. What is the balance loss?",
        number(8.0),
        "E sum_e f_e P_e with f_0 = P_0 = 1.",
        8.0,
    ),
    "8.1": Exercise(
        "T = 100, E = 10, K = 2, capacity factor 1.1. How many places has an expert?",
        number(22.0, 1e-9),
        "ceil(1.1 T K / E), in exact arithmetic.",
        22.0,
    ),
    "8.2": Exercise(
        "L = 6, z_coef = 0.001. The z-loss of one layer rises by 1. By how much does the training loss rise?",
        number(0.001 / 6),
        "Auxiliary losses are averaged over layers.",
        0.001 / 6,
    ),
}
