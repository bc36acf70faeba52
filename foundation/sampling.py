"""From logits to a token, and a small model that guesses for a large one. Derived in chapter 15.

A temperature divides the logits. Filters look at the softmax of the result, and a token must pass all of them:

    top-k     the k likeliest
    top-p     the fewest likeliest that together reach p: a token stays if the mass *before* it is below p
    min-p     those with at least min-p times the largest probability

What is left is divided by its sum: p. A draft with a law q proposes x, which is accepted with probability
min(1, p_x / q_x), or else replaced from the residual (p - q)+ / sum (p - q)+. Token x comes out with

    min(p_x, q_x) + (p_x - q_x)+ = p_x            whatever q is

Sources: Holtzman et al. 2020, section 3.1 (top-p); Nguyen et al. 2024 (min-p); Leviathan et al. 2023, section 2.3,
theorem 3.5 and equation 1; Chen et al. 2023, algorithm 2.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

Law = Float[Array, "*rows V"]


def filtered_law(
    logits: Float[Array, " V"], temperature: float, top_k: int, top_p: float, min_p: float
) -> Float[Array, " V"]:
    """The law that is sampled from. top_k 0, top_p 1 and min_p 0 are off. Temperature 0 takes the likeliest token.

    The likeliest token passes every filter. Of equal logits the lower index is the likelier one.
    """
    rank = jnp.argsort(jnp.argsort(-logits, stable=True))
    if temperature == 0.0:
        return (rank == 0).astype(logits.dtype)
    weights = jnp.exp((logits - jnp.max(logits)) / temperature)
    p = weights / jnp.sum(weights)
    before = jnp.sum(jnp.where(rank[None, :] < rank[:, None], p[None, :], 0.0), axis=1)  # mass of likelier tokens
    stays = p >= min_p * jnp.max(p)
    if top_k > 0:
        stays &= rank < top_k
    if top_p < 1.0:
        stays &= before < top_p
    kept = jnp.where(stays | (rank == 0), p, 0.0)
    return kept / jnp.sum(kept)


def accepted_mass(p: Law, q: Law) -> Law:
    """q_x min(1, p_x / q_x) for each x: the probability that x is proposed and accepted. Where q_x is 0, x is never
    proposed."""
    ratio = p / jnp.where(q > 0.0, q, 1.0)
    return q * jnp.minimum(1.0, ratio)


def residual_law(p: Law, q: Law) -> Law:
    """(p - q)+, divided by its sum. Where p = q nothing is ever rejected, and zeros are given."""
    left = jnp.maximum(p - q, 0.0)
    total = jnp.sum(left, axis=-1, keepdims=True)
    return left / jnp.where(total > 0.0, total, 1.0)


def speculative_law(p: Law, q: Law) -> Law:
    """The law of the token that comes out, by adding up both ways in which it can."""
    accepted = accepted_mass(p, q)
    rejected = 1.0 - jnp.sum(accepted, axis=-1, keepdims=True)
    return accepted + rejected * residual_law(p, q)


def speculative_texts(target: Float[Array, "V V"], draft: Float[Array, "V V"], drafted: int, length: int) -> Array:
    """The law of texts of `length` tokens, written in rounds of `drafted` proposals: [V, V, ..., V], first the token
    before the text.

    Row s of `target` and of `draft` is the law of the token after token s. All ways are added up, none is sampled:
    `after[k]` is the law of the rest of the text where k proposals of the round are not judged yet.
    """
    accepted = accepted_mass(target, draft)
    rejected = (1.0 - jnp.sum(accepted, axis=-1, keepdims=True)) * residual_law(target, draft)
    after = [jnp.ones(len(target), target.dtype)] * (drafted + 1)
    for _ in range(length):
        new_round = after[drafted]
        after = [first(target, new_round)] + [
            first(accepted, after[k - 1]) + first(rejected, new_round) for k in range(1, drafted + 1)
        ]
    return after[drafted]


def first(step: Float[Array, "V V"], rest: Float[Array, "V ..."]) -> Float[Array, "V V ..."]:
    """step[s, x] rest[x, ...]: token x follows s, and then the rest follows x."""
    return step.reshape(*step.shape, *[1] * (rest.ndim - 1)) * rest


def tokens_per_round(acceptance: Float[Array, ""], drafted: int) -> Float[Array, ""]:
    """1 + a + ... + a^n: what a round of n proposals gives, on average, if each is accepted with probability a."""
    return jnp.sum(acceptance ** jnp.arange(drafted + 1))
