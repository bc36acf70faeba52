"""Checks of chapter 18: weights of few bits."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from foundation import small_weights
from foundation.checks.inputs import Draws, filled_with
from foundation.parity import AnyCheck, Check, OracleCheck, as_jax


def small_weight_checks() -> Iterator[AnyCheck]:
    """Codes against a search of all codes, products three ways, and corrections against constrained least squares."""
    draws = Draws("small weights")
    w = draws.normal(8, 3)
    zeroed, one_large = w.copy(), w.copy()
    zeroed[:, 1], one_large[2] = 0.0, 9 * w[2]
    for name, matrix in (("ordinary", w), ("an output of zeros", zeroed), ("one large", one_large)):
        for most, group in ((127, 8), (7, 4)):
            yield OracleCheck(
                "quantize", f"{name}, to {most}", small_weights.quantize, searched, (matrix,), (most, group)
            )
    codes, scale = draws.integers(255, 4, 3) - 127.0, np.abs(draws.normal(3)) + 0.1

    def product(x: jax.Array, scale: jax.Array) -> tuple:
        return small_weights.coded_product_forward(x, as_jax(codes), scale)

    x = draws.normal(5, 4)
    yield Check("coded_product", "ordinary", product, small_weights.coded_product_backward, (x, scale))
    forward = filled_with(small_weights.output_error_forward, draws.normal(4, 3), x)
    yield Check("output_error", "ordinary", forward, small_weights.output_error_backward, (draws.normal(4, 3),))
    few = filled_with(small_weights.output_error_forward, draws.normal(4, 3), x[:2])
    yield Check(
        "output_error", "fewer tokens than inputs", few, small_weights.output_error_backward, (draws.normal(4, 3),)
    )
    tokens = draws.normal(20, 5) @ draws.normal(5, 5)
    inverse = jax.jit(small_weights.inverse_of_inputs, static_argnames="damping")(tokens, damping=0.0)
    for k in (0, 3):
        yield OracleCheck(
            "moved_by_one", f"weight {k}", small_weights.moved_by_one, by_multiplier, (inverse, k, np.array(0.7))
        )
        yield OracleCheck("without", f"weight {k}", small_weights.without, inverted_anew, (inverse,), (k,))
    for name, most in (("8 bits", 127), ("4 bits", 7)):
        weights = draws.normal(5, 4)
        step = np.max(np.abs(weights), axis=0) / most
        yield OracleCheck("gptq", name, small_weights.gptq, solved_anew, (weights, inverse, step), (most,))


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
