"""The router: which K of E experts a token is sent to, with which weight, and two losses. Derived in chapter 8.

    z = x W                     logits, [E]
    p = softmax(z)              probabilities over all E experts
    S = the K largest logits    a choice: piecewise constant, so its derivative is 0 wherever it exists
    g = p_S / sum(p_S)          d_z_S = g (d_g - <g, d_g>), and 0 outside S

For K = 1, and in models that do not divide (OLMoE), g = p_S, and d_z = p (d_p - <p, d_p>) with d_p = d_g on S.

    balance loss    E sum_e f_e P_e in a sequence      dL/dz_te = p_te (E / T) (f_e - sum_j p_tj f_j)
    z-loss          mean of logsumexp(z)^2             dL/dz_te = 2 logsumexp(z_t) p_te / T

f_e is the share of the (token, choice) pairs that went to e, a count and so a constant to the derivative, and P_e the
mean probability of e. The loss is 1 at perfect balance for every K.

Sources: Shazeer et al. 2017, equations 3 to 5 (top-K gates); Lepikhin et al. 2020, algorithm 1 (gates renormalised over
the chosen); Fedus, Zoph and Shazeer 2021, section 2.1 (K = 1) and equations 4 to 6 (balance loss); Zoph et al. 2022,
equation 5 (z-loss).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from foundation.linear import linear_backward, linear_forward
from foundation.softmax import logsumexp_backward, logsumexp_forward, softmax_backward, softmax_forward

Scalar = Float[Array, ""]


class Routing(NamedTuple):
    """What the router decides. `gates` and the two losses have gradients; `experts` has none."""

    gates: Float[Array, "B T K"]
    experts: Int[Array, "B T K"]
    balance: Scalar
    z: Scalar


class RouterCache(NamedTuple):
    """A type of its own, so that a check finds the routers in the cache of a model."""

    linear: tuple
    softmax: tuple
    gates: tuple
    experts: Array
    share: Array
    logsumexp: tuple
    log_total: Array


def router_forward(
    x: Float[Array, "B T D"], kernel: Float[Array, "D E"], top_k: int, renormalise: bool = True
) -> tuple[Routing, RouterCache]:
    """Routes each token to `top_k` experts, by logit; ties go to the lower index. Without `renormalise` the gates are
    entries of p for every K."""
    experts_total = kernel.shape[-1]
    logits, linear_cache = linear_forward(x, kernel)
    p, softmax_cache = softmax_forward(logits)
    chosen_logits, experts = lax.top_k(logits, top_k)  # [B, T, K], largest first
    if top_k == 1 or not renormalise:
        gates, gate_cache = jnp.take_along_axis(p, experts, axis=-1), ()
    else:
        gates, gate_cache = softmax_forward(chosen_logits)

    share = choice_share(experts, experts_total, p.dtype)
    balance = experts_total * jnp.mean(jnp.sum(share * jnp.mean(p, axis=1), axis=-1))
    log_total, lse_cache = logsumexp_forward(logits)
    z = jnp.mean(log_total**2)
    cache = RouterCache(linear_cache, softmax_cache, gate_cache, experts, share, lse_cache, log_total)
    return Routing(gates, experts, balance, z), cache


def router_backward(
    d_gates: Float[Array, "B T K"], d_balance: Scalar, d_z: Scalar, cache: tuple
) -> tuple[Float[Array, "B T D"], Float[Array, "D E"]]:
    """(d_x, d_kernel): the gradients of gates, balance loss and z-loss meet at the logits, and add there."""
    linear_cache, softmax_cache, gate_cache, experts, share, lse_cache, log_total = cache
    batch, tokens, _ = d_gates.shape
    experts_total = share.shape[-1]
    onehot = experts[..., None] == jnp.arange(experts_total)  # [B, T, K, E]

    d_p = d_balance * experts_total * share[:, None, :] / (batch * tokens)  # [B, 1, E], f held constant
    renormalised = len(gate_cache) > 0
    if not renormalised:  # the gates are entries of p
        d_p = d_p + jnp.sum(onehot * d_gates[..., None], axis=2)
    d_logits = softmax_backward(jnp.broadcast_to(d_p, (batch, tokens, experts_total)), softmax_cache)
    if renormalised:  # the gates are a softmax of the chosen logits: scatter its gradient to where they came from
        d_chosen = softmax_backward(d_gates, gate_cache)
        d_logits = d_logits + jnp.sum(onehot * d_chosen[..., None], axis=2)

    d_log_total = d_z * 2.0 * log_total / (batch * tokens)
    d_logits = d_logits + logsumexp_backward(d_log_total, lse_cache)
    d_x, d_kernel, _ = linear_backward(d_logits, linear_cache)
    return d_x, d_kernel


def choice_share(experts: Int[Array, "B T K"], experts_total: int, dtype: jnp.dtype) -> Float[Array, "B E"]:
    """f_be, the share of the T K (token, choice) pairs of a sequence that chose e, dropped ones included."""
    onehot = experts[..., None] == jnp.arange(experts_total)  # [B, T, K, E]
    return jnp.mean(onehot, axis=(1, 2), dtype=dtype)
