"""From logits to a token: filters by hand, and the draws of jax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.inference.sampling import Sampling, adjusted_logits, argmax, sample

LOGITS = np.log(np.array([0.15, 0.5, 0.05, 0.3]))
adjust = jax.jit(adjusted_logits)


def adjusted(seen: list[int] = (), **settings: float) -> np.ndarray:
    mask = np.zeros((1, 4), bool)
    mask[0, list(seen)] = True
    return np.asarray(adjust(jnp.asarray(LOGITS[None], jnp.float32), Sampling(**settings), mask))[0]


def test_temperature_divides() -> None:
    np.testing.assert_allclose(adjusted(temperature=0.5), 2 * LOGITS, rtol=1e-6)


def test_repetition_penalty_makes_seen_tokens_less_likely_whatever_their_sign() -> None:
    logits = jnp.array([[2.0, -2.0, 2.0, -2.0]])
    seen = jnp.array([[True, True, False, False]])
    out = adjust(logits, Sampling(temperature=1.0, repetition_penalty=4.0), seen)
    assert out.tolist() == [[0.5, -8.0, 2.0, -2.0]]
    # The likeliest token may change by it, and greedy follows.
    out = adjust(logits, Sampling(temperature=0.0, repetition_penalty=4.0), seen)
    assert np.flatnonzero(np.isfinite(out[0])).tolist() == [2]


def test_equals_at_the_edge_of_top_k_are_taken_by_lower_id() -> None:
    logits = jnp.array([[1.0, 2.0, 1.0, 2.0]])
    out = adjust(logits, Sampling(temperature=1.0, top_k=3), jnp.zeros((1, 4), bool))
    assert np.flatnonzero(np.isfinite(out[0])).tolist() == [0, 1, 3]


def test_top_p_stops_where_it_is_reached_exactly() -> None:
    """Probabilities 1/2, 1/4, 1/8, 1/8 are exact in float32: 3/4 is reached by the first two tokens."""
    logits = jnp.log(jnp.array([[0.125, 0.5, 0.125, 0.25]]))
    for top_p, left in ((0.5, [1]), (0.75, [1, 3]), (0.7501, [0, 1, 3])):
        out = adjust(logits, Sampling(temperature=1.0, top_p=top_p), jnp.zeros((1, 4), bool))
        assert np.flatnonzero(np.isfinite(out[0])).tolist() == left


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 0.0}])
def test_the_likeliest_token_is_always_allowed(settings: dict[str, float]) -> None:
    for temperature in (1e-40, 1e-7, 1e-2, 1.0, 100.0):
        out = adjusted(**({"temperature": temperature} | settings))
        assert np.flatnonzero(np.isfinite(out)).tolist() == [1]


def test_argmax_is_that_of_numpy() -> None:
    logits = np.random.default_rng(0).integers(-3, 3, (500, 40)).astype(np.float32)  # with many equals
    logits[0] = -np.inf
    logits[1, 7] = np.inf
    logits[2, [9, 30]] = np.nan
    logits[3] = np.nan
    assert np.asarray(argmax(jnp.asarray(logits))).tolist() == logits.argmax(-1).tolist()


def test_draws_are_those_of_jax() -> None:
    rng = np.random.default_rng(1)
    logits = jnp.asarray(3 * rng.normal(size=(200, 50)), jnp.float32)
    for seed in range(5):
        key = jax.random.key(seed)
        drawn = sample(logits, Sampling(temperature=1.0), jnp.zeros(logits.shape, bool), key)
        assert drawn.tolist() == jax.random.categorical(key, logits).tolist()
