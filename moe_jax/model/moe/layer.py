"""The mixture-of-experts layer.

The path of a token through the layer: `router.py` chooses its experts, `dispatch.py` brings it to the experts and back,
`experts.py` computes.
"""

import math
from enum import Enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import Activation, RoutingConfig, capacity
from moe_jax.model.layers import matrix_init
from moe_jax.model.moe.dispatch import Blocks, Capacity, Dispatch, PerToken
from moe_jax.model.moe.experts import Experts
from moe_jax.model.moe.router import Routing, balance_loss, expert_load, gate_of_shared, route, router_logits, z_loss

BLOCK_ROWS = 128
"""Most rows of a block in training. A product with 128 rows is already fast."""
INFERENCE_BLOCK_FACTOR = 1.5
"""Rows of a block outside training / an expert's fair share of the pairs. At 1.5 few experts need a second block."""


ROUTER_SCALE = 0.1
"""Standard deviation of a new router's logits for an input of norm sqrt(D)."""


class Mode(Enum):
    """The purpose of a forward pass. It decides the dispatch (`MoE.dispatch_for`)."""

    TRAIN = "train"
    """Training. `RoutingConfig` says how tokens reach the experts, and how many slots these have."""
    EVALUATE = "evaluate"
    """Evaluation. Never drops anything."""
    GENERATE = "generate"
    """Reading a prompt and appending tokens to it. Never drops anything."""
    SERVE = "serve"
    """Appending one token to each of several independent texts. Never drops anything, and no text changes the bits of
    another. A text may have no token: its input is NaN."""


class LayerTrace(NamedTuple):
    """Every routing decision of one layer. For a model, the arrays have a leading axis L."""

    probs: Float[Array, "B T E"]
    expert_index: Int[Array, "B T K"]
    """The chosen experts, best first."""
    gate: Float[Array, "B T K"]
    slot: Int[Array, "B T K"]
    """The place of each choice in its expert's queue, from 0. With a capacity, a valid token's choice is kept if its
    place is below the capacity."""
    keep: Bool[Array, "B T K"]
    attention: Float[Array, "B H T T"] | None = None
    """Attention weights of the block. The last axis is the key position, the axis before it the query position."""


class RouterStats(NamedTuple):
    """The routing statistics of a layer. For a model, the arrays have a leading axis L."""

    balance_loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    drop_fraction: Float[Array, " B"]
    """Share of a sequence's (token, choice) pairs that found no slot."""
    load: Float[Array, " E"]
    """Share of the pairs that chose each expert, before drops."""
    trace: LayerTrace | None = None
    """Only in a traced pass."""


class MoE(nnx.Module):
    """A mixture-of-experts layer: router, dispatch, experts, combine.

    Parameters: router `[D, E]`, and the parameters of `Experts`. With `balancing` = bias also balance_bias `[E]`, which
    has no gradient. With S shared experts also one network of S*F hidden units (Dai et al. 2024, "DeepSeekMoE", section
    3.2), and with `shared_gate` the vector `[D]` of its gate.
    """

    router_delta: nnx.Param | None = None
    """What adapters add to the router, in training only (`model/low_rank.py`)."""
    shared_gate: nnx.Param | None = None
    deterministic: bool = False
    """Whether a call without a mode evaluates. Flax's `model.eval()` and `model.train()` set it."""

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        routing: RoutingConfig | None = None,
        *,
        activation: Activation = "swiglu",
        shared_experts: int = 0,
        shared_gate: bool = False,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ) -> None:
        """A layer for inputs `[B, T, width]`, usable in any Flax model.

        `hidden` is the width of one expert, `experts` their number, `routing` the policy (top 2 at capacity factor
        1.25 unless given). `out_scale` multiplies the initial output projections. With 1 / sqrt(2 x layers), the
        variance of the residual stream does not grow with the number of layers.

        Raises ValueError where `routing.top_k` is below 1 or above the number of experts.
        """
        self.routing = routing or RoutingConfig()
        if not 1 <= self.routing.top_k <= experts:
            raise ValueError(f"top_k {self.routing.top_k}: must be between 1 and the number of experts, {experts}")
        self.router = nnx.Param(matrix_init(rngs, (width, experts), scale=ROUTER_SCALE))
        self.experts = Experts(experts, width, hidden, activation, out_scale, rngs)
        if self.routing.balancing == "bias":
            self.balance_bias = nnx.Param(jnp.zeros(experts))
        self.has_shared = shared_experts > 0
        if self.has_shared:
            self.shared = Experts(1, width, shared_experts * hidden, activation, out_scale, rngs)
        if shared_gate:
            self.shared_gate = nnx.Param(jnp.zeros(width))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mode: Mode | None = None,
        trace: bool = False,
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """The layer's output and its statistics. Add `RouterStats.balance_loss` and `z_loss`, weighted, to your loss.

        Without a mode, the call trains; after Flax's `model.eval()` it evaluates, and drops nothing.
        `trace`, a static argument, adds every decision to the statistics.

        Raises ValueError where `x` has another shape.
        """
        width = self.router.shape[0]
        if x.ndim != 3 or x.shape[-1] != width:
            raise ValueError(f"x must be [B, T, {width}], not {list(x.shape)}")
        with jax.named_scope("router"):
            routing = self.route(x)
        dispatch = self.dispatch_for(mode or (Mode.EVALUATE if self.deterministic else Mode.TRAIN), *x.shape[:2])
        y, dropped = dispatch.apply(x, routing, self.experts)
        if self.has_shared:
            with jax.named_scope("shared"):
                vector = self.shared_gate
                gate = None if vector is None else gate_of_shared(x, vector[...]).reshape(1, -1)
                y = y + self.shared(x.reshape(1, -1, width), gate=gate).reshape(x.shape)
        y = jnp.where(routing.valid[..., None], y, jnp.nan)  # an invalid token gives NaN, so that the error is seen
        stats = RouterStats(balance_loss(routing), z_loss(routing), dropped, expert_load(routing).mean(0))
        if trace:
            position, keep = dispatch.trace(routing)
            decisions = LayerTrace(routing.probs, routing.expert_index, routing.gate, position, keep)
            stats = stats._replace(trace=decisions)
        return y, stats

    def route(self, x: Float[Array, "B T D"]) -> Routing:
        """The routing decisions: each token chooses K experts."""
        matrix = self.router[...]
        logits = router_logits(x, matrix if self.router_delta is None else matrix + self.router_delta[...])
        return self.choose(logits)

    def choose(self, logits: Float[Array, "B T E"]) -> Routing:
        """The K experts of each token, by its logits and, where the experts are balanced by a bias, by the bias."""
        return route(logits, self.routing.top_k, self.selection_bias(), self.routing.renormalise_gates)

    def selection_bias(self) -> Float[Array, "*batch E"] | None:
        """What is added to the probabilities before the largest are taken. None without a balance by bias."""
        return jax.lax.stop_gradient(self.balance_bias[...]) if self.routing.balancing == "bias" else None

    def dispatch_for(self, mode: Mode, batch: int, tokens: int) -> Dispatch:
        """The dispatch of a pass over `batch` sequences of `tokens` tokens each.

        A pass with few (token, choice) pairs is bound by reading weights. If there are at most E pairs, each pair reads
        the weights of its own expert (`PerToken`). If there are more, most experts are chosen by some pair, and the
        weights of each expert are read once for all its pairs (`Blocks`).
        """
        policy, experts = self.routing, self.router.shape[-1]
        pairs = batch * tokens * policy.top_k
        if mode is Mode.TRAIN:
            if policy.dispatch == "blocks":
                return Blocks(block_rows(pairs, experts))
            return Capacity(capacity(tokens, experts, policy.top_k, policy.capacity_factor))
        if pairs <= experts:
            return PerToken(skip=mode is Mode.SERVE and batch > 1)
        if mode is Mode.SERVE and tokens == 1:
            # An expert has at most one pair of each text. So a block of B rows holds all its pairs, and no pair is ever
            # in a further block, whose product is another program with other roundings.
            return Blocks(batch, in_place=True)
        return Blocks(inference_block_rows(pairs, experts), in_place=True)


def block_rows(pairs: int, experts: int) -> int:
    """Rows of a block in training: an expert's fair share of the pairs, rounded up to a power of 2. At least 8, at most
    `pairs` and BLOCK_ROWS.

    The last block of an expert is half empty on average. So with few pairs, blocks of 128 rows would be mostly padding.
    """
    fair = 2 ** math.ceil(math.log2(pairs / experts)) if pairs > experts else 1
    return min(max(fair, 8), BLOCK_ROWS, pairs)


def inference_block_rows(pairs: int, experts: int) -> int:
    """Rows of a block outside training: INFERENCE_BLOCK_FACTOR times an expert's fair share of the pairs, rounded up to
    a multiple of 8, and at most `pairs`. The first blocks of all experts are one batched product."""
    return min(8 * math.ceil(INFERENCE_BLOCK_FACTOR * pairs / experts / 8), pairs)
