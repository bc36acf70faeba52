"""What may be cached: when an output is a function of the text before it. Derived in chapter 12.

The slots of experts are given by a rule: of the tokens that want an expert, the C first in a queue get one. Two tests:

    content     change a token after t: passes if no later token can be before an earlier one, for any text
    length      cut the text after t: passes if, besides, C does not depend on the tokens after t

    rule              order of the queue                       C             content   length
    none              -                                        no limit      passes    passes
    token             position                                 from T        passes    fails
    token, growing    position                                 from t + 1    passes    passes
    choice            rank of the choice, position             from T        fails     fails
    batch             rank, largest probability, position      from T        fails     fails
    expert            probability (all tokens want it)         from T        fails     fails

Sources: Pope et al. 2022, section 2.1 (what is cached); Su et al. 2021, equation 16 (scores see the distance); Lepikhin
et al. 2020, algorithm 1 (choice); Riquelme et al. 2021, section 4 (batch); Zhou et al. 2022, section 3.2 (expert).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from foundation.attention import attention_forward, causal_mask, join_heads, split_heads
from foundation.linear import linear_forward
from foundation.moe import capacity
from foundation.positions import rope_at

RULES = ("none", "token", "token, growing", "choice", "batch", "expert")
"""Who gets a slot first, as in the table above."""


class KeyValueCache(NamedTuple):
    """Keys, turned by their positions, and values: room for N positions, of which the first ones are filled."""

    k: Float[Array, "B H N A"]
    v: Float[Array, "B H N A"]


def projected(x: Float[Array, "B T D"], params: dict, heads: int, first: int) -> list[Float[Array, "B H T A"]]:
    """[q, k, v] of positions that begin at `first`; q and k are turned by their positions."""
    qkv, _ = linear_forward(x, params["qkv"]["kernel"], None)
    q, k, v = (split_heads(part, heads) for part in jnp.split(qkv, 3, axis=-1))
    return [rope_at(q, first), rope_at(k, first), v]


def prefill(
    x: Float[Array, "B T D"], params: dict, heads: int, room: int
) -> tuple[Float[Array, "B T D"], KeyValueCache]:
    """Attention over a prompt at once, and the cache that it leaves, with room for `room` positions."""
    q, k, v = projected(x, params, heads, 0)
    o, _ = attention_forward(q, k, v, causal_mask(x.shape[1]))
    y, _ = linear_forward(join_heads(o), params["out"]["kernel"], None)
    empty = [(0, 0), (0, 0), (0, room - x.shape[1]), (0, 0)]
    return y, KeyValueCache(jnp.pad(k, empty), jnp.pad(v, empty))


def decode_step(
    x: Float[Array, "B 1 D"], params: dict, heads: int, cache: KeyValueCache, position: int
) -> tuple[Float[Array, "B 1 D"], KeyValueCache]:
    """Attention of one new position: its key and value go into the cache, and its query reads all that is filled."""
    q, k, v = projected(x, params, heads, position)
    cache = KeyValueCache(cache.k.at[:, :, position].set(k[:, :, 0]), cache.v.at[:, :, position].set(v[:, :, 0]))
    filled = jnp.arange(cache.k.shape[2]) <= position
    o, _ = attention_forward(q, cache.k, cache.v, filled)
    y, _ = linear_forward(join_heads(o), params["out"]["kernel"], None)
    return y, cache


def decode(x: Float[Array, "B T D"], params: dict, heads: int, prompt: int) -> Float[Array, "B T D"]:
    """Causal attention: the first `prompt` positions at once, the others one by one."""
    y, cache = prefill(x[:, :prompt], params, heads, x.shape[1])
    outputs = [y]
    for position in range(prompt, x.shape[1]):
        y, cache = decode_step(x[:, position : position + 1], params, heads, cache, position)
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1)


def window_mask(positions: int, window: int, sinks: int = 0) -> Bool[Array, "T T"]:
    """True where t may look at s: at the last `window` positions, itself included, and at the first `sinks` ones."""
    t, s = jnp.arange(positions)[:, None], jnp.arange(positions)
    return (s <= t) & ((s > t - window) | (s < sinks))


def kept_choices(probs: Float[Array, "T E"], top_k: int, factor: float, rule: str) -> Bool[Array, "T E"]:
    """Which experts each token of one sequence gets a slot of.

    Under "expert" every token wants every expert; else the `top_k` likeliest ones.
    """
    tokens, experts = probs.shape
    rank = jnp.argsort(jnp.argsort(-probs, axis=1, stable=True), axis=1)  # 0 is the first choice
    wants = jnp.ones_like(rank, bool) if rule == "expert" else rank < top_k
    places: Int[Array, ...] = jnp.array([capacity(n, experts, top_k, factor) for n in range(1, tokens + 1)])[:, None]
    position = jnp.broadcast_to(jnp.arange(tokens)[:, None], probs.shape)
    surest = jnp.broadcast_to(-jnp.max(probs, axis=1, keepdims=True), probs.shape)
    if rule == "none":
        return wants
    orders = {
        "token": (position,),
        "token, growing": (position,),
        "choice": (rank, position),
        "batch": (rank, surest, position),
        "expert": (-probs, position),
    }
    ahead = jnp.sum(comes_before(orders[rule]) & wants[:, None, :], axis=0)  # tokens before t in the queue of e
    return wants & (ahead < (places if rule == "token, growing" else places[-1]))


def comes_before(keys: tuple[Array, ...]) -> Bool[Array, "T T E"]:
    """[s, t, e]: whether token s is before token t in the queue of e, by the first key in which they differ."""
    before, tied = jnp.zeros((), bool), jnp.ones((), bool)
    for key in keys:
        s, t = key[:, None], key[None, :]
        before, tied = before | (tied & (s < t)), tied & (s == t)
    return before


def reach(
    kinds: Float[Array, "N E"], tokens: int, top_k: int, factor: float, rule: str
) -> tuple[Bool[Array, "T T"], Bool[Array, "T T"]]:
    """(content, length), by all N^T sequences of `tokens` tokens of N kinds, so that nothing is missed.

    content[s, t]: in some sequence, another token at s changes what t keeps.
    length[n - 1, t]: in some sequence, cutting it to n tokens changes what t keeps, for t < n.
    """
    count = len(kinds)
    texts = jnp.stack(jnp.meshgrid(*[jnp.arange(count)] * tokens, indexing="ij"), axis=-1).reshape(-1, tokens)
    whole = jax.vmap(lambda text: kept_choices(kinds[text], top_k, factor, rule))(texts)
    grid = whole.reshape(*[count] * tokens, tokens, -1)
    content = [
        jnp.any(jnp.max(grid, axis=s) != jnp.min(grid, axis=s), axis=(*range(tokens - 1), -1)) for s in range(tokens)
    ]
    length = []
    for n in range(1, tokens + 1):
        cut = jax.vmap(lambda text, n=n: kept_choices(kinds[text[:n]], top_k, factor, rule))(texts)
        moved = jnp.any(cut != whole[:, :n], axis=(0, 2))
        length.append(jnp.pad(moved, (0, tokens - n)))
    return jnp.stack(content), jnp.stack(length)


def leaks(kinds: Float[Array, "N E"], tokens: int, top_k: int, factor: float, rule: str) -> Bool[Array, " 2"]:
    """[whether a later token changes what an earlier one keeps, whether a cut does]."""
    content, length = reach(kinds, tokens, top_k, factor, rule)
    return jnp.stack([jnp.any(jnp.tril(content, -1)), jnp.any(length)])
