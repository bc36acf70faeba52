"""From logits to the next token: repetition penalty, temperature, top-k, top-p and min-p, then one draw.

Chapter 15 of `foundation` derives the filters, and a test compares the distributions.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


class Sampling(NamedTuple):
    """How to draw. These are arguments of the compiled program, not static, so one program serves every setting."""

    temperature: float = 0.8
    """Logits are divided by it; 0 takes the likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest tokens only; 0 is off."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens that together reach this probability (Holtzman et al. 2020); 1 is off."""
    min_p: float = 0.0
    """Draw among tokens whose probability is at least this share of the largest (Nguyen et al. 2024); 0 is off."""
    repetition_penalty: float = 1.0
    """For tokens seen before: positive logits are divided by it, negative logits are multiplied (Keskar et al. 2019); 1
    is off."""

    def in_own_types(self) -> "Sampling":
        """The same settings, with a float where `temperature=0` gave a whole number: jit would compile anew for it."""
        top_p, min_p, penalty = float(self.top_p), float(self.min_p), float(self.repetition_penalty)
        return Sampling(float(self.temperature), int(self.top_k), top_p, min_p, penalty)


def adjusted_logits(logits: Float[Array, "B V"], settings: Sampling, seen: Bool[Array, "B V"]) -> Float[Array, "B V"]:
    """The logits after penalty and temperature, with -inf for every token that a filter (top-k, top-p, min-p) excludes.

    Each filter is computed from the distribution after temperature, independently of the others. A token must pass all
    of them. The likeliest token passes every filter. Temperature 0 leaves only the likeliest token.

    The filters need the tokens in order, and a large vocabulary takes milliseconds to sort. So they are computed only
    if one of them is on.
    """
    penalised = jnp.where(logits > 0, logits / settings.repetition_penalty, logits * settings.repetition_penalty)
    logits = jnp.where(seen, penalised, logits)
    greedy = jnp.asarray(settings.temperature) <= 0
    logits = logits / jnp.where(greedy, 1.0, settings.temperature)
    best = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=bool)  # of equals the lower id
    filtered = (settings.top_k > 0) | (settings.top_p < 1) | (settings.min_p > 0)
    allowed = jax.lax.cond(
        filtered & ~greedy, partial(_allowed, settings), lambda logits: jnp.full(logits.shape, ~greedy), logits
    )
    return jnp.where(allowed | best, logits, -jnp.inf)


def _allowed(settings: Sampling, logits: Float[Array, "B V"]) -> Bool[Array, "B V"]:
    """The tokens that pass all filters."""
    order = jnp.argsort(-logits, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)  # 0 for the likeliest; of equals the lower id
    probs = jax.nn.softmax(logits, axis=-1)
    descending = jnp.take_along_axis(probs, order, axis=-1)
    mass_before = jnp.take_along_axis(jnp.cumsum(descending, axis=-1) - descending, rank, axis=-1)
    allowed = (settings.top_k <= 0) | (rank < settings.top_k)
    allowed &= (mass_before < settings.top_p) | (settings.top_p >= 1)
    return allowed & (probs >= settings.min_p * descending[:, :1])


def sample(
    logits: Float[Array, "B V"], settings: Sampling, seen: Bool[Array, "B V"], key: Key[Array, ""]
) -> Int[Array, " B"]:
    """Draw one token for each row."""
    return jax.random.categorical(key, adjusted_logits(logits, settings, seen), axis=-1)
