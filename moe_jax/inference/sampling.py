"""From logits to the next token: repetition penalty, temperature, top-k, top-p and min-p, then one draw.

Chapter 15 of `foundation` derives the filters, and a test compares the distributions.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key


class Sampling(NamedTuple):
    """How to draw. These are arguments of the compiled program, not static, so one program serves every setting."""

    temperature: float = 0.8
    """Logits are divided by it; 0, or less than `COLDEST`, takes the likeliest token."""
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
        own: list[Any] = [
            np.int32(value) if name == "top_k" else np.float32(value) for name, value in self._asdict().items()
        ]
        return Sampling(*own)


COLDEST = 1e-6
"""Below this temperature logits could exceed float32, and a draw could only choose between equals."""
RANKED = 1024
"""So many of the likeliest tokens are put in order at first. A filter seldom leaves more."""


def adjusted_logits(logits: Float[Array, "B V"], settings: Sampling, seen: Bool[Array, "B V"]) -> Float[Array, "B V"]:
    """The logits after penalty and temperature, with -inf for every token that a filter (top-k, top-p, min-p) excludes.

    Each filter is computed from the distribution after temperature, independently of the others. A token must pass all
    of them. The likeliest token passes every filter. Temperature 0 leaves only the likeliest token.
    """
    penalised = jnp.where(logits > 0, logits / settings.repetition_penalty, logits * settings.repetition_penalty)
    logits = jnp.where(seen, penalised, logits)
    return jax.lax.cond(_is_greedy(settings), _likeliest, partial(_tempered, settings), logits)


def _is_greedy(settings: Sampling) -> Bool[Array, ""]:
    return jnp.asarray(settings.temperature) < COLDEST


def _likeliest(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    return jnp.where(jnp.arange(logits.shape[-1]) == argmax(logits)[:, None], logits, -jnp.inf)


def argmax(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The same as `jnp.argmax`: of equals the lower id, and a NaN counts as the largest.

    XLA does not vectorise its own argmax on a CPU. It took 0.27 ms for 50,257 tokens, and these two reductions take
    0.10 ms.
    """
    largest = logits.max(-1, keepdims=True)
    ids = jnp.arange(logits.shape[-1])
    return jnp.where((logits == largest) | jnp.isnan(logits), ids, len(ids)).min(-1)


def _tempered(settings: Sampling, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    logits = logits / settings.temperature
    filtered = (settings.top_k > 0) | (settings.top_p < 1) | (settings.min_p > 0)
    return jax.lax.cond(filtered, partial(_filtered, settings), lambda logits: logits, logits)


def _filtered(settings: Sampling, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """The logits of the tokens that pass all filters.

    The filters need the tokens in order of probability, and sorting a large vocabulary takes longer than computing its
    logits. Each filter excludes all tokens from some rank on. So RANKED tokens are put in order, and all tokens only if
    the last of these passes.
    """
    probs, few = jax.nn.softmax(logits, axis=-1), min(RANKED, logits.shape[-1])

    def passing(count: int) -> tuple[Int[Array, "B count"], Bool[Array, "B count"]]:
        """The `count` likeliest tokens, best first, and whether they pass."""
        _, token = jax.lax.top_k(logits, count)  # of equals the lower id first
        descending = jnp.take_along_axis(probs, token, axis=-1)
        mass_before = jnp.cumsum(descending, axis=-1) - descending
        passes = (settings.top_k <= 0) | (jnp.arange(count) < settings.top_k)
        passes &= (mass_before < settings.top_p) | (settings.top_p >= 1)
        return token, passes & (descending >= settings.min_p * descending[:, :1])

    def left(token: Int[Array, "B count"], passes: Bool[Array, "B count"]) -> Float[Array, "B V"]:
        passes = jnp.put_along_axis(jnp.zeros(logits.shape, bool), token, passes, axis=-1, inplace=False)
        return jnp.where(passes, logits, -jnp.inf)

    token, passes = passing(few)
    more = passes[:, -1].any() & (few < logits.shape[-1])
    return jax.lax.cond(more, lambda: left(*passing(logits.shape[-1])), lambda: left(token, passes))


def sample(
    logits: Float[Array, "B V"], settings: Sampling, seen: Bool[Array, "B V"], key: Key[Array, ""]
) -> Int[Array, " B"]:
    """Draw one token for each row."""
    adjusted = adjusted_logits(logits, settings, seen)
    noise = lambda: jax.random.gumbel(key, adjusted.shape, adjusted.dtype)  # noqa: E731
    none = lambda: jnp.zeros_like(adjusted)  # noqa: E731
    # The largest of logits with Gumbel noise is a draw from their softmax, as in `jax.random.categorical`.
    return argmax(adjusted + jax.lax.cond(_is_greedy(settings), none, noise))
