"""Learning from rewards and from preferences, without a sample: every text is enumerated. Derived in chapter 21.

A policy gives each text pi(y) = prod_t p(y_t | y_(t-1)), with p the softmax of a table of logits. Its score s(y) = d
log pi(y) / d z has the mean 0, so a baseline b changes no expected gradient:

    reward            J = sum_y pi(y) r(y)        dJ = sum_y pi(y) (r(y) - b) s(y)
    a group of G      b = the group's mean        E[gradient] = (1 - 1/G) dJ: a text's own reward is in its b
    DPO               L = -log sigmoid(m), m = beta [log pi(w)/ref(w) - log pi(l)/ref(l)], dL/dm = -sigmoid(-m)
    PPO               maximise min(rho A, clip(rho, 1 - eps, 1 + eps) A), with rho = pi / pi_old

A term that keeps pi near a reference is estimated with rho = ref / pi by k1 = -log rho, k2 = (log rho)^2 / 2 or k3 =
rho - 1 - log rho. As losses, with the samples held fixed, they descend

    k1: nothing at all        k2: KL(pi || ref)        k3: KL(ref || pi)

Sources: Williams 1992, theorem 1; Rafailov et al. 2023, section 4; Schulman et al. 2017, equation 7; Schulman 2020
(k1, k2, k3); Shao et al. 2024, section 4.1; Liu et al. 2025, section 3 (the bias of GRPO). In the field: TRL #6503.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Logits = Float[Array, "S V"]
"""Row s: the logits of the token after token s. The last row is for the first token."""
Texts = Int[Array, "N T"]
Scalar = Float[Array, ""]


def all_texts(tokens: int, length: int) -> Texts:
    """Every text, [V^T, T]."""
    return jnp.stack(jnp.meshgrid(*[jnp.arange(tokens)] * length, indexing="ij"), axis=-1).reshape(-1, length)


def text_log_probs_forward(logits: Logits, texts: Texts) -> tuple[Float[Array, " N"], tuple]:
    """log pi of each text."""
    log_p = logits - jax.nn.logsumexp(logits, axis=1, keepdims=True)
    start = jnp.full_like(texts[:, :1], len(logits) - 1)
    before = jnp.concatenate([start, texts[:, :-1]], axis=1)
    return jnp.sum(log_p[before, texts], axis=1), (log_p, before, texts)


def text_log_probs_backward(d_log_probs: Float[Array, " N"], cache: tuple) -> Logits:
    """d_logits: each step of a text adds its gradient times (onehot - p) to the row of the token before it."""
    log_p, before, texts = cache
    d_step = jnp.broadcast_to(d_log_probs[:, None], texts.shape)
    chosen = jnp.zeros_like(log_p).at[before, texts].add(d_step)
    return chosen - jnp.exp(log_p) * jnp.sum(chosen, axis=1, keepdims=True)


def expected_reward_forward(logits: Logits, reward: Float[Array, " N"], texts: Texts) -> tuple[Scalar, tuple]:
    """J = sum_y pi(y) r(y), over all texts."""
    log_pi, cache = text_log_probs_forward(logits, texts)
    value = jnp.sum(jnp.exp(log_pi) * reward)
    return value, (log_pi, reward, value, cache)


def expected_reward_backward(d_value: Scalar, cache: tuple) -> Logits:
    """The policy gradient, with J itself as the baseline."""
    log_pi, reward, value, texts_cache = cache
    return text_log_probs_backward(d_value * jnp.exp(log_pi) * (reward - value), texts_cache)


def group_baseline_forward(
    logits: Logits, reward: Float[Array, " N"], texts: Texts, group: int
) -> tuple[Scalar, tuple]:
    """(1 - 1/G) J: what the expected gradient of a group with its own mean as the baseline belongs to."""
    value, cache = expected_reward_forward(logits, reward, texts)
    return (1.0 - 1.0 / group) * value, (cache, group)


def group_baseline_backward(d_value: Scalar, cache: tuple) -> Logits:
    """The expected gradient, from every group of G texts: [N^G, G]."""
    (log_pi, reward, _, texts_cache), group = cache
    groups = all_texts(len(reward), group)
    probability = jnp.exp(jnp.sum(log_pi[groups], axis=1, keepdims=True))
    advantage = reward[groups] - jnp.mean(reward[groups], axis=1, keepdims=True)
    d_log_pi = jnp.zeros_like(reward).at[groups].add(probability * advantage / group)
    return text_log_probs_backward(d_value * d_log_pi, texts_cache)


def kl_forward(logits: Logits, reference: Logits, texts: Texts) -> tuple[Scalar, tuple]:
    """KL(pi || ref) over all texts."""
    log_pi, cache = text_log_probs_forward(logits, texts)
    log_ref, _ = text_log_probs_forward(reference, texts)
    return jnp.sum(jnp.exp(log_pi) * (log_pi - log_ref)), (log_pi, log_ref, cache)


def kl_backward_by_k2(d_value: Scalar, cache: tuple) -> Logits:
    """The expected gradient of (log rho)^2 / 2 at texts drawn from pi."""
    log_pi, log_ref, texts_cache = cache
    return text_log_probs_backward(d_value * jnp.exp(log_pi) * (log_pi - log_ref), texts_cache)


def reverse_kl_forward(logits: Logits, reference: Logits, texts: Texts) -> tuple[Scalar, tuple]:
    """KL(ref || pi) over all texts."""
    log_pi, cache = text_log_probs_forward(logits, texts)
    log_ref, _ = text_log_probs_forward(reference, texts)
    return jnp.sum(jnp.exp(log_ref) * (log_ref - log_pi)), (log_pi, log_ref, cache)


def reverse_kl_backward_by_k3(d_value: Scalar, cache: tuple) -> Logits:
    """The expected gradient of rho - 1 - log rho at texts drawn from pi: pi (1 - rho)."""
    log_pi, log_ref, texts_cache = cache
    return text_log_probs_backward(d_value * jnp.exp(log_pi) * (1.0 - jnp.exp(log_ref - log_pi)), texts_cache)


def dpo_forward(
    chosen: Float[Array, " N"], rejected: Float[Array, " N"], reference: Float[Array, "2 N"], beta: float
) -> tuple[Scalar, tuple]:
    """The mean of -log sigmoid(m) over pairs, from log pi of the chosen and of the rejected texts.

    reference holds log ref of both.
    """
    margin = beta * ((chosen - reference[0]) - (rejected - reference[1]))
    return jnp.mean(jnp.logaddexp(0.0, -margin)), (margin, beta)


def dpo_backward(d_loss: Scalar, cache: tuple) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """(d_chosen, d_rejected): a pair that is judged rightly and by far gets nothing."""
    margin, beta = cache
    d_chosen = -d_loss * beta / (1.0 + jnp.exp(margin)) / len(margin)
    return d_chosen, -d_chosen


def clipped_forward(
    log_pi: Float[Array, " N"], old: Float[Array, " N"], advantage: Float[Array, " N"], eps: float
) -> tuple[Scalar, tuple]:
    """The mean of min(rho A, clip(rho, 1 - eps, 1 + eps) A), to be maximised."""
    rho = jnp.exp(log_pi - old)
    plain, clipped = rho * advantage, jnp.clip(rho, 1.0 - eps, 1.0 + eps) * advantage
    return jnp.mean(jnp.minimum(plain, clipped)), (plain, clipped)


def clipped_backward(d_value: Scalar, cache: tuple) -> Float[Array, " N"]:
    """d_log_pi = rho A where the plain branch is the smaller one, else 0."""
    plain, clipped = cache
    return d_value * jnp.where(plain <= clipped, plain, 0.0) / len(plain)
