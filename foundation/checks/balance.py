"""Checks of the router of DeepSeek-V3, and of the bias that balances experts."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from foundation import balancing
from foundation.checks.inputs import Draws, filled_with
from foundation.parity import AnyCheck, Check, OracleCheck


def balancing_checks() -> Iterator[AnyCheck]:
    """Gates of sigmoids three ways; choices and bias steps against counting by hand."""
    draws = Draws("balancing")
    scores = draws.generator.dirichlet([0.8] * 4, 6)
    bias = draws.normal(4, std=0.2)
    for top_k in (1, 2, 4):
        inputs = (scores, bias)
        yield OracleCheck("biased_choice", f"top {top_k}", balancing.biased_choice, one_by_one, inputs, (top_k,))
    backward, logits = balancing.sigmoid_router_backward, 2.0 * draws.normal(6, 4)
    for case, top_k, scale in (("top 2 of 4", 2, 2.5), ("K = E", 4, 1.0)):
        forward = filled_with(balancing.sigmoid_router_forward, 3.0 * bias, top_k, scale)
        margin = margin_of(logits, 3.0 * bias, top_k)
        yield Check("sigmoid_router", case, forward, backward, (logits,), margin)
    for steps in (1, 6):
        inputs = (draws.generator.dirichlet([3.0, 1.0, 1.0, 0.5], 9),)
        yield OracleCheck(
            "balanced_by_bias", f"{steps} steps", balancing.balanced_by_bias, counted, inputs, (2, 0.05, steps)
        )


def margin_of(logits: np.ndarray, bias: np.ndarray, top_k: int) -> float:
    """How far the choice is from another one, in logits: the slope of a sigmoid is at most 1/4."""
    ordered = -np.sort(-(1.0 / (1.0 + np.exp(-logits)) + bias), axis=1)
    return 4.0 * float(np.min(ordered[:, top_k - 1] - ordered[:, top_k])) if top_k < len(bias) else float("inf")


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
