"""The router: which experts a token goes to, with which gate, and in which slot.

Pure functions of arrays. B sequences of T tokens, E experts, K choices of a token, C slots of an expert.

1. `route`: p = softmax(logits), top-K by logit, gates renormalised over the K (Shazeer et al. 2017, section 2.1;
   Fedus et al. 2021, section 2.1 for K = 1).
2. `positions_in_expert`: each (token, choice) pair counts the earlier pairs of its sequence that chose the same
   expert. *Token-major* priority: earlier tokens first. So no token can take a slot from an earlier one, and the
   layer is causal. Choice-major order (all first choices first, GShard) lets a later token evict an earlier one.
3. A pair is kept where its position is below the capacity (`moe_jax.config.capacity`). The keep mask is an
   array of its own: a gate that underflows to 0 is still a kept choice.

A row whose logits hold a NaN or +inf is *invalid*: it takes no slot, and its output is NaN.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.model.precision import at_least_float32


class Routing(NamedTuple):
    """The decisions of one router for a batch, in at least float32."""

    logits: Float[Array, "B T E"]
    probs: Float[Array, "B T E"]
    """Softmax of the logits over all experts."""
    expert: Int[Array, "B T K"]
    """The chosen experts, best first; of equal logits the lower index."""
    gate: Float[Array, "B T K"]
    """Their weights: renormalised over the K chosen; for K = 1 the probability itself."""
    valid: Bool[Array, "B T"]
    """False where the probabilities are NaN."""


def router_logits(x: Float[Array, "B T D"], kernel: Float[Array, "D E"]) -> Float[Array, "B T E"]:
    """x W in at least float32: in bfloat16 the top-K of near-equal logits would be noise (Fedus et al. 2021, 2.4)."""
    dtype = at_least_float32(jnp.promote_types(x.dtype, kernel.dtype))
    return jnp.einsum("btd,de->bte", x.astype(dtype), kernel.astype(dtype))


def route(logits: Float[Array, "B T E"], top_k: int) -> Routing:
    """Choose `top_k` experts a token, by logit: probabilities of far apart logits underflow to equal zeros.

    The gates are softmax over the K chosen logits, which equals p renormalised over them and cannot divide 0 by
    0. For one choice that would be the constant 1, and the router would get no gradient; its gate is p (Switch).
    """
    probs = jax.nn.softmax(logits, axis=-1)
    _, expert = jax.lax.top_k(jax.lax.stop_gradient(logits), top_k)
    # One-hot sums instead of indexing: the gradient of indexing is a scatter-add, slow and unordered on a GPU.
    chosen = jax.nn.one_hot(expert, logits.shape[-1], dtype=bool)
    picked = jnp.where(chosen, logits[:, :, None, :], 0).sum(-1)
    gate = jnp.where(chosen, probs[:, :, None, :], 0).sum(-1) if top_k == 1 else jax.nn.softmax(picked, axis=-1)
    valid = ~jnp.isnan(probs).any(-1)
    gate = jnp.where(valid[..., None], gate, jnp.nan)
    return Routing(logits, probs, expert, gate, valid)


def choice_counts(expert: Int[Array, "B T K"], valid: Bool[Array, "B T"], experts: int) -> Int[Array, "B T E"]:
    """1 where a token chose the expert, else 0. The K choices of a token are distinct."""
    hits = jax.nn.one_hot(expert, experts, dtype=jnp.int32).sum(-2)
    return hits * valid[..., None]


def positions_in_expert(expert: Int[Array, "B T K"], valid: Bool[Array, "B T"], experts: int) -> Int[Array, "B T K"]:
    """For each pair, how many earlier tokens of its sequence chose its expert: its place in the queue, from 0.

    Since the choices of a token are distinct, pairs of one token never queue for the same expert, and counting
    tokens gives the token-major order of pairs.
    """
    hits = choice_counts(expert, valid, experts)
    before = jnp.cumsum(hits, axis=1) - hits
    return jnp.take_along_axis(before, expert, axis=-1)
