"""Checks of chapter 18: weights of few bits."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from foundation import small_weights as small
from foundation.checks.inputs import Draws, answer, gradient
from foundation.parity import AnyCheck


def checks() -> Iterator[AnyCheck]:
    """Codes against a search of all codes, products three ways, and corrections against constrained least squares."""
    draws = Draws("small weights")
    w = draws.normal(8, 3)
    zeroed, one_large = w.copy(), w.copy()
    zeroed[:, 1], one_large[2] = 0.0, 9 * w[2]
    for name, matrix in (("ordinary", w), ("an output of zeros", zeroed), ("one large", one_large)):
        for most, group in ((127, 8), (7, 4)):
            yield answer(small.quantize, f"{name}, to {most}", searched, (matrix,), most, group)
    codes, scale = draws.integers(255, 4, 3) - 127.0, np.abs(draws.normal(3)) + 0.1
    x, w = draws.normal(5, 4), draws.normal(4, 3)
    yield gradient(small.coded_product_forward, "ordinary", (x, scale), codes)
    yield gradient(small.output_error_forward, "ordinary", (draws.normal(4, 3),), w, x)
    yield gradient(small.output_error_forward, "fewer tokens than inputs", (draws.normal(4, 3),), w, x[:2])
    tokens = draws.normal(20, 5) @ draws.normal(5, 5)
    inverse = jax.jit(small.inverse_of_inputs, static_argnames="damping")(tokens, damping=0.0)
    for k in (0, 3):
        yield answer(small.moved_by_one, f"weight {k}", by_multiplier, (inverse, k, np.array(0.7)))
        yield answer(small.without, f"weight {k}", inverted_anew, (inverse,), k)
    for name, most in (("8 bits", 127), ("4 bits", 7)):
        weights = draws.normal(5, 4)
        step = np.max(np.abs(weights), axis=0) / most
        yield answer(small.gptq, name, solved_anew, (weights, inverse, step), most)


def searched(w: Any, most: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Of all codes the one that is nearest, entry by entry."""
    w = np.asarray(w)
    codes, scales = np.zeros_like(w), np.zeros((len(w) // group, w.shape[1]))
    everything = np.arange(-most, most + 1)
    for d, o in np.ndindex(*w.shape):
        first = d // group * group
        scales[d // group, o] = scale = np.abs(w[first : first + group, o]).max() / most
        codes[d, o] = everything[np.argmin(np.abs(scale * everything - w[d, o]))] if scale else 0
    return codes, scales


def by_multiplier(inverse: Any, k: Any, error: Any) -> tuple[np.ndarray, np.ndarray]:
    """The conditions of Lagrange as one linear system in d and the multiplier."""
    h = np.linalg.inv(np.asarray(inverse))
    size, k, error = len(h), int(k), float(error)
    unit = np.eye(size)[k]
    system = np.block([[2.0 * h, -unit[:, None]], [unit[None], np.zeros((1, 1))]])
    d = np.linalg.solve(system, np.append(np.zeros(size), error))[:size]
    return d, np.asarray(d @ h @ d)


def inverted_anew(inverse: Any, k: int) -> np.ndarray:
    """H with row and column k taken out, inverted, and zeros put in their place."""
    h = np.linalg.inv(np.asarray(inverse))
    rest = np.delete(np.delete(h, k, 0), k, 1)
    return np.insert(np.insert(np.linalg.inv(rest), k, 0.0, 0), k, 0.0, 1)


def solved_anew(w: Any, inverse: Any, scale: Any, most: int) -> np.ndarray:
    """Each output by itself. After each rounding, the free weights are the solution of a new least-squares problem."""
    root = np.linalg.cholesky(np.linalg.inv(np.asarray(inverse))).T  # |root d|^2 = d^T H d
    w, codes = np.asarray(w), np.zeros(np.shape(w))
    for o, step in enumerate(np.asarray(scale)):
        v = w[:, o].copy()
        for k in range(len(v)):
            codes[k, o] = np.clip(np.rint(v[k] / step), -most, most)
            v[k] = step * codes[k, o]
            fixed = root[:, : k + 1] @ (v - w[:, o])[: k + 1]
            v[k + 1 :] = w[k + 1 :, o] + np.linalg.lstsq(root[:, k + 1 :], -fixed, rcond=None)[0]
    return codes
