"""Checks of chapter 21: learning from rewards and preferences, by enumeration."""

from collections.abc import Iterator

import jax
import numpy as np

from foundation import preferences
from foundation.checks.inputs import Draws, filled_with
from foundation.parity import AnyCheck, Check

TOKENS, LENGTH = 3, 2


def preference_checks() -> Iterator[AnyCheck]:
    """Gradients that are expectations over all texts, each against autodiff of the exact value."""
    draws = Draws("preferences")
    texts = jax.jit(preferences.all_texts, static_argnums=(0, 1))(TOKENS, LENGTH)
    logits, reference = draws.normal(TOKENS + 1, TOKENS), draws.normal(TOKENS + 1, TOKENS)
    reward = draws.normal(len(texts))
    forward = filled_with(preferences.text_log_probs_forward, texts)
    yield Check("text_log_probs", "all texts", forward, preferences.text_log_probs_backward, (logits,))
    repeated = filled_with(preferences.text_log_probs_forward, np.array([[0, 0, 0, 1], [1, 0, 0, 0]]))
    yield Check("text_log_probs", "a token again", repeated, preferences.text_log_probs_backward, (logits,))
    forward = filled_with(preferences.expected_reward_forward, reward, texts)
    yield Check("expected_reward", "ordinary", forward, preferences.expected_reward_backward, (logits,))
    for group in (1, 2, 3):
        forward = filled_with(preferences.group_baseline_forward, reward, texts, group)
        yield Check("group_baseline", f"{group} texts", forward, preferences.group_baseline_backward, (logits,))
    forward = filled_with(preferences.kl_forward, reference, texts)
    yield Check("kl", "by k2", forward, preferences.kl_backward_by_k2, (logits,))
    forward = filled_with(preferences.reverse_kl_forward, reference, texts)
    yield Check("reverse_kl", "by k3", forward, preferences.reverse_kl_backward_by_k3, (logits,))
    for name, size in (("ordinary", 1.0), ("far apart", 20.0)):
        pair = (draws.normal(5, std=size), draws.normal(5, std=size))
        forward = filled_with(preferences.dpo_forward, draws.normal(2, 5), 0.3)
        yield Check("dpo", name, forward, preferences.dpo_backward, pair)
    old, advantage, eps = draws.normal(8), draws.normal(8), 0.2
    for name, moved in (
        ("not yet moved", np.zeros(8)),
        ("moved", np.array([-0.6, -0.3, -0.1, -0.1, 0.1, 0.1, 0.3, 0.8])),
    ):
        rho = np.exp(moved)
        margin = np.min(np.minimum(np.abs(rho - 1.0 - eps), np.abs(rho - 1.0 + eps)))
        forward = filled_with(preferences.clipped_forward, old, advantage, eps)
        yield Check("clipped", name, forward, preferences.clipped_backward, (old + moved,), margin)
