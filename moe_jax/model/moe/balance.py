"""Losses that keep a router balanced and its logits small, the load of its experts, and the balance bias. Pure
functions of arrays. Chapter 8 of `foundation` compares ways of balancing."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.model.moe.queues import choice_counts
from moe_jax.model.moe.router import Routing


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
