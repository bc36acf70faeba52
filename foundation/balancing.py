"""Four ways to keep experts busy, and which of them has a gradient. Derived in chapter 16.

With p, [T, E], the router's probabilities, and f_e the share of all T K choices that went to expert e:

    way            what it does                                   gradient            sees the choices
    importance     loss  CV^2 of I_e = sum_t p_te                 through I           no
    balance        loss  E sum_e f_e P_e, P_e = I_e / T           through P alone     yes, in f
    bias           b_e + rate sign(mean f - f_e), added to the    none                yes
                   score that chooses, and not to the gate
    expert choice  each expert takes its C tokens                 none is needed      they are made equal

With S = sum_e I_e and Q = sum_e I_e^2, importance is E Q / S^2 - 1, and its gradient in I_e 2 E (I_e / S^2 - Q / S^3).

Sources: Shazeer et al. 2017, equations 6 and 7; Fedus et al. 2021, equations 4 to 6; Wang et al. 2024, equation 3 and
algorithm 1; Zhou et al. 2022, section 3.2. f divided by T alone, in the field: OLMoE #45.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Scalar = Float[Array, ""]


def importance_loss_forward(probs: Float[Array, "T E"]) -> tuple[Scalar, tuple]:
    """The squared coefficient of variation of I_e, the sum of each expert's probabilities."""
    importance = jnp.sum(probs, axis=0)
    loss = probs.shape[1] * jnp.sum(importance**2) / jnp.sum(importance) ** 2 - 1.0
    return loss, (importance, probs.shape)


def importance_loss_backward(d_loss: Scalar, cache: tuple) -> Float[Array, "T E"]:
    """d_probs: the same for every token, since I is a sum over tokens."""
    importance, (tokens, experts) = cache
    total, squares = jnp.sum(importance), jnp.sum(importance**2)
    d_importance = d_loss * 2.0 * experts * (importance / total**2 - squares / total**3)
    return jnp.broadcast_to(d_importance, (tokens, experts))


def biased_choice(
    probs: Float[Array, "T E"], bias: Float[Array, " E"], top_k: int
) -> tuple[Bool[Array, "T E"], Float[Array, "T E"]]:
    """(chosen, gates): the top_k experts of each token by p + bias; gates are p of the chosen, divided by their sum."""
    rank = jnp.argsort(jnp.argsort(-(probs + bias), axis=1, stable=True), axis=1)
    chosen = rank < top_k
    gates = jnp.where(chosen, probs, 0.0)
    return chosen, gates / jnp.sum(gates, axis=1, keepdims=True)


def choice_fraction(chosen: Bool[Array, "T E"]) -> Float[Array, " E"]:
    """f: each expert's share of all choices. It adds up to 1."""
    return jnp.sum(chosen, axis=0) / jnp.sum(chosen)


def bias_step(bias: Float[Array, " E"], fraction: Float[Array, " E"], rate: float) -> Float[Array, " E"]:
    """An expert below its fair share gets `rate` more, one above it `rate` less."""
    return bias + rate * jnp.sign(jnp.mean(fraction) - fraction)


def balance_loss_of(probs: Float[Array, "T E"], top_k: int) -> Scalar:
    """E sum_e f_e P_e of one sequence."""
    chosen, _ = biased_choice(probs, jnp.zeros(probs.shape[1], probs.dtype), top_k)
    return probs.shape[1] * jnp.sum(choice_fraction(chosen) * jnp.mean(probs, axis=0))


def balanced_by_bias(
    probs: Float[Array, "T E"], top_k: int, rate: float, steps: int
) -> tuple[Float[Array, " E"], Float[Array, " E"]]:
    """(bias, f) after `steps` steps on the same probabilities, from a bias of zero."""
    bias = jnp.zeros(probs.shape[1], probs.dtype)
    for _ in range(steps):
        chosen, _ = biased_choice(probs, bias, top_k)
        bias = bias_step(bias, choice_fraction(chosen), rate)
    return bias, choice_fraction(biased_choice(probs, bias, top_k)[0])
