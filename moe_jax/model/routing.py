"""The router: which experts a token goes to, with which gate, and in which slot.

Pure functions of arrays. B sequences of T tokens, E experts, K choices of a token, C slots of an expert.

0. `jitter` and `noisy`, in training only and off by default: on the router's input, and on its logits.

1. `route`: p = softmax(logits), top-K by logit, gates renormalised over the K (Shazeer et al. 2017, section 2.1;
   Fedus et al. 2021, section 2.1 for K = 1).
2. `places`: the place of each (token, choice) pair in the queue for its expert. *Token-major* priority
   (`positions_in_expert`): earlier tokens first. So no token can take a slot from an earlier one, and the layer is
   causal. The other rules let a later token decide what an earlier one gets; their names say "leaky".
3. A pair is kept where its position is below the capacity (`moe_jax.config.capacity`). The keep mask is an
   array of its own: a gate that underflows to 0 is still a kept choice.

A row whose logits hold a NaN or +inf is *invalid*: it takes no slot, and its output is NaN.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.config import Priority
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


def jitter(x: Float[Array, "B T D"], key: Key[Array, ""], amount: float) -> Float[Array, "B T D"]:
    """The router's input times uniform numbers from [1 - amount, 1 + amount] (Fedus et al. 2021, appendix C), in at
    least float32: between 0.99 and 1.01 bfloat16 has five numbers."""
    x = x.astype(at_least_float32(x.dtype))
    return x * jax.random.uniform(key, x.shape, x.dtype, 1 - amount, 1 + amount)


def noisy(logits: Float[Array, "B T E"], key: Key[Array, ""], deviation: float) -> Float[Array, "B T E"]:
    """Noisy top-K: Gaussian noise on the logits (Shazeer et al. 2017, equation 4, with the constant deviation of
    Riquelme et al. 2021, section 2.1)."""
    return logits + deviation * jax.random.normal(key, logits.shape, logits.dtype)


def route(logits: Float[Array, "B T E"], top_k: int, bias: Float[Array, " E"] | None = None) -> Routing:
    """Choose `top_k` experts a token, by logit: probabilities of far apart logits underflow to equal zeros.

    The gates are softmax over the K chosen logits, which equals p renormalised over them and cannot divide 0 by
    0. For one choice that would be the constant 1, and the router would get no gradient; its gate is p (Switch).

    With a `bias` the K largest of p + bias are chosen, and the gates stay those of the logits: what balances the
    load has no say in the output (Wang et al. 2024, "Auxiliary-loss-free load balancing", equation 3).
    """
    probs = jax.nn.softmax(logits, axis=-1)
    _, expert = jax.lax.top_k(jax.lax.stop_gradient(logits if bias is None else probs + bias), top_k)
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


def places(routing: Routing, priority: Priority) -> Int[Array, "B T K"]:
    """The place of each pair in the queue for its expert, from 0, by a rule of priority.

    token                   earlier tokens first: causal
    leaky-choice-major      all first choices, then all second ones (Lepikhin et al. 2020, algorithm 1)
    leaky-batch-priority    tokens by their largest gate, not by position (Riquelme et al. 2021, section 4)
    leaky-expert-choice     an expert takes the tokens that like it most; of a routing `by_experts` (Zhou et al. 2022)
    """
    experts = routing.logits.shape[-1]
    if priority == "token":
        return positions_in_expert(routing.expert, routing.valid, experts)
    if priority == "leaky-choice-major":
        hits = jax.nn.one_hot(routing.expert, experts, dtype=jnp.int32) * routing.valid[..., None, None]
        batch, tokens, top_k, _ = hits.shape
        queue = hits.swapaxes(1, 2).reshape(batch, top_k * tokens, experts)
        before = (jnp.cumsum(queue, axis=1) - queue).reshape(batch, top_k, tokens, experts).swapaxes(1, 2)
        return jnp.take_along_axis(before, routing.expert[..., None], axis=-1)[..., 0]
    # From here on tokens queue by a score, the best first; a broken token comes last.
    if priority == "leaky-batch-priority":
        order = _ranking(jnp.where(routing.valid, routing.probs.max(-1), -1), axis=1)
        sorted_experts = jnp.take_along_axis(routing.expert, order[..., None], axis=1)
        place = positions_in_expert(sorted_experts, jnp.take_along_axis(routing.valid, order, axis=1), experts)
        return jnp.take_along_axis(place, jnp.argsort(order, axis=1)[..., None], axis=1)
    score = jnp.where(routing.valid[..., None], routing.probs, -1)
    return jnp.argsort(_ranking(score, axis=1), axis=1)


def _ranking(score: Array, axis: int) -> Array:
    """Indices from the largest score to the smallest; of equal ones the earlier first."""
    return jnp.argsort(-jax.lax.stop_gradient(score), axis=axis, stable=True)


def by_experts(routing: Routing) -> Routing:
    """The routing of expert choice: every token applies to all E experts (K = E), with p as its gate, and each
    expert takes the C that it likes most (Zhou et al. 2022, section 3.2)."""
    batch, tokens, experts = routing.logits.shape
    every = jnp.broadcast_to(jnp.arange(experts), (batch, tokens, experts))
    gate = jnp.where(routing.valid[..., None], routing.probs, jnp.nan)
    return routing._replace(expert=every, gate=gate)
