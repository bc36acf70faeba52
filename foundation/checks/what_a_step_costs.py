"""Checks of chapter 16: what a step costs."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from foundation import costs
from foundation.checks.inputs import answer
from foundation.dense_transformer import dense_loss_backward, dense_loss_forward, init_dense_params
from foundation.parity import OracleCheck


def checks() -> Iterator[OracleCheck]:
    """Operations against the products of the hand-written step; traffic against a loop; a law against `polyfit`."""
    for case, sizes in (("two layers", (2, 8, 12, 11, 2, 5)), ("one layer, one text", (1, 4, 6, 7, 1, 3))):
        yield answer(costs.step_flops, case, counted_flops, (), *sizes)
    for block in (1, 4, 12):
        yield answer(costs.steps_traffic, f"steps of {block}", moved_one_by_one, (), 12, block)
    budgets, losses = (2e12, 6.3e12, 2e13, 6.3e13), (1.6, 1.3, 1.0, 0.8)
    for floor in (0.0, 0.5):
        yield answer(costs.power_law, f"floor {floor}", by_polyfit, (), budgets, losses, floor)


def counted_flops(layers: int, width: int, hidden: int, vocabulary: int, batch: int, positions: int) -> tuple[int, int]:
    """All products of the forward and the backward pass, as jax traces them; those of two activations apart."""

    def step(tokens: Any) -> Any:
        params = init_dense_params(jax.random.key(0), vocabulary, width, layers, hidden)
        _, cache = dense_loss_forward(params, tokens, tokens, 2)
        return dense_loss_backward(jnp.ones(()), cache)

    found = [0, 0]
    for product in products_of(jax.make_jaxpr(step)(jnp.zeros((batch, positions), int)).jaxpr):
        (contracted, _), (along, _) = product.params["dimension_numbers"]
        left = product.invars[0].aval.shape
        work = 2 * int(np.prod([left[i] for i in contracted])) * product.outvars[0].aval.size
        found[1 if along else 0] += work
    return found[0], found[1]


def products_of(jaxpr: Any) -> Iterator[Any]:
    """Every matrix product, those of inner programs too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products_of(inner)


def moved_one_by_one(n: int, block: int) -> int:
    """Step by step: its part of A and of B, then every entry of C twice."""
    moved = 0
    for _ in range(0, n, block):
        moved += 2 * block * n
        for _ in range(n):
            moved += 2 * n
    return moved


def by_polyfit(budgets: Any, losses: Any, floor: float) -> np.ndarray:
    """NumPy's own fit of a line."""
    slope, start = np.polyfit(np.log(budgets), np.log(np.asarray(losses) - floor), 1)
    return np.array([np.exp(start), -slope])
