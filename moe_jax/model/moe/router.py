"""The router: which experts a token goes to, with which gates, in which order; and what keeps their load even.

Pure functions of arrays. B sequences of T tokens, E experts, K choices of a token. p = softmax(logits), the top K by
logit, gates renormalised over the K chosen (Shazeer et al. 2017, section 2.1; for K = 1 Fedus et al. 2021, section
2.1) unless the policy's `renormalise_gates` is off.

A token whose logits hold a NaN or +inf is *invalid*. It takes no slot, and its gates and its output are NaN.

The queue of an expert is *token-major*: earlier tokens first, then the choices of a token in order. No token can take a
slot from an earlier one, so the layer is causal at a fixed T (the capacity depends on T). `dispatch.Capacity` keeps a
pair whose place is below the capacity. The keep mask is an array of its own: a choice whose gate underflows to 0 still
holds its slot. Chapter 12 of `foundation` derives which orders leak the future, chapter 8 compares ways of balancing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moe_jax.model.precision import at_least_float32, dot_precision

DECISIONS = "routing decisions"
"""The name (`checkpoint_name`) of what a router and a dispatch decided. With remat the backward pass keeps these
few numbers of each token. To compute them again, a GPU would run many small kernels."""


class Routing(NamedTuple):
    """The decisions of one router for a batch, in at least float32."""

    logits: Float[Array, "B T E"]
    probs: Float[Array, "B T E"]
    """Softmax of the logits over all experts."""
    expert_index: Int[Array, "B T K"]
    """The chosen experts, best first. Of equal logits the lower index is chosen."""
    gate: Float[Array, "B T K"]
    """The weights of the chosen experts: probabilities, renormalised over the K chosen experts (`route`); for K = 1 the
    probability itself. NaN for an invalid token, whose choices are all dropped."""
    valid: Bool[Array, "B T"]
    """False for an invalid token, whose probabilities hold a NaN."""


def router_logits(x: Float[Array, "B T D"], kernel: Float[Array, "D E"]) -> Float[Array, "B T E"]:
    """x W in at least float32, and never in TF32: with fewer bits the top K of near-equal logits would be noise (Fedus
    et al. 2021, section 2.4)."""
    dtype = at_least_float32(jnp.promote_types(x.dtype, kernel.dtype))
    return jnp.einsum("btd,de->bte", x.astype(dtype), kernel.astype(dtype), precision=dot_precision(dtype))


def gate_of_shared(x: Float[Array, "B T D"], vector: Float[Array, " D"]) -> Float[Array, "B T"]:
    """The gate of the shared experts, sigmoid(x . vector) in at least float32 (Qwen Team 2024, "Qwen1.5-MoE")."""
    dtype = at_least_float32(jnp.promote_types(x.dtype, vector.dtype))
    return jax.nn.sigmoid((x.astype(dtype) * vector.astype(dtype)).sum(-1))


def route(
    logits: Float[Array, "B T E"],
    top_k: int,
    bias: Float[Array, "... E"] | None = None,
    renormalise: bool = True,
) -> Routing:
    """Choose `top_k` experts for each token, by logit. (By probability, very different logits could underflow to equal
    zeros.)

    The gates are the softmax over the K chosen logits. That equals p renormalised over the K chosen, and cannot divide
    0 by 0. For K = 1 this softmax would be the constant 1, and the router would get no gradient; so the gate is p
    itself (Switch). Without `renormalise` the gates are p for every K (Muennighoff et al. 2024, "OLMoE", section 2).

    With a `bias`, the K experts with the largest p + bias are chosen. The gates still come from the logits, so the bias
    changes the choice but not the gates (Wang et al. 2024, "Auxiliary-loss-free load balancing", equation 3; chapter
    8 of `foundation`).

    An expert whose logit is -inf has the probability 0. It is chosen only by a token that has fewer than K others, and
    then its gate is 0.
    """
    logits = checkpoint_name(logits, DECISIONS)
    probs = jax.nn.softmax(logits, axis=-1)
    score = jax.lax.stop_gradient(logits if bias is None else probs + bias)
    # `top_k` orders -0.0 below 0.0. They are equal, so the lower index must be chosen.
    _, expert = jax.lax.top_k(jnp.where(score == 0, 0, score), top_k)
    expert = checkpoint_name(expert, DECISIONS)
    # One-hot sums instead of indexing. The gradient of indexing is a scatter-add, slow and in no fixed order on a GPU.
    chosen = jax.nn.one_hot(expert, logits.shape[-1], dtype=bool)
    picked = jnp.where(chosen, logits[:, :, None, :], 0).sum(-1)
    if renormalise and top_k > 1:
        gate = jax.nn.softmax(picked, axis=-1)
    else:
        gate = jnp.where(chosen, probs[:, :, None, :], 0).sum(-1)
    valid = checkpoint_name(~jnp.isnan(probs).any(-1), DECISIONS)
    gate = jnp.where(valid[..., None], gate, jnp.nan)
    return Routing(logits, probs, expert, gate, valid)


# The queue of each expert


def choice_counts(expert: Int[Array, "B T K"], valid: Bool[Array, "B T"], experts: int) -> Int[Array, "B T E"]:
    """1 where a valid token chose the expert, else 0. The K choices of a token are distinct."""
    hits = jax.nn.one_hot(expert, experts, dtype=jnp.int32).sum(-2)
    return hits * valid[..., None]


def queue_positions(expert: Int[Array, "B T K"], valid: Bool[Array, "B T"], experts: int) -> Int[Array, "B T K"]:
    """The place of each pair in its expert's queue, from 0: the number of earlier tokens of the sequence that chose the
    expert.

    The K choices of a token are distinct, so the pairs of one token are in different queues. Therefore counting tokens
    gives the token-major order of pairs.
    """
    hits = choice_counts(expert, valid, experts)
    before = jnp.cumsum(hits, axis=1) - hits
    return jnp.take_along_axis(before, expert, axis=-1)


# The load of the experts, and what keeps it even


def expert_load(routing: Routing) -> Float[Array, "B E"]:
    """f: share of a sequence's (token, choice) pairs that chose each expert, before drops. The shares sum to 1 if no
    token is invalid."""
    tokens, top_k = routing.expert_index.shape[1:]
    counts = choice_counts(routing.expert_index, routing.valid, routing.logits.shape[-1]).sum(1)
    return counts.astype(routing.probs.dtype) / (tokens * top_k)


def balance_loss(routing: Routing) -> Float[Array, ""]:
    """E * sum_e f_e P_e within each sequence, then the mean over sequences (Fedus et al. 2021, equations 4 to 6).

    f counts choices and has no gradient. The gradient comes from P, the mean probability of each expert. The loss is 1
    at perfect balance for every K, and E / K where all tokens choose the same K experts with certainty. It can be below
    1 where f and P put the experts in different orders.
    Taken within each sequence, it is the same for micro-batches and for the whole batch (chapter 13 of `foundation`).
    """
    share = jax.lax.stop_gradient(expert_load(routing))
    mean_prob = routing.probs.mean(1)
    return (routing.logits.shape[-1] * (share * mean_prob).sum(-1)).mean()


def adjusted_bias(bias: Float[Array, " E"], load: Float[Array, " E"], rate: float) -> Float[Array, " E"]:
    """The bias for the next step (Wang et al. 2024, algorithm 1). An expert below its fair share of the pairs gets
    `rate` more, and an expert above its fair share gets `rate` less."""
    return bias + rate * jnp.sign(load.mean() - load).astype(bias.dtype)


def z_loss(routing: Routing) -> Float[Array, ""]:
    """Mean of logsumexp(logits)^2 over tokens (Zoph et al. 2022, equation 5)."""
    return jnp.square(jax.nn.logsumexp(routing.logits, axis=-1)).mean()
