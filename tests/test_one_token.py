"""The numbers of the page "one token, forward and back": against jax.grad, and a reason wherever one is exactly 0."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from book import one_token

pytestmark = pytest.mark.usefixtures("x64")
STATES = [(3, 2, 0.5, 0.0), (6, 2, 0.5, 0.5), (4, 1, 0.5, 0.0)]
"""Token, choices, capacity factor, weight of the balance loss. Kept and dropped choices are among them."""
gradient = jax.jit(jax.grad(one_token.loss), static_argnums=(2, 3, 4, 5))
GRADIENTS = ("d_gate", "d_logit", "d_balance", "d_answer", "d_weights")


@pytest.fixture(scope="module")
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def given(x64: None) -> one_token.Example:
    return one_token.example()


@pytest.fixture(scope="module", params=STATES, ids=str)
def case(
    given: one_token.Example, request: pytest.FixtureRequest
) -> tuple[tuple[int, int, float, float], dict[str, Any]]:
    return request.param, one_token.state(given, *request.param)


def column(found: dict[str, Any], name: str) -> np.ndarray:
    return np.array([row[name] for row in found["rows"]])


def test_gradients_are_those_of_jax(
    given: one_token.Example, case: tuple[tuple[int, int, float, float], dict[str, Any]]
) -> None:
    (token, top_k, room, balance), found = case
    grads = gradient(given.params, given, token, top_k, room, balance)
    np.testing.assert_allclose(
        column(found, "d_router"), np.linalg.norm(grads["router"], axis=0), rtol=1e-5, atol=1e-14
    )
    weights = np.sqrt((grads["w_in"] ** 2).sum((1, 2)) + (grads["w_out"] ** 2).sum((1, 2)))
    np.testing.assert_allclose(column(found, "d_weights"), weights, rtol=1e-5, atol=1e-14)
    # Without the balance loss only this token reaches the router: the matrix's gradient is x times that of the logits.
    plain = gradient(given.params, given, token, top_k, room, 0.0)["router"]
    x = given.x[0, token]
    np.testing.assert_allclose(column(found, "d_logit"), x @ plain / (x @ x), rtol=1e-5, atol=1e-12)
    assert found["loss"] == pytest.approx(float(one_token.loss(given.params, given, token, top_k, room, 0.0)))


def test_there_is_a_reason_wherever_a_gradient_is_exactly_zero_and_nowhere_else(
    case: tuple[tuple[int, int, float, float], dict[str, Any]],
) -> None:
    for row in case[1]["rows"]:
        assert {name for name in GRADIENTS if row[name] == 0} == set(row["why"]), row
