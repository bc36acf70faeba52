"""The router: which experts a token goes to, and with which gates.

Pure functions of arrays. B sequences of T tokens, E experts, K choices of a token. p = softmax(logits), the top K by
logit, gates renormalised over the K chosen (Shazeer et al. 2017, section 2.1; for K = 1 Fedus et al. 2021, section
2.1) unless the policy's `renormalise_gates` is off.

A token whose logits hold a NaN or +inf is *invalid*. It takes no slot, and its gates and its output are NaN.

`queues.py` says who gets the slots of an expert.
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
