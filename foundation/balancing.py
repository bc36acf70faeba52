"""Keeping experts busy without a loss, and the router of DeepSeek-V3. Derived in chapter 8.

With scores s, [T, E] (probabilities of a softmax, or sigmoids of the logits), and f_e the share of all T K choices that
went to expert e:

    choice    S_t = the K experts with the largest s_te + b_e
    gate      g_te = scale s_te / sum of s_tj over S_t: the bias is not in it
    step      b_e + rate sign(mean f - f_e)        a controller: nothing is differentiated
    sigmoid   d_z_e = g_e (1 - s_e) (d_g_e - <g, d_g> / scale)    for e in S, and 0 elsewhere

Sources: Wang et al. 2024, equation 3 and algorithm 1 (bias); DeepSeek-AI 2024 ("DeepSeek-V3"), equations 12 to 16
(sigmoid, division, scale).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from foundation.activations import sigmoid_forward


def biased_choice(
    scores: Float[Array, "T E"], bias: Float[Array, " E"], top_k: int
) -> tuple[Bool[Array, "T E"], Float[Array, "T E"]]:
    """(chosen, gates): the top_k experts of each token by s + b; gates are s of the chosen, divided by their sum."""
    rank = jnp.argsort(jnp.argsort(-(scores + bias), axis=1, stable=True), axis=1)
    chosen = rank < top_k
    gates = jnp.where(chosen, scores, 0.0)
    return chosen, gates / jnp.sum(gates, axis=1, keepdims=True)


def sigmoid_router_forward(
    logits: Float[Array, "T E"], bias: Float[Array, " E"], top_k: int, scale: float = 1.0
) -> tuple[Float[Array, "T E"], tuple]:
    """The gates of sigmoid scores, 0 where an expert was not chosen. A token's gates add up to `scale`."""
    scores, _ = sigmoid_forward(logits)
    _, gates = biased_choice(scores, bias, top_k)
    return scale * gates, (gates, scores, scale)


def sigmoid_router_backward(d_gates: Float[Array, "T E"], cache: tuple) -> Float[Array, "T E"]:
    """d_logits. The bias has no gradient."""
    gates, scores, scale = cache
    mean = jnp.sum(gates * d_gates, axis=1, keepdims=True)
    return scale * gates * (1.0 - scores) * (d_gates - mean)


def choice_fraction(chosen: Bool[Array, "T E"]) -> Float[Array, " E"]:
    """f: each expert's share of all choices. It adds up to 1."""
    return jnp.sum(chosen, axis=0) / jnp.sum(chosen)


def bias_step(bias: Float[Array, " E"], fraction: Float[Array, " E"], rate: float) -> Float[Array, " E"]:
    """An expert below its fair share gets `rate` more, one above it `rate` less."""
    return bias + rate * jnp.sign(jnp.mean(fraction) - fraction)


def balanced_by_bias(
    scores: Float[Array, "T E"], top_k: int, rate: float, steps: int
) -> tuple[Float[Array, " E"], Float[Array, " E"]]:
    """(bias, f) after `steps` steps on the same scores, from a bias of zero."""
    bias = jnp.zeros(scores.shape[1], scores.dtype)
    for _ in range(steps):
        chosen, _ = biased_choice(scores, bias, top_k)
        bias = bias_step(bias, choice_fraction(chosen), rate)
    return bias, choice_fraction(biased_choice(scores, bias, top_k)[0])
