"""Checks of chapter 13: micro-batches."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from foundation import micro_batches as micro
from foundation.checks.inputs import Draws, answer, gradient
from foundation.losses import IGNORE
from foundation.parity import AnyCheck


def checks() -> Iterator[AnyCheck]:
    """The accumulated loss three ways, and against the whole batch; the balance loss of groups, and what parts add."""
    draws = Draws("micro_batches")
    logits, targets = draws.normal(4, 3, 5), draws.integers(5, 4, 3)
    uneven = targets.copy()
    uneven[0] = uneven[1, 1:] = IGNORE
    for case, wanted, parts in (
        ("equal counts", targets, 2),
        ("unequal counts", uneven, 2),
        ("a part without tokens", uneven, 4),
        ("nothing counted", np.full_like(targets, IGNORE), 2),
    ):
        loss = micro.accumulated_loss_forward
        if case != "equal counts":  # an easier case of "unequal counts"
            yield gradient(loss, case, (logits,), wanted, parts)
        yield answer(loss, case, mean_over_tokens, (logits, wanted), parts, operation="accumulated_value")
    probs = draws.generator.dirichlet([1.0] * 3, (4, 6))
    chosen = np.argsort(-probs, axis=-1)[..., :2]
    for case, groups in (("by sequence", 4), ("by pairs of sequences", 2), ("by batch", 1)):
        yield gradient(micro.grouped_balance_forward, case, (probs,), chosen, groups)
    for parts in (2, 4):
        yield answer(micro.balance_gap, f"{parts} parts", covariance, (probs, chosen), parts)


def mean_over_tokens(logits: Any, targets: Any, parts: int) -> float:
    """One sum over the counted tokens of the whole batch, and one division."""
    z, wanted = np.asarray(logits), np.asarray(targets)
    found = [
        np.log(np.sum(np.exp(row))) - row[target]
        for row, target in zip(z.reshape(-1, z.shape[-1]), wanted.ravel(), strict=True)
        if target != IGNORE
    ]
    return sum(found) / max(len(found), 1)


def covariance(probs: Any, chosen: Any, parts: int) -> float:
    """E times the covariance of f_e and P_e over the parts, summed over the experts."""
    p, wanted = np.asarray(probs), np.asarray(chosen)
    experts = p.shape[-1]
    f = np.array([np.bincount(part.ravel(), minlength=experts) / part.size for part in np.split(wanted, parts)])
    mean = np.array([part.mean(axis=(0, 1)) for part in np.split(p, parts)])
    return experts * sum(np.cov(f[:, e], mean[:, e], bias=True)[0, 1] for e in range(experts))
