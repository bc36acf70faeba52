"""The mixture-of-experts layer: dispatch and combine as a linear map and its adjoint, drops included.

Once the router has chosen, moving tokens is linear. Let M be the 0/1 matrix with a row per slot and a column per token,
M_st = 1 where token t sits in slot s. A slot holds at most one token. A choice that found its expert full is in no row.

    dispatch   u = M x                         d_x_t = sum_k d_u_slot(t,k), which is M^T d_u
    experts    h = expert(u)
    combine    y_t = sum_k g_tk h_slot(t,k)    d_h_s = g_tk d_y_t for the one (t, k) in slot s, 0 for an empty slot
                                               d_g_tk = <d_y_t, h_slot(t,k)>, and 0 where dropped

The code adds one more slot to the buffer, "nowhere": dropped choices are sent to it, its content is thrown away, and
what is read from it is 0. Forward and backward then are the same two moves, a scatter and a gather.

Slots are given token by token, a token's choices in order, so at a fixed number T of tokens the layer is causal even
where it drops. But the capacity grows with T: where a sequence is cut short, an earlier token may lose its slot.

A **shared expert** sees every token: y_t = sum_k g_tk h_slot(t,k) + shared(x_t). It is one expert whose slots are the
tokens themselves. With a gate of its own, s_t = sigma(x_t . w), it adds s_t shared(x_t): then d_shared_t = s_t d_y_t,
and the gate's logit has the gradient s_t (1 - s_t) <d_y_t, shared(x_t)>, which goes on to w and to x_t.

Sources: Lepikhin et al. 2020, section 2.2 and algorithm 1 (capacity, dispatch, combine); Fedus, Zoph and Shazeer 2021,
equation 3 (capacity factor); Dai et al. 2024, section 3.2 (shared experts).
"""

import math
from fractions import Fraction
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from foundation.activations import sigmoid_backward, sigmoid_forward
from foundation.experts import (
    gelu_experts_backward,
    gelu_experts_forward,
    swiglu_experts_backward,
    swiglu_experts_forward,
)
from foundation.router import Scalar, router_backward, router_forward


def capacity(tokens: int, experts: int, top_k: int, capacity_factor: float) -> int:
    """C = min(T, max(1, ceil(cf T K / E))), in exact arithmetic on the decimal that was written."""
    return min(tokens, max(1, math.ceil(Fraction(str(capacity_factor)) * tokens * top_k / experts)))


def assign_slots(
    experts: Int[Array, "B T K"], experts_total: int, places: int
) -> tuple[Int[Array, "B T K"], Bool[Array, "B T K"]]:
    """(slot, keep): the slot e C + place of each choice, and whether it found one; dropped: slot E C, "nowhere".

    The place of a choice is the number of earlier choices of the same expert in its sequence, token by token.
    """
    batch, tokens, top_k = experts.shape
    in_order = experts.reshape(batch, tokens * top_k)
    chosen = in_order[..., None] == jnp.arange(experts_total)  # [B, T K, E]
    place = jnp.sum(jnp.where(chosen, jnp.cumsum(chosen, axis=1) - 1, 0), axis=-1)
    keep = place < places
    slot = jnp.where(keep, in_order * places + place, experts_total * places)
    return slot.reshape(experts.shape), keep.reshape(experts.shape)


def dispatch_forward(
    x: Float[Array, "B T D"], slot: Int[Array, "B T K"], experts_total: int, places: int
) -> tuple[Float[Array, "B E C D"], tuple]:
    """u = M x: each kept token written into its slots; empty slots are 0."""
    batch, _, width = x.shape
    rows = jnp.arange(batch)[:, None, None]
    buffer = jnp.zeros((batch, experts_total * places + 1, width), x.dtype)
    buffer = buffer.at[rows, slot].set(x[:, :, None, :])  # [B, T, 1, D] to the K slots of each token
    return buffer[:, :-1].reshape(batch, experts_total, places, width), (slot,)


def dispatch_backward(d_u: Float[Array, "B E C D"], cache: tuple) -> Float[Array, "B T D"]:
    """d_x = M^T d_u: a token collects from its slots, and 0 from "nowhere"."""
    (slot,) = cache
    return jnp.sum(_read_slots(d_u, slot), axis=2)


def combine_forward(
    h: Float[Array, "B E C D"], gates: Float[Array, "B T K"], slot: Int[Array, "B T K"]
) -> tuple[Float[Array, "B T D"], tuple]:
    """y_t = sum_k g_tk h_slot(t,k), a dropped choice contributing 0."""
    picked = _read_slots(h, slot)  # [B, T, K, D]
    return jnp.sum(gates[..., None] * picked, axis=2), (picked, gates, slot, h.shape)


def combine_backward(d_y: Float[Array, "B T D"], cache: tuple) -> tuple[Float[Array, "B E C D"], Float[Array, "B T K"]]:
    """(d_h, d_gates)."""
    picked, gates, slot, (batch, experts_total, places, width) = cache
    d_gates = jnp.sum(d_y[:, :, None, :] * picked, axis=-1)  # picked is 0 where dropped, so d_gates is too
    d_picked = gates[..., None] * d_y[:, :, None, :]  # [B, T, K, D]
    d_buffer = jnp.zeros((batch, experts_total * places + 1, width), d_y.dtype)
    d_buffer = d_buffer.at[jnp.arange(batch)[:, None, None], slot].set(d_picked)
    return d_buffer[:, :-1].reshape(batch, experts_total, places, width), d_gates


def _read_slots(h: Float[Array, "B E C D"], slot: Int[Array, "B T K"]) -> Float[Array, "B T K D"]:
    """The content of each choice's slot; 0 from "nowhere"."""
    batch, experts_total, places, width = h.shape
    flat = h.reshape(batch, experts_total * places, width)
    with_nowhere = jnp.pad(flat, ((0, 0), (0, 1), (0, 0)))
    return with_nowhere[jnp.arange(batch)[:, None, None], slot]


class MoEOutput(NamedTuple):
    """y [B, T, D]; the two losses of the router; and the share of choices that were dropped (no gradient)."""

    y: Array
    balance: Array
    z: Array
    dropped: Array


def experts_forward(u: Float[Array, "B E C D"], params: dict) -> tuple[Float[Array, "B E C D"], tuple]:
    """Each expert on its own rows: SwiGLU where there is a "w_gate", else GELU."""
    if "w_gate" in params:
        h, cache = swiglu_experts_forward(u, params["w_gate"], params["w_in"], params["w_out"])
        return h, (True, cache)
    h, cache = gelu_experts_forward(u, params["w_in"], params["w_out"])
    return h, (False, cache)


def experts_backward(d_h: Float[Array, "B E C D"], cache: tuple) -> tuple[Float[Array, "B E C D"], dict]:
    """(d_u, d_params)."""
    swiglu, experts_cache = cache
    if swiglu:
        d_u, d_gate, d_in, d_out = swiglu_experts_backward(d_h, experts_cache)
        return d_u, {"w_gate": d_gate, "w_in": d_in, "w_out": d_out}
    d_u, d_in, d_out = gelu_experts_backward(d_h, experts_cache)
    return d_u, {"w_in": d_in, "w_out": d_out}


def shared_forward(x: Float[Array, "B T D"], params: dict) -> tuple[Float[Array, "B T D"], tuple]:
    """The shared expert of `moe_forward`, times its gate where it has one."""
    y, experts_cache = experts_forward(x[:, None], params["shared"])
    y = y[:, 0]
    if "shared_gate" not in params:
        return y, (experts_cache, None)
    gate, sigmoid_cache = sigmoid_forward(x @ params["shared_gate"])
    return gate[..., None] * y, (experts_cache, (x, params["shared_gate"], y, gate, sigmoid_cache))


def shared_backward(d_y: Float[Array, "B T D"], cache: tuple) -> tuple[Float[Array, "B T D"], dict]:
    """(d_x, d_params)."""
    experts_cache, gate_cache = cache
    if gate_cache is None:
        d_x, d_shared = experts_backward(d_y[:, None], experts_cache)
        return d_x[:, 0], {"shared": d_shared}
    x, vector, y, gate, sigmoid_cache = gate_cache
    d_logit = sigmoid_backward(jnp.sum(d_y * y, axis=-1), sigmoid_cache)
    d_x, d_params = shared_backward(gate[..., None] * d_y, (experts_cache, None))
    return d_x + d_logit[..., None] * vector, {**d_params, "shared_gate": jnp.einsum("btd,bt->d", x, d_logit)}


def moe_forward(
    x: Float[Array, "B T D"], params: dict, top_k: int, capacity_factor: float, renormalise: bool = True
) -> tuple[MoEOutput, tuple]:
    """Router, dispatch, experts, combine, and the shared expert. Each sequence is a group of its own.

    params: {"router" [D, E], "w_in" [E, D, F], "w_out" [E, F, D]} for GELU, and "w_gate" [E, D, F] for SwiGLU. A shared
    expert is "shared", its matrices as of one expert: [1, D, S] and [1, S, D]; and "shared_gate" [D], its gate.
    """
    experts_total = params["router"].shape[-1]
    places = capacity(x.shape[1], experts_total, top_k, capacity_factor)
    routing, router_cache = router_forward(x, params["router"], top_k, renormalise)
    slot, keep = assign_slots(routing.experts, experts_total, places)
    u, dispatch_cache = dispatch_forward(x, slot, experts_total, places)
    h, expert_cache = experts_forward(u, params)
    y, combine_cache = combine_forward(h, routing.gates, slot)
    shared_cache = None
    if "shared" in params:
        shared, shared_cache = shared_forward(x, params)
        y = y + shared
    output = MoEOutput(y, routing.balance, routing.z, 1.0 - jnp.mean(keep.astype(x.dtype)))
    return output, (router_cache, dispatch_cache, expert_cache, combine_cache, shared_cache)


def moe_backward(
    d_y: Float[Array, "B T D"], d_balance: Scalar, d_z: Scalar, cache: tuple
) -> tuple[Float[Array, "B T D"], dict]:
    """(d_x, d_params). x is used by the router and by the experts: its gradient is the sum of all ways."""
    router_cache, dispatch_cache, expert_cache, combine_cache, shared_cache = cache
    d_h, d_gates = combine_backward(d_y, combine_cache)
    d_u, d_params = experts_backward(d_h, expert_cache)
    d_x_experts = dispatch_backward(d_u, dispatch_cache)
    d_x_router, d_params["router"] = router_backward(d_gates, d_balance, d_z, router_cache)
    d_x = d_x_experts + d_x_router
    if shared_cache is not None:
        d_x_shared, d_shared = shared_backward(d_y, shared_cache)
        d_x, d_params = d_x + d_x_shared, d_params | d_shared
    return d_x, d_params
