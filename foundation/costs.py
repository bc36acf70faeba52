"""What a training step costs: floating-point operations (FLOP), bytes, and the larger of two times. Chapter 16.

A product of [n, k] and [k, m] costs 2 n k m FLOP forward, and twice that backward: 6 N D for N matrix entries and D
tokens. Scores and their mixture have no weights: 4 T W forward for each token and layer, with T keys of width W.

    time >= max(FLOP / rate, bytes / bandwidth)                     the roofline
    C = A B in n / b steps, each with b columns of A and b rows of B: each step reads and writes all of C

Sources: Kaplan et al. 2020, section 2.1 (6 N D); Williams et al. 2009, section 3 (roofline); Hong and Kung 1981.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float


def step_flops(layers: int, width: int, hidden: int, vocabulary: int, batch: int, positions: int) -> tuple[int, int]:
    """(6 N D, what attention adds) of a step of the dense transformer of chapter 7, backward pass included."""
    entries = layers * (4 * width**2 + 3 * width * hidden) + vocabulary * width
    tokens = batch * positions
    return 6 * entries * tokens, 3 * layers * 4 * positions * width * tokens


def steps_traffic(n: int, block: int) -> int:
    """Numbers that pass between memory and processor in an n x n product of n / block steps: the sum of the parts of A
    and B, and C read and written in each step."""
    return 2 * n * n + n // block * 2 * n * n


def least_time(flops: float, moved: float, rate: float, bandwidth: float) -> float:
    """Seconds: neither the arithmetic nor the memory can be faster."""
    return max(flops / rate, moved / bandwidth)


def power_law(budgets: Sequence[float], losses: Sequence[float], floor: float = 0.0) -> Float[Array, " 2"]:
    """(a, b) of L = floor + a C^-b, by least squares in log C and log (L - floor)."""
    x, y = jnp.log(jnp.asarray(budgets)), jnp.log(jnp.asarray(losses) - floor)
    away = x - jnp.mean(x)
    slope = jnp.sum(away * y) / jnp.sum(away**2)
    return jnp.stack([jnp.exp(jnp.mean(y) - slope * jnp.mean(x)), -slope])
