"""Checks of chapter 21: learning from rewards and preferences, by enumeration."""

from collections.abc import Iterator

import jax
import numpy as np

from foundation import preferences
from foundation.checks.inputs import Draws, gradient
from foundation.parity import Check

TOKENS, LENGTH = 3, 2


def checks() -> Iterator[Check]:
    """Gradients that are expectations over all texts, each against autodiff of the exact value."""
    draws = Draws("preferences")
    texts = jax.jit(preferences.all_texts, static_argnums=(0, 1))(TOKENS, LENGTH)
    logits, reference = (draws.normal(TOKENS + 1, TOKENS),), draws.normal(TOKENS + 1, TOKENS)
    reward, repeated = draws.normal(len(texts)), np.array([[0, 0, 0, 1], [1, 0, 0, 0]])
    yield gradient(preferences.text_log_probs_forward, "all texts", logits, texts)
    yield gradient(preferences.text_log_probs_forward, "a token again", logits, repeated)
    yield gradient(preferences.expected_reward_forward, "ordinary", logits, reward, texts)
    for group in (1, 2, 3):
        yield gradient(preferences.group_baseline_forward, f"{group} texts", logits, reward, texts, group)
    for forward, backward, case in (
        (preferences.kl_forward, preferences.kl_backward_by_k2, "by k2"),
        (preferences.reverse_kl_forward, preferences.reverse_kl_backward_by_k3, "by k3"),
    ):
        yield gradient(forward, case, logits, reference, texts, backward=backward)
    for name, size in (("ordinary", 1.0), ("far apart", 20.0)):
        pair = (draws.normal(5, std=size), draws.normal(5, std=size))
        yield gradient(preferences.dpo_forward, name, pair, draws.normal(2, 5), 0.3)
    old, advantage, eps = draws.normal(8), draws.normal(8), 0.2
    for name, moved in (
        ("not yet moved", np.zeros(8)),
        ("moved", np.array([-0.6, -0.3, -0.1, -0.1, 0.1, 0.1, 0.3, 0.8])),
    ):
        rho = np.exp(moved)
        margin = np.min(np.minimum(np.abs(rho - 1.0 - eps), np.abs(rho - 1.0 + eps)))
        yield gradient(preferences.clipped_forward, name, (old + moved,), old, advantage, eps, margin=margin)
