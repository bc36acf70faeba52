"""Checks of chapter 16: balancing four ways."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from foundation import balancing
from foundation.checks.inputs import Draws
from foundation.parity import AnyCheck, Check, OracleCheck


def balancing_checks() -> Iterator[AnyCheck]:
    """The importance loss three ways; choices, fractions and bias steps against counting by hand."""
    draws = Draws("balancing")
    probs = draws.generator.dirichlet([0.8] * 4, 6)
    forward, backward = balancing.importance_loss_forward, balancing.importance_loss_backward
    yield Check("importance_loss", "ordinary", forward, backward, (probs,))
    yield Check("importance_loss", "rows that do not sum to 1", forward, backward, (3.0 * probs + 0.1,))
    bias = draws.normal(4, std=0.2)
    for top_k in (1, 2, 4):
        yield OracleCheck("biased_choice", f"top {top_k}", balancing.biased_choice, one_by_one, (probs, bias), (top_k,))
        even = np.array([np.roll([0.4, 0.3, 0.2, 0.1], n) for n in range(4)])
        yield OracleCheck(
            "balance_loss_of", f"even, top {top_k}", balancing.balance_loss_of, lambda *_: 1.0, (even,), (top_k,)
        )
    for steps in (1, 6):
        inputs = (draws.generator.dirichlet([3.0, 1.0, 1.0, 0.5], 9),)
        yield OracleCheck(
            "balanced_by_bias", f"{steps} steps", balancing.balanced_by_bias, counted, inputs, (2, 0.05, steps)
        )


def one_by_one(probs: Any, bias: Any, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Each token by itself: sort, take, divide."""
    p, b = np.asarray(probs), np.asarray(bias)
    chosen, gates = np.zeros_like(p), np.zeros_like(p)
    for t, row in enumerate(p):
        best = sorted(range(len(row)), key=lambda e: -(row[e] + b[e]))[:top_k]
        chosen[t, best] = 1.0
        gates[t, best] = row[best] / row[best].sum()
    return chosen, gates


def counted(probs: Any, top_k: int, rate: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The same loop with counters, and a comparison of each counter with its fair share."""
    p = np.asarray(probs)
    tokens, experts = p.shape
    bias, count = np.zeros(experts), np.zeros(experts)
    for step in range(steps + 1):
        count = one_by_one(p, bias, top_k)[0].sum(axis=0)
        if step < steps:
            fair = tokens * top_k / experts
            bias = np.array([b + rate * (int(c < fair) - int(c > fair)) for b, c in zip(bias, count, strict=True)])
    return bias, count / count.sum()
