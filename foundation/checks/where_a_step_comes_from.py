"""Checks of chapter 10: where a step comes from."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from foundation import adafactor, optimizers, steepest
from foundation.checks.inputs import Draws, answer, gradient
from foundation.parity import AnyCheck


def checks() -> Iterator[AnyCheck]:
    """Dual norms three ways; steepest steps against enumeration; each optimizer against its whole history at once."""
    for size, case, shape in (
        ("euclidean", "wide", (3, 5)),
        ("entries", "wide", (3, 5)),
        ("spectral", "wide", (3, 5)),
        ("spectral", "square", (3, 3)),
    ):
        g = Draws(f"dual_norm/{size}/{case}").normal(*shape)
        margin = np.min(np.abs(g)) if size == "entries" else float("inf")
        yield gradient(steepest.dual_norm_forward, f"{size}, {case}", (g,), size, margin=margin)
    g = Draws("steepest_step").normal(2, 2)
    for size, oracle in (("entries", best_corner), ("spectral", best_turn)):
        yield answer(steepest.steepest_step, size, oracle, (g,), size)
    yield answer(steepest.output_change, "one token", step_and_look, (g[0], g[1] + 1.0), 0.1)
    for case, shape in (("tall", (6, 3)), ("wide", (3, 7)), ("one column", (4, 1))):
        matrix = Draws(f"orthogonalize/{case}").normal(*shape)
        yield answer(optimizers.orthogonalize, case, by_singular_values, (matrix,))
    yield from adafactor_checks()
    draws = Draws("optimizer paths")
    grads, start = draws.normal(5, 3, 4), draws.normal(3, 4)
    for case, decay in (("Adam", 0.0), ("AdamW", 0.3)):
        adam = path(optimizers.adam_init, optimizers.adam_update, beta2=0.95, weight_decay=decay)
        yield answer(adam, case, adam_from_history, (grads, start), decay, operation="adam")
    muon = path(optimizers.muon_init, optimizers.muon_update, weight_decay=0.2)
    for case, shape in (("wide", (3, 4)), ("tall", (4, 3))):
        inputs = (grads.reshape(5, *shape), start.reshape(shape))
        yield answer(muon, case, muon_from_history, inputs, operation="muon")


def adafactor_checks() -> Iterator[AnyCheck]:
    """The divergence three ways, its minimum by alternating minimisation, and the steps from the whole history."""
    for case, shape in (("wide", (3, 5)), ("one row", (1, 4))):
        draws = Draws(f"divergence/{case}")
        square, row, column = (0.1 + draws.normal(*s) ** 2 for s in (shape, shape[:1], shape[1:]))
        yield gradient(adafactor.divergence_forward, case, (row, column), square)
        yield answer(adafactor.rank_one_fit, case, alternating_fit, (square,))
    row, column = (0.1 + draws.normal(n) ** 2 for n in (3, 4))
    yield answer(adafactor.rank_one_fit, "rank 1 already", lambda square: square, (row[:, None] * column,))
    draws = Draws("adafactor")
    grads = draws.normal(5, 3, 4) * np.array([1.0, 0.2, 3.0, 0.1, 2.0])[:, None, None]
    without = grads.copy()
    without[:, 1] = 0.0
    walked = path(adafactor.adafactor_init, adafactor.adafactor_update)
    for case, inputs in (("five steps", grads), ("a row without gradient", without)):
        yield answer(walked, case, adafactor_from_history, (inputs, draws.normal(3, 4)), operation="adafactor")


def best_corner(gradient: Any, size: str) -> np.ndarray:
    """The corner of the cube of steps with the smallest <g, d>: a linear function is smallest at a corner."""
    corners = [np.reshape(c, np.shape(gradient)) for c in itertools.product((-1.0, 1.0), repeat=np.size(gradient))]
    return min(corners, key=lambda corner: float(np.vdot(np.asarray(gradient), corner)))


def best_turn(gradient: Any, size: str) -> np.ndarray:
    """The best rotation or reflection of the plane: the corners, so to speak, of the steps of spectral norm 1.

    <g, turn by t> = a cos t + b sin t, which is smallest at the angle of (-a, -b).
    """
    g = np.asarray(gradient)

    def turn(a: float, b: float, mirrored: bool) -> np.ndarray:
        cos, sin = -np.array([a, b]) / np.hypot(a, b)
        return np.array([[cos, sin], [sin, -cos]]) if mirrored else np.array([[cos, -sin], [sin, cos]])

    found = [
        turn(g[0, 0] + g[1, 1], g[1, 0] - g[0, 1], mirrored=False),
        turn(g[0, 0] - g[1, 1], g[1, 0] + g[0, 1], mirrored=True),
    ]
    return min(found, key=lambda step: float(np.vdot(g, step)))


def step_and_look(x: Any, d_y: Any, lr: float) -> np.ndarray:
    """The output after the step less the output before it, for some matrix."""
    x, before = np.asarray(x), np.ones((len(x), len(d_y)))
    after = before - lr * np.sign(np.outer(x, d_y))
    return x @ after - x @ before


def by_singular_values(matrix: Any) -> np.ndarray:
    """U p(s) V^T, where p is the quintic of Newton-Schulz, five times, on numbers."""
    u, s, vt = np.linalg.svd(np.asarray(matrix), full_matrices=False)
    s = s / (np.sqrt(np.sum(s**2)) + 1e-8)
    a, b, c = optimizers.NEWTON_SCHULZ
    for _ in range(optimizers.NEWTON_SCHULZ_STEPS):
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


def alternating_fit(square: Any) -> np.ndarray:
    """From a random start, each factor in turn set to where its own gradient is 0, until nothing moves."""
    v = np.asarray(square)
    column = np.random.default_rng(0).uniform(0.5, 2.0, v.shape[1])
    row = v.sum(axis=1)
    for _ in range(5):
        row = v.sum(axis=1) / column.sum()
        column = v.sum(axis=0) / row.sum()
    return row[:, None] * column


def path(init: Callable[..., Any], update: Callable[..., Any], **settings: float) -> Callable[..., Any]:
    """A function of gradients and of a start that gives the parameter after a step for each gradient."""

    def walked(grads: jax.Array, params: jax.Array, *_: float) -> jax.Array:
        state = init(params)
        for grad in grads:
            params, state = update(grad, state, params, 0.1, **settings)
        return params

    return walked


def adam_from_history(grads: Any, start: Any, decay: float) -> np.ndarray:
    """The same from weighted means over the whole history, with weights that are divided by their sum."""
    g, w = np.asarray(grads), np.asarray(start)
    for t in range(1, len(g) + 1):
        mean, square = (
            np.average(g[:t] ** power, axis=0, weights=beta ** np.arange(t)[::-1])
            for power, beta in ((1, 0.9), (2, 0.95))
        )
        w = (1.0 - 0.1 * decay) * w - 0.1 * mean / (np.sqrt(square) + 1e-8)
    return w


def muon_from_history(grads: Any, start: Any) -> np.ndarray:
    """The same from the whole history and singular values."""
    g, w, beta = np.asarray(grads), np.asarray(start), 0.95
    for t in range(1, len(g) + 1):
        summed = np.tensordot((1.0 - beta) * beta ** np.arange(t)[::-1], g[:t], axes=1)
        ahead = beta * summed / (1.0 - beta ** (t + 1)) + (1.0 - beta) * g[t - 1] / (1.0 - beta**t)
        scale = np.sqrt(max(1.0, w.shape[1] / w.shape[0]))
        w = w - 0.1 * (scale * by_singular_values(ahead) + 0.2 * w)
    return w


def adafactor_from_history(grads: Any, start: Any) -> np.ndarray:
    """The same with the whole second moment kept at each step, and its fit computed by rows and columns at the end."""
    g, w = np.asarray(grads), np.asarray(start)
    second = np.zeros_like(w)
    for t in range(1, len(g) + 1):
        second = second + (g[t - 1] ** 2 + adafactor.TINY - second) * t**-0.8
        step = g[t - 1] / np.sqrt(np.outer(second.sum(1), second.sum(0)) / second.sum())
        w = w - 0.1 * step / max(1.0, np.sqrt(np.mean(step**2)))
    return w
