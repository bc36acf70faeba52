"""The mixture-of-experts layer, and its dense twin."""

import math
from enum import Enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.config import ModelConfig, Priority, capacity
from moe_jax.model import dispatch as d
from moe_jax.model.balance import balance_loss, expert_load, z_loss
from moe_jax.model.experts import Experts
from moe_jax.model.layers import matrix_init
from moe_jax.model.routing import Routing, by_experts, jitter, noisy, places, route, router_logits

BLOCK_ROWS = 128
"""Most rows of a block of the dropless plan in training: enough to multiply fast."""
INFERENCE_ROOM = 1.5
"""Rows of a block over the fair share of an expert, outside training: few experts need a second block."""


class Mode(Enum):
    """What a forward pass is for, which decides how tokens are brought to experts."""

    TRAIN = "train"
    """By `ModelConfig.dispatch`, with its capacity and priority."""
    EVALUATE = "evaluate"
    """Dropless, at about the active arithmetic: by blocks, or pair by pair where there are few (`MoE.form`). With an
    `eval_capacity_factor`, that capacity."""
    GENERATE = "generate"
    """Reading a prompt and appending tokens to it. Dropless always, by the same forms."""


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
    drop_fraction: Float[Array, " B"]
    """Share of a sequence's (token, choice) pairs that found no slot; under expert choice, of its tokens that no expert
    took."""
    load: Float[Array, " E"]
    """Share of the pairs that chose each expert, before drops."""
    trace: LayerTrace | None = None
    """Only in a traced pass."""


class MoE(nnx.Module):
    """Router, dispatch, experts, combine. Parameters: router `[D, E]`, and those of `Experts`; with `balancing`
    by bias, balance_bias `[E]`, which has no gradient; with shared experts, those of one FFN of S*F hidden units
    (Dai et al. 2024, "DeepSeekMoE", section 3.2)."""

    def __init__(self, config: ModelConfig, out_scale: float, rngs: nnx.Rngs) -> None:
        self.config = config
        self.router = nnx.Param(matrix_init(rngs, (config.width, config.experts), scale=0.1))
        self.experts = Experts(config.experts, config.width, config.expert_hidden, config.activation, out_scale, rngs)
        if config.balancing == "bias":
            self.balance_bias = nnx.Param(jnp.zeros(config.experts))
        if config.shared_experts:
            hidden = config.shared_experts * config.expert_hidden
            self.shared = Experts(1, config.width, hidden, config.activation, out_scale, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], mode: Mode, key: Key[Array, ""] | None = None, trace: bool = False
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """A key turns the router's noise and jitter on; `trace`, which is static, adds every decision."""
        with jax.named_scope("router"):
            routing = self.route(x, key)
        y, dropped = self._apply(x, routing, mode)
        if self.config.shared_experts:
            with jax.named_scope("shared"):
                y = y + self.shared(x.reshape(1, -1, x.shape[-1])).reshape(x.shape)
        y = jnp.where(routing.valid[..., None], y, jnp.nan)  # a broken row says so, instead of passing unrouted
        stats = RouterStats(balance_loss(routing), z_loss(routing), dropped, expert_load(routing).mean(0))
        return y, stats._replace(trace=self._trace(routing, mode)) if trace else stats

    def _trace(self, routing: Routing, mode: Mode) -> LayerTrace:
        limited = self.form(mode, routing.expert.size) in ("gather", "einsum")
        routing, priority, slots = self._queue(routing, mode)
        slot = places(routing, priority)
        keep = jnp.broadcast_to(routing.valid[..., None], slot.shape)
        if limited:
            keep &= slot < slots
        return LayerTrace(routing.probs, routing.expert, routing.gate, slot, keep)

    def route(self, x: Float[Array, "B T D"], key: Key[Array, ""] | None = None) -> Routing:
        """Each token's own K choices."""
        config = self.config
        if key is not None and config.router_jitter > 0:
            x = jitter(x, jax.random.fold_in(key, 0), config.router_jitter)
        logits = router_logits(x, self.router[...])
        if key is not None and config.router_noise > 0:
            logits = noisy(logits, jax.random.fold_in(key, 1), config.router_noise)
        bias = jax.lax.stop_gradient(self.balance_bias[...]) if config.balancing == "bias" else None
        return route(logits, config.top_k, bias)

    def _apply(self, x: Array, routing: Routing, mode: Mode) -> tuple[Array, Array]:
        """The combined output, and the share of each sequence's pairs that was dropped: counted, so that none is 0."""
        config = self.config
        how = self.form(mode, routing.expert.size)
        if how == "dense":
            flat = x.reshape(-1, x.shape[-1])
            with jax.named_scope("experts"):
                rows = self.experts(jnp.broadcast_to(flat, (config.experts, *flat.shape)))
            return d.dense_combine(rows, routing).reshape(x.shape), jnp.zeros(len(x))
        routing, priority, slots = self._queue(routing, mode)
        if how == "einsum":
            y, keep = self._einsum(x, routing, d.einsum_masks(routing, slots, priority))
        else:
            if how == "gather":
                plan = d.plan_capacity(routing, slots, priority)
            elif how == "blocks":
                rows = block_rows if mode is Mode.TRAIN else roomy_block_rows
                plan = d.plan_blocks(routing, rows(routing.expert.size, config.experts))
            else:
                plan = d.plan_per_token(routing)
            y, keep = self._planned(x, routing, plan, mode), plan.keep
        kept = keep.any(-1) if priority == "leaky-expert-choice" else keep
        return y, (~kept).reshape(len(x), -1).mean(1, dtype=jnp.float32)

    def _queue(self, routing: Routing, mode: Mode) -> tuple[Routing, Priority, int]:
        """The routing whose choices queue for slots, by which rule, and how many slots an expert has for a sequence."""
        config, training = self.config, mode is Mode.TRAIN
        priority = config.priority if training else "token"
        factor = config.capacity_factor if training else config.eval_capacity_factor
        slots = capacity(routing.valid.shape[1], config.experts, config.top_k, factor)
        return by_experts(routing) if priority == "leaky-expert-choice" else routing, priority, slots

    def form(self, mode: Mode, pairs: int) -> str:
        """The form of dispatch for a pass over so many (token, choice) pairs.

        Without drops, weights are read, and that is what a few pairs wait for: once a pair, of the chosen experts
        only, where there are no more pairs than experts; else once an expert, since most are chosen by somebody.
        """
        if mode is Mode.TRAIN:
            return self.config.dispatch
        if mode is Mode.EVALUATE and self.config.eval_capacity_factor > 0:
            return "gather"
        return "per-token" if pairs <= self.config.experts else "blocks"

    def _planned(self, x: Array, routing: Routing, plan: d.Plan, mode: Mode) -> Array:
        with jax.named_scope("dispatch"):
            rows = d.dispatch(x.reshape(-1, x.shape[-1]), plan)
        with jax.named_scope("experts"):
            if plan.group_expert is None or mode is Mode.TRAIN:
                rows = self.experts(rows, plan.group_expert)
            elif plan.used is None:
                rows = self.experts.in_turn(rows[:, 0], plan.group_expert)[:, None]
            else:
                rows = self.experts.in_blocks(rows, plan.group_expert, plan.used)
        with jax.named_scope("combine"):
            return d.combine(rows, routing.gate.reshape(plan.row.shape), plan).reshape(x.shape)

    def _einsum(self, x: Array, routing: Routing, masks: tuple[Array, Array]) -> tuple[Array, Array]:
        to_slots, from_slots = masks
        batch, _, experts, slots = to_slots.shape
        with jax.named_scope("dispatch"):
            rows = jnp.einsum("btec,btd->ebcd", to_slots.astype(x.dtype), x)
        with jax.named_scope("experts"):
            rows = self.experts(rows.reshape(experts, batch * slots, -1)).reshape(rows.shape)
        with jax.named_scope("combine"):
            y = jnp.einsum("btec,ebcd->btd", from_slots.astype(x.dtype), rows)
        chosen = jax.nn.one_hot(routing.expert, experts, dtype=to_slots.dtype)
        return y, jnp.einsum("btke,btec->btk", chosen, to_slots) > 0.5


def block_rows(pairs: int, experts: int) -> int:
    """Rows of a block in training, about the fair share of an expert: an expert's last block is half empty on average,
    so that of a short sequence 128 rows would be padding for the most part."""
    fair = 2 ** math.ceil(math.log2(pairs / experts)) if pairs > experts else 1
    return min(max(fair, 8), BLOCK_ROWS, pairs)


def roomy_block_rows(pairs: int, experts: int) -> int:
    """Rows of a block outside training, of which the first ones are multiplied side by side: a multiple of 8."""
    return min(8 * math.ceil(INFERENCE_ROOM * pairs / experts / 8), pairs)


class DenseFFN(nnx.Module):
    """The dense twin of an MoE layer: one feed-forward network that every token passes."""

    def __init__(self, config: ModelConfig, out_scale: float, rngs: nnx.Rngs) -> None:
        self.experts = Experts(1, config.width, config.dense_hidden, config.activation, out_scale, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], mode: Mode, key: Key[Array, ""] | None = None, trace: bool = False
    ) -> tuple[Float[Array, "B T D"], None]:
        del mode, key, trace  # every token takes the same way in training, evaluation and decoding
        with jax.named_scope("experts"):
            return self.experts(x.reshape(1, -1, x.shape[-1])).reshape(x.shape), None
