"""What keeps a router balanced and its logits small, and what is reported of it. Pure functions of arrays."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.model.routing import Routing, choice_counts


def expert_load(routing: Routing) -> Float[Array, "B E"]:
    """f: share of a sequence's (token, choice) pairs that chose each expert, before drops. Sums to 1 (valid rows)."""
    tokens, top_k = routing.expert.shape[1:]
    counts = choice_counts(routing.expert, routing.valid, routing.logits.shape[-1]).sum(1)
    return counts.astype(routing.probs.dtype) / (tokens * top_k)


def balance_loss(routing: Routing) -> Float[Array, ""]:
    """E * sum_e f_e P_e within each sequence, then the mean over sequences (Fedus et al. 2021, equations 4 to 6).

    f counts choices, which have no gradient; P, the mean probability of each expert, carries it all. The scale is
    1 at perfect balance for every K, and E / K at collapse onto K experts with certainty.
    """
    share = jax.lax.stop_gradient(expert_load(routing))
    mean_prob = routing.probs.mean(1)
    return (routing.logits.shape[-1] * (share * mean_prob).sum(-1)).mean()


def adjusted_bias(bias: Float[Array, " E"], load: Float[Array, " E"], rate: float) -> Float[Array, " E"]:
    """The bias of the next step: a step of `rate` up for an expert below its fair share of the pairs, down for one
    above it (Wang et al. 2024, algorithm 1)."""
    return bias + rate * jnp.sign(load.mean() - load).astype(bias.dtype)


def z_loss(routing: Routing) -> Float[Array, ""]:
    """Mean of logsumexp(logits)^2 over tokens (Zoph et al. 2022, equation 5)."""
    return jnp.square(jax.nn.logsumexp(routing.logits, axis=-1)).mean()
