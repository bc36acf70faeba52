"""Optimizers by hand against optax, step by step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from foundation import adafactor, optimizers

SHAPES = {"tall": (6, 3), "wide": (3, 7)}
STEPS = 6


def draws(seed: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)}


def assert_same_path(
    update: Callable, init: Callable, reference: optax.GradientTransformation, tolerance: float = 1e-11
) -> None:
    ours = theirs = draws(0)
    state: Any = init(ours)
    their_state = reference.init(theirs)
    for step in range(STEPS):
        ours, state = update(draws(1 + step), state, ours)
        updates, their_state = reference.update(draws(1 + step), their_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, theirs)


def test_sgd() -> None:
    assert_same_path(lambda g, s, w: (optimizers.sgd_update(g, w, 0.1), s), lambda w: None, optax.sgd(0.1))


def test_adam() -> None:
    assert_same_path(lambda g, s, w: optimizers.adam_update(g, s, w, 0.1), optimizers.adam_init, optax.adam(0.1))


def test_adamw() -> None:
    def update(g: Any, s: Any, w: Any) -> Any:
        return optimizers.adam_update(g, s, w, 0.1, beta2=0.95, weight_decay=0.3)

    assert_same_path(update, optimizers.adam_init, optax.adamw(0.1, b2=0.95, weight_decay=0.3))


def test_muon() -> None:
    def update(g: Any, s: Any, w: Any) -> Any:
        return optimizers.muon_update(g, s, w, 0.1, weight_decay=0.2)

    assert_same_path(update, optimizers.muon_init, optax.contrib.muon(0.1, weight_decay=0.2))


def test_adafactor() -> None:
    """optax computes the decay in float32, so seven digits agree. Its `adafactor` also scales by the size of the
    parameter; here are its parts without that."""
    reference = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=1, decay_rate=0.8, epsilon=1e-30),
        optax.clip_by_block_rms(1.0),
        optax.scale(-0.1),
    )

    def update(g: Any, s: Any, w: Any) -> Any:
        moved = {name: adafactor.adafactor_update(g[name], s[name], w[name], 0.1) for name in w}
        return tuple({name: moved[name][i] for name in w} for i in (0, 1))

    assert_same_path(update, lambda w: {name: adafactor.adafactor_init(w[name]) for name in w}, reference, 1e-7)


def test_newton_schulz_keeps_the_vectors_and_evens_out_the_values() -> None:
    matrix = jax.random.normal(jax.random.key(3), (5, 8))
    u, _, vt = jnp.linalg.svd(matrix, full_matrices=False)
    core = u.T @ optimizers.orthogonalize(matrix) @ vt.T  # U^T X V: diagonal where the vectors are kept
    np.testing.assert_allclose(core - jnp.diag(jnp.diag(core)), 0.0, atol=1e-10)
    assert (jnp.diag(core) > 0.6).all()
    assert (jnp.diag(core) < 1.3).all()


def test_muon_refuses_what_is_no_matrix() -> None:
    with pytest.raises(ValueError, match="matrices"):
        optimizers.orthogonalize(jnp.ones((2, 3, 4)))
