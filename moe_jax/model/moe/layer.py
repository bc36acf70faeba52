"""The mixture-of-experts layer, and the dense network that it is compared with.

The path of a token through the layer: `router.py` chooses its experts, `dispatch.py` brings it to the experts and back,
`experts.py` computes.
"""

import math
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import Activation, ModelConfig, RoutingConfig, capacity
from moe_jax.model.layers import matrix_init
from moe_jax.model.moe.balance import balance_loss, expert_load, z_loss
from moe_jax.model.moe.dispatch import AllExperts, Blocks, Capacity, Dispatch, PerToken
from moe_jax.model.moe.experts import Experts
from moe_jax.model.moe.router import Routing, gate_of_shared, route, router_logits

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
        mode: Mode = Mode.TRAIN,
        trace: bool = False,
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """The layer's output and its statistics. Add `RouterStats.balance_loss` and `z_loss`, weighted, to your loss.

        `trace`, a static argument, adds every decision to the statistics.

        Raises ValueError where `x` has another shape.
        """
        width = self.router.shape[0]
        if x.ndim != 3 or x.shape[-1] != width:
            raise ValueError(f"x must be [B, T, {width}], not {list(x.shape)}")
        with jax.named_scope("router"):
            routing = self.route(x)
        dispatch = self.dispatch_for(mode, *x.shape[:2])
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


class AllExpertsMoE(MoE):
    """The same layer, which trains by `AllExperts`."""

    def dispatch_for(self, mode: Mode, batch: int, tokens: int) -> Dispatch:
        return AllExperts() if mode is Mode.TRAIN else super().dispatch_for(mode, batch, tokens)


def build_layer(config: ModelConfig, rngs: nnx.Rngs, moe: type[MoE] = MoE, out_scale: float = 1.0) -> MoE:
    """An MoE layer of a model's shape and routing policy, with initial parameters."""
    return moe(
        config.width,
        config.expert_hidden,
        config.experts,
        config.routing,
        activation=config.activation,
        shared_experts=config.shared_experts,
        shared_gate=config.shared_gate,
        out_scale=out_scale,
        rngs=rngs,
    )


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


class DenseFFN(nnx.Module):
    """The dense baseline of an MoE layer: one feed-forward network that every token passes through."""

    def __init__(self, width: int, hidden: int, activation: Activation, out_scale: float, rngs: nnx.Rngs) -> None:
        self.experts = Experts(1, width, hidden, activation, out_scale, rngs)

    def __call__(self, x: Float[Array, "B T D"], mode: Mode, trace: bool = False) -> tuple[Float[Array, "B T D"], None]:
        del mode, trace  # every token goes through the same network in training, evaluation and decoding
        with jax.named_scope("experts"):
            return self.experts(x.reshape(1, -1, x.shape[-1])).reshape(x.shape), None


# A layer as a plain function of its parameters, for code that compiles it, counts its operations or times it


type LayerFunction = Callable[[dict[str, Any], jax.Array], jax.Array]
"""(parameters, x [B, T, D]) -> y [B, T, D], in training mode."""


def layer_function(config: ModelConfig, moe: type[MoE] = MoE) -> tuple[LayerFunction, dict[str, Any]]:
    """The layer as a function, and its initial parameters."""
    return _function(_initial_layer(config, moe))


def layer_shapes(config: ModelConfig) -> tuple[LayerFunction, dict[str, Any]]:
    """The layer as a function, and the shapes of its parameters. Allocates nothing."""
    return _function(nnx.eval_shape(lambda: _initial_layer(config, MoE)))


def _initial_layer(config: ModelConfig, moe: type[MoE]) -> MoE:
    return build_layer(config, nnx.Rngs(params=jax.random.key(0)), moe)


def _function(layer: MoE) -> tuple[LayerFunction, dict[str, Any]]:
    graphdef, state = nnx.split(layer, nnx.Param)

    def moe_layer(params: dict[str, Any], x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, nnx.State(jax.tree.map(lambda p: p, params)))(x, Mode.TRAIN)[0]

    return moe_layer, nnx.to_pure_dict(state)


def with_gradients(forward: LayerFunction) -> Callable[..., Any]:
    """(params, x, cotangent) -> (y, the gradients of parameters and x): what a training step needs of a layer."""

    def run(params: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        y, pull = jax.vjp(forward, params, x)
        return y, pull(cotangent)

    return run


# A layer whose experts can be switched off while its program runs


SWITCHES = "off"
"""The name of the switches among the parameters of a layer."""


class SwitchableMoE(MoE):
    """`MoE` with switches: True where an expert is off.

    An expert that is switched off cannot be chosen. The router decides as if the expert did not exist: its logit is
    -inf, so it has the probability 0, the next-best expert takes its place, and the gates are renormalised over the K
    experts that are chosen instead. Where fewer than K experts are left, the gates of those that are left add up to 1.
    Without `renormalise_gates` a gate is the probability among the experts that are left.

    The switches are an argument of the program, beside the parameters. So one compiled program serves every choice of
    experts. Each sequence of a batch has switches of its own, so one call can answer "and without expert 3?" for many
    experts.

    They are kept as a parameter `[1, E]` or `[B, E]`, because parameters are what a compiled program is called with.
    """

    def __init__(self, width: int, hidden: int, experts: int, *arguments: Any, **settings: Any) -> None:
        super().__init__(width, hidden, experts, *arguments, **settings)
        self.off = nnx.Param(jnp.zeros((1, experts), bool))

    def choose(self, logits: Float[Array, "B T E"]) -> Routing:
        return super().choose(jnp.where(self.off[...][:, None, :], -jnp.inf, logits))

    def selection_bias(self) -> Float[Array, "*batch E"] | None:
        bias = super().selection_bias()  # it could lift an expert of probability 0 above the others
        return None if bias is None else jnp.where(self.off[...][:, None, :], -jnp.inf, bias)


def with_switches(params: dict[str, Any], off: Bool[Array, "L B E"]) -> dict[str, Any]:
    """The parameters of a model with the switches of each layer. B is 1, or the number of sequences of the batch."""
    blocks = {n: {**block, "ffn": {**block["ffn"], SWITCHES: off[n]}} for n, block in params["blocks"].items()}
    return {**params, "blocks": blocks}
