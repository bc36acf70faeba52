"""Checks of chapter 8: routers, experts, dispatch and combine, the layer, and the bias that balances experts."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from foundation import balancing, experts, moe, router
from foundation.checks.inputs import Draws, answer, gradient, router_margin
from foundation.parity import AnyCheck, Check


def checks() -> Iterator[AnyCheck]:
    """All parts, the layer, and balancing by a bias."""
    yield from router_checks()
    yield from expert_checks()
    yield from dispatch_checks()
    yield from moe_checks()
    yield from balancing_checks()


def router_checks() -> Iterator[Check]:
    """Gates and both losses at once, for every kind of K; and ties, against autodiff only."""
    outputs = ("gates", "balance", "z")
    for case, width, total, top_k, shape in (
        ("top 2 of 4", 5, 4, 2, (2, 6)),
        ("top 2 of 4, gates not divided", 5, 4, 2, (2, 6)),
        ("K = E, gates not divided", 5, 3, 3, (2, 4)),
        ("top 1 of 4", 5, 4, 1, (2, 6)),
        ("K = E", 5, 3, 3, (2, 4)),
        ("one expert", 3, 1, 1, (1, 4)),
        ("one token", 4, 4, 2, (1, 1)),
    ):
        draws = Draws(f"routers/{case}")
        inputs = (draws.normal(*shape, width), draws.normal(width, total))
        settings, margin = (top_k, not case.endswith("not divided")), router_margin(top_k)
        yield gradient(router.router_forward, case, inputs, *settings, outputs=outputs, margin=margin)
    # Columns 1 and 2 are one and the same: every token that wants either has a tie.
    draws = Draws("router/tied columns")
    kernel = draws.normal(4, 3)
    kernel[:, 2] = kernel[:, 1]
    for case, top_k in (("tied columns, top 1", 1), ("tied columns, top 2", 2)):
        inputs = (draws.normal(2, 5, 4), kernel)
        yield gradient(router.router_forward, case, inputs, top_k, outputs=outputs, at_tie=True)


def expert_checks() -> Iterator[Check]:
    """Both kinds of expert; an empty slot; one expert."""
    draws = Draws("experts")
    for case, batch, total, places in (("four experts", 2, 4, 3), ("one expert", 1, 1, 2)):
        u = draws.normal(batch, total, places, 3)
        u[0, 0, -1] = 0.0  # an empty slot
        w_gate, w_in, w_out = draws.normal(total, 3, 5), draws.normal(total, 3, 5), draws.normal(total, 5, 3)
        yield gradient(experts.gelu_experts_forward, case, (u, w_in, w_out))
        yield gradient(experts.swiglu_experts_forward, case, (u, w_gate, w_in, w_out))


def dispatch_checks() -> Iterator[Check]:
    """To the experts and back, with and without drops."""
    draws = Draws("dispatch and combine")
    chosen = np.array([[[0, 2], [2, 1], [2, 0], [2, 0]], [[1, 0], [0, 1], [2, 1], [1, 2]]])
    assign_slots = jax.jit(moe.assign_slots, static_argnums=(1, 2))
    for case, slot, places in (
        ("nothing dropped", assign_slots(chosen, 3, 4)[0], 4),
        ("some dropped", assign_slots(chosen, 3, 2)[0], 2),
        ("everything dropped", np.full_like(chosen, 3 * 2), 2),
    ):
        yield gradient(moe.dispatch_forward, case, (draws.normal(2, 4, 3),), slot, 3, places)
        yield gradient(moe.combine_forward, case, (draws.normal(2, 3, places, 3), draws.normal(2, 4, 2)), slot)


def moe_checks() -> Iterator[Check]:
    """The layer, from roomy to nearly everything dropped; with a shared expert; with one favourite."""
    for case, total, top_k, factor, shape, gated in (
        ("roomy, GELU", 4, 2, 4.0, (2, 6), False),
        ("drops, GELU", 4, 2, 0.6, (2, 6), False),
        ("drops, SwiGLU", 4, 2, 0.6, (2, 6), True),
        ("top 1, drops", 4, 1, 0.7, (2, 6), True),
        ("K = E", 3, 3, 1.0, (2, 4), True),
        ("one expert", 1, 1, 1.0, (2, 4), False),
        ("one place each", 4, 2, 0.01, (2, 6), True),
        ("one token", 4, 2, 1.0, (1, 1), True),
    ):
        draws = Draws(f"moe/{case}")
        yield moe_check(case, draws.normal(*shape, 4), moe_params(draws, total, 3, gated), top_k, factor)

    for case, gated, factor in (
        ("shared expert, SwiGLU", True, 4.0),
        ("shared expert, GELU, drops", False, 0.6),
        ("shared expert with a gate", True, 0.6),
    ):
        draws = Draws(f"moe/{case}")
        params = moe_params(draws, 4, 3, gated)
        params["shared"] = moe_params(draws, 1, 5, gated)
        del params["shared"]["router"]
        if case.endswith("gate"):
            params["shared_gate"] = draws.normal(4)
        yield moe_check(case, draws.normal(2, 6, 4), params, 2, factor)

    # All tokens lie on one side of expert 0's column: it is everybody's first choice, and its places run out.
    draws = Draws("moe/everything to one expert")
    params, x = moe_params(draws, 4, 3, gated=True), draws.normal(2, 6, 4)
    params["router"][:, 0], x[..., 0] = [6.0, 0.0, 0.0, 0.0], 3.0
    yield moe_check("everything to one expert", x, params, 1, 1.0)


def moe_check(case: str, x: np.ndarray, params: dict, top_k: int, factor: float) -> Check:
    """The whole layer: its output and both auxiliary losses."""
    settings, margin = (top_k, factor), router_margin(top_k)
    return gradient(moe.moe_forward, case, (x, params), *settings, outputs=("y", "balance", "z"), margin=margin)


def moe_params(draws: Draws, total: int, hidden: int, gated: bool) -> dict:
    """Router and experts of a layer of width 4."""
    shapes = {"router": (4, total), "w_in": (total, 4, hidden), "w_out": (total, hidden, 4)}
    shapes |= {"w_gate": (total, 4, hidden)} if gated else {}
    return {name: draws.normal(*shape) for name, shape in shapes.items()}


def balancing_checks() -> Iterator[AnyCheck]:
    """Gates of sigmoids three ways; choices and bias steps against counting by hand."""
    draws = Draws("balancing")
    scores = draws.generator.dirichlet([0.8] * 4, 6)
    bias = draws.normal(4, std=0.2)
    for top_k in (1, 2, 4):
        yield answer(balancing.biased_choice, f"top {top_k}", one_by_one, (scores, bias), top_k)
    logits = 2.0 * draws.normal(6, 4)
    for case, top_k, scale in (("top 2 of 4", 2, 2.5), ("K = E", 4, 1.0)):
        settings, margin = (3.0 * bias, top_k, scale), margin_of(logits, 3.0 * bias, top_k)
        yield gradient(balancing.sigmoid_router_forward, case, (logits,), *settings, margin=margin)
    for steps in (1, 6):
        probs = draws.generator.dirichlet([3.0, 1.0, 1.0, 0.5], 9)
        yield answer(balancing.balanced_by_bias, f"{steps} steps", counted, (probs,), 2, 0.05, steps)


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
