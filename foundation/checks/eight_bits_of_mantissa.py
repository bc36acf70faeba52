"""Checks of chapter 17: numbers with 8 bits of mantissa."""

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np

from foundation import rounding
from foundation.checks.inputs import Draws, answer
from foundation.parity import OracleCheck

LOWER = (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
"""Lower halves beside which rounding could go wrong."""


def checks() -> Iterator[OracleCheck]:
    """Every pattern of bfloat16, and draws, sums and scales against whole numbers, fractions and NumPy's types."""
    draws = Draws("rounding")
    for lower in LOWER:
        yield answer(rounding.nearest_bits, f"every upper half, {lower:#06x}", cast, (finite_patterns(lower),))
    bits = (draws.normal(64) * 10.0 ** draws.integers(9, 64)).astype(np.float32).view(np.uint32)
    draw = draws.integers(rounding.HALF, 64).astype(np.uint32)
    yield answer(rounding.drawn_bits, "ordinary", by_distance, (bits, draw))
    edges = np.array([0x3F7F8000, 0x3F7F8000, 0xBF7FFFFF, 0xBF7FFFFF, 0x3F800000], np.uint32)
    at = np.array([0x7FFF, 0x8000, 0, 1, 0xFFFF], np.uint32)
    yield answer(rounding.drawn_bits, "the exponent changes", by_distance, (edges, at))
    x = np.array([1.0, 1.0005, -2.9, 0.99999, 3e-8, 12345.678], np.float32).astype(np.float64)
    yield answer(rounding.mean_of_draws, "all 65,536", lambda x: x, (x,))
    yield answer(rounding.running_sum, "of ones", lambda x: np.minimum(np.cumsum(x), 256), (np.ones(300),))
    terms = draws.generator.random(200).astype(np.float32).astype(np.float64)
    yield answer(rounding.running_sum, "of fractions", added_up, (terms,))
    for name, size in (("ordinary", 1.0), ("below 2^-14", 2e-5), ("up to the largest", 2e4)):
        yield answer(rounding.to_float16, name, as_float16, (size * np.clip(draws.normal(40), -3.0, 3.0),))
    ties = np.array([2.0**-25, 3 * 2.0**-25, 1 + 2.0**-11, 1 + 3 * 2.0**-11])
    yield answer(rounding.to_float16, "ties", as_float16, (ties,))
    small = draws.generator.uniform(5e-8, 3e-7, 12) * draws.generator.choice([-1.0, 1.0], 12)
    for k in (14, 20):
        yield answer(rounding.through_scale, f"2^{k}", eleven_bits, (small, np.array(2.0**k)))


def finite_patterns(lower: int) -> np.ndarray:
    """uint32: every upper half of a finite float32, with this lower half."""
    upper = np.arange(1 << 16, dtype=np.uint32)
    return (upper[upper & 0x7F80 != 0x7F80] << 16) | np.uint32(lower)


def cast(bits: Any) -> np.ndarray:
    """The bits of `ml_dtypes`' own cast to bfloat16."""
    return np.asarray(bits).view(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)


def by_distance(bits: Any, draw: Any) -> np.ndarray:
    """The neighbour away from zero where the draw is among the last `distance` of 2^16; in fractions."""
    out = []
    for pattern, r in zip(np.asarray(bits), np.asarray(draw), strict=True):
        near = int(pattern) >> 16
        x, low, high = (magnitude(p) for p in (int(pattern), near << 16, (near + 1) << 16))
        out.append(near + (Fraction(int(r), 1 << 16) >= 1 - (x - low) / (high - low)))
    return np.array(out)


def magnitude(pattern: int) -> Fraction:
    """|x| of a float32, from its fields."""
    exponent, mantissa = (pattern >> 23) & 0xFF, pattern & 0x7FFFFF
    return Fraction(mantissa + (exponent > 0) * (1 << 23)) * Fraction(2) ** (max(exponent, 1) - 150)


def added_up(terms: Any) -> np.ndarray:
    """NumPy's sums in bfloat16, in turn."""
    sums, total = [], ml_dtypes.bfloat16(0)
    for term in np.asarray(terms):
        total = ml_dtypes.bfloat16(float(total) + term)
        sums.append(float(total))
    return np.array(sums)


def as_float16(x: Any) -> np.ndarray:
    """NumPy's cast."""
    return np.asarray(x).astype(np.float16).astype(np.float64)


def eleven_bits(gradient: Any, scale: Any) -> np.ndarray:
    """Rounded to 11 bits of mantissa, with no limit to the exponent. The scale does not matter."""
    return np.array([math.ldexp(round(math.ldexp(m, 11)), e - 11) for m, e in map(math.frexp, np.asarray(gradient))])
