"""Checks of the mixture of experts: router, experts, dispatch and combine, and the layer."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from foundation import experts, moe, router
from foundation.checks.inputs import Draws, filled_with, router_margin
from foundation.parity import Check


def router_checks() -> Iterator[Check]:
    """Gates and both losses at once, for every kind of K; and ties, against autodiff only."""
    for case, width, experts_total, top_k, shape in (
        ("top 2 of 4", 5, 4, 2, (2, 6)),
        ("top 2 of 4, gates not divided", 5, 4, 2, (2, 6)),
        ("K = E, gates not divided", 5, 3, 3, (2, 4)),
        ("top 1 of 4", 5, 4, 1, (2, 6)),
        ("K = E", 5, 3, 3, (2, 4)),
        ("one expert", 3, 1, 1, (1, 4)),
        ("one token", 4, 4, 2, (1, 1)),
    ):
        draws = Draws(f"routers/{case}")
        inputs = (draws.normal(*shape, width), draws.normal(width, experts_total))
        outputs = _router_outputs(top_k, not case.endswith("not divided"))
        yield Check("router", case, outputs, _router_gradients, inputs, partial(router_margin, top_k=top_k))
    # Columns 1 and 2 are one and the same: every token that wants either has a tie.
    draws = Draws("router/tied columns")
    kernel = draws.normal(4, 3)
    kernel[:, 2] = kernel[:, 1]
    for case, top_k in (("tied columns, top 1", 1), ("tied columns, top 2", 2)):
        inputs = (draws.normal(2, 5, 4), kernel)
        yield Check("router", case, _router_outputs(top_k), _router_gradients, inputs, at_tie=True)


def _router_outputs(top_k: int, renormalise: bool = True) -> Callable:
    def forward(x: jax.Array, kernel: jax.Array) -> tuple[Any, Any]:
        routing, cache = router.router_forward(x, kernel, top_k, renormalise)
        return (routing.gates, routing.balance, routing.z), cache

    return forward


def _router_gradients(d_out: tuple, cache: Any) -> Any:
    d_gates, d_balance, d_z = d_out
    return router.router_backward(d_gates, d_balance, d_z, cache)


def expert_checks() -> Iterator[Check]:
    """Both kinds of expert; an empty slot; one expert."""
    draws = Draws("experts")
    for case, batch, total, places in (("four experts", 2, 4, 3), ("one expert", 1, 1, 2)):
        u = draws.normal(batch, total, places, 3)
        u[0, 0, -1] = 0.0  # an empty slot
        w_gate, w_in, w_out = draws.normal(total, 3, 5), draws.normal(total, 3, 5), draws.normal(total, 5, 3)
        yield Check(
            "gelu_experts",
            case,
            experts.gelu_experts_forward,
            experts.gelu_experts_backward,
            (u, w_in, w_out),
        )
        inputs = (u, w_gate, w_in, w_out)
        yield Check("swiglu_experts", case, experts.swiglu_experts_forward, experts.swiglu_experts_backward, inputs)


def moe_checks() -> Iterator[Check]:
    """Dispatch and combine alone, with drops; then the layer, from roomy to nearly everything dropped."""
    draws = Draws("dispatch and combine")
    chosen = np.array([[[0, 2], [2, 1], [2, 0], [2, 0]], [[1, 0], [0, 1], [2, 1], [1, 2]]])
    assign_slots = jax.jit(moe.assign_slots, static_argnums=(1, 2))
    for case, slot in (
        ("nothing dropped", assign_slots(chosen, 3, 4)[0]),
        ("some dropped", assign_slots(chosen, 3, 2)[0]),
        ("everything dropped", np.full_like(chosen, 3 * 2)),
    ):
        places = 4 if case == "nothing dropped" else 2
        x, h, gates = draws.normal(2, 4, 3), draws.normal(2, 3, places, 3), draws.normal(2, 4, 2)
        yield Check("dispatch", case, filled_with(moe.dispatch_forward, slot, 3, places), moe.dispatch_backward, (x,))
        yield Check("combine", case, filled_with(moe.combine_forward, slot), moe.combine_backward, (h, gates))

    for case, total, top_k, factor, shape, swiglu in (
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
        yield moe_check(case, draws.normal(*shape, 4), moe_params(draws, 4, total, 3, swiglu), top_k, factor)

    for case, gated, factor in (("shared expert, SwiGLU", True, 4.0), ("shared expert, GELU, drops", False, 0.6)):
        draws = Draws(f"moe/{case}")
        shared = moe_params(draws, 4, 1, 5, gated)
        del shared["router"]
        yield moe_check(case, draws.normal(2, 6, 4), {**moe_params(draws, 4, 4, 3, gated), "shared": shared}, 2, factor)
    shared |= {"w_gate": draws.normal(1, 4, 5)}
    params = {**moe_params(draws, 4, 4, 3, True), "shared": shared, "shared_gate": draws.normal(4)}
    yield moe_check("shared expert with a gate", draws.normal(2, 6, 4), params, 2, 0.6)

    # All tokens lie on one side of expert 0's column: it is everybody's first choice, and its places run out.
    draws = Draws("moe/everything to one expert")
    params = moe_params(draws, 4, 4, 3, gated=True)
    params["router"][:, 0] = [6.0, 0.0, 0.0, 0.0]
    x = draws.normal(2, 6, 4)
    x[..., 0] = 3.0
    yield moe_check("everything to one expert", x, params, 1, 1.0)


def moe_check(case: str, x: np.ndarray, params: dict, top_k: int, factor: float) -> Check:
    """A check of the whole layer: output and both auxiliary losses."""

    def margin(cache: moe.MoECache) -> jax.Array:
        return router_margin(cache.router, top_k)

    return Check("moe", case, _moe_outputs(top_k, factor), _moe_gradients, (x, params), margin)


def moe_params(draws: Draws, width: int, total: int, hidden: int, gated: bool) -> dict:
    """Router and experts of one layer."""
    params = {
        "router": draws.normal(width, total),
        "w_in": draws.normal(total, width, hidden),
        "w_out": draws.normal(total, hidden, width),
    }
    return {**params, "w_gate": draws.normal(total, width, hidden)} if gated else params


def _moe_outputs(top_k: int, factor: float) -> Callable:
    def forward(x: jax.Array, params: dict) -> tuple[Any, Any]:
        output, cache = moe.moe_forward(x, params, top_k, factor)
        return (output.y, output.balance, output.z), cache

    return forward


def _moe_gradients(d_out: tuple, cache: Any) -> Any:
    d_y, d_balance, d_z = d_out
    return moe.moe_backward(d_y, d_balance, d_z, cache)
