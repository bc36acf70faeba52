"""The mixture-of-experts layer, and its dense twin."""

from enum import Enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import ModelConfig, capacity
from moe_jax.model import dispatch as d
from moe_jax.model.balance import balance_loss, expert_load, z_loss
from moe_jax.model.experts import Experts
from moe_jax.model.layers import matrix_init
from moe_jax.model.routing import Routing, positions_in_expert, route, router_logits

BLOCK_ROWS = 128
"""Rows of a block of the dropless plan: large enough to multiply fast, small enough to waste little padding."""


class Mode(Enum):
    """What a forward pass is for, which decides how tokens are brought to experts."""

    TRAIN = "train"
    """By `ModelConfig.dispatch`, with its capacity."""
    EVALUATE = "evaluate"
    """Dropless, at about the active arithmetic: blocks. Also prefill."""
    DECODE = "decode"
    """Dropless, reading the weights of the chosen experts only."""


class LayerTrace(NamedTuple):
    """Every decision of one layer, for a reader. For a model, arrays have a leading axis L."""

    probs: Float[Array, "B T E"]
    expert: Int[Array, "B T K"]
    """The chosen experts, best first."""
    gate: Float[Array, "B T K"]
    slot: Int[Array, "B T K"]
    """The place of each choice in its expert's queue, from 0; it is kept where that is below the capacity."""
    keep: Bool[Array, "B T K"]
    attention: Float[Array, "B H T T"] | None = None
    """Attention weights of the block: the last axis is looked at, the one before it looks."""


class RouterStats(NamedTuple):
    """What a layer reports of its routing, besides its output. For a model, arrays have a leading axis L."""

    balance_loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    drop_fraction: Float[Array, ""]
    """Share of the (token, choice) pairs that found no slot."""
    load: Float[Array, " E"]
    """Share of the pairs that chose each expert, before drops."""
    trace: LayerTrace | None = None
    """Only in a traced pass."""


class MoE(nnx.Module):
    """Router, dispatch, experts, combine. Parameters: router `[D, E]`, and those of `Experts`."""

    def __init__(self, config: ModelConfig, out_scale: float, rngs: nnx.Rngs) -> None:
        self.config = config
        self.router = nnx.Param(matrix_init(rngs, (config.width, config.experts), scale=0.1))
        self.experts = Experts(config.experts, config.width, config.expert_hidden, config.activation, out_scale, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], mode: Mode, trace: bool = False
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        routing = route(router_logits(x, self.router[...]), self.config.top_k)
        y, dropped = self._apply(x, routing, mode)
        y = jnp.where(routing.valid[..., None], y, jnp.nan)  # a broken row says so, instead of passing unrouted
        stats = RouterStats(balance_loss(routing), z_loss(routing), dropped, expert_load(routing).mean(0))
        return y, stats._replace(trace=self._trace(routing, mode)) if trace else stats

    def _trace(self, routing: Routing, mode: Mode) -> LayerTrace:
        config = self.config
        slot = positions_in_expert(routing.expert, routing.valid, config.experts)
        keep = jnp.broadcast_to(routing.valid[..., None], slot.shape)
        if mode is Mode.TRAIN and config.dispatch in ("gather", "einsum"):
            keep &= slot < capacity(slot.shape[1], config.experts, config.top_k, config.capacity_factor)
        return LayerTrace(routing.probs, routing.expert, routing.gate, slot, keep)

    def _apply(self, x: Array, routing: Routing, mode: Mode) -> tuple[Array, Array]:
        """The combined output, and the share of pairs that were dropped: counted, so that none is exactly 0."""
        config = self.config
        how = {Mode.TRAIN: config.dispatch, Mode.EVALUATE: "blocks", Mode.DECODE: "per-token"}[mode]
        slots = capacity(x.shape[1], config.experts, config.top_k, config.capacity_factor)
        flat = x.reshape(-1, x.shape[-1])
        if how == "dense":
            rows = self.experts(jnp.broadcast_to(flat, (config.experts, *flat.shape)))
            return d.dense_combine(rows, routing).reshape(x.shape), jnp.zeros(())
        if how == "einsum":
            return self._einsum(x, routing, slots)
        if how == "gather":
            plan = d.plan_capacity(routing, slots)
        elif how == "blocks":
            plan = d.plan_blocks(routing, min(BLOCK_ROWS, routing.expert.size))
        else:
            plan = d.plan_per_token(routing)
        with jax.named_scope("experts"):
            rows = self.experts(d.dispatch(flat, plan), plan.group_expert)
        y = d.combine(rows, routing.gate.reshape(plan.row.shape), plan)
        return y.reshape(x.shape), (~plan.keep).mean(dtype=jnp.float32)

    def _einsum(self, x: Array, routing: Routing, slots: int) -> tuple[Array, Array]:
        to_slots, from_slots = d.einsum_masks(routing, slots)
        rows = jnp.einsum("btec,btd->ebcd", to_slots.astype(x.dtype), x)
        experts, batch = rows.shape[:2]
        rows = self.experts(rows.reshape(experts, batch * slots, -1)).reshape(rows.shape)
        y = jnp.einsum("btec,ebcd->btd", from_slots.astype(x.dtype), rows)
        return y, (routing.expert.size - to_slots.sum()) / routing.expert.size


class DenseFFN(nnx.Module):
    """The dense twin of an MoE layer: one feed-forward network that every token passes."""

    def __init__(self, config: ModelConfig, out_scale: float, rngs: nnx.Rngs) -> None:
        self.experts = Experts(1, config.width, config.dense_hidden, config.activation, out_scale, rngs)

    def __call__(self, x: Float[Array, "B T D"], mode: Mode, trace: bool = False) -> tuple[Float[Array, "B T D"], None]:
        del mode, trace  # every token takes the same way in training, evaluation and decoding
        return self.experts(x.reshape(1, -1, x.shape[-1])).reshape(x.shape), None
