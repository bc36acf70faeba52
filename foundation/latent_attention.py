"""Multi-head latent attention: one small vector per token stands for all its keys and values. Derived in chapter 12.

    c = x W_c                     the latent, C numbers for a token                            cached
    r = rope(x W_r)               one key of R numbers that all heads share                    cached
    q_h = (x W_q,h, rope(x W_p,h))        k_h = (c W_k,h, r)        v_h = c W_v,h

and attention over all heads. Backward, c gets its gradient through keys and values, and r collects from all heads.

<q, c W_k> = <q W_k^T, c>, so the matrices of keys and values can be moved to the other side. Then all heads read one
key (c, r), whose value is c. A rotation of c W_k would stand in between, which is why r alone carries the position.

Source: DeepSeek-AI 2024 ("DeepSeek-V2"), section 2.1 and appendix C; the same in DeepSeek-V3, equations 1 to 11.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from foundation.attention import attention_backward, attention_forward, causal_mask, join_heads, split_heads
from foundation.linear import linear_backward, linear_forward
from foundation.positions import rope_backward, rope_forward


def latent_attention_forward(
    x: Float[Array, "B T D"], params: dict[str, Array], heads: int
) -> tuple[Float[Array, "B T D"], tuple]:
    """Causal attention. params: "c" [D, C], "r" [D, R], "q" [D, H A], "p" [D, H R], "k" and "v" [C, H A], "out"
    [H A, D]."""
    maps = {name: linear_forward(x, params[name]) for name in ("c", "r", "q", "p")}
    maps |= {name: linear_forward(maps["c"][0], params[name]) for name in ("k", "v")}
    q, p, k, v = (split_heads(maps[name][0], heads) for name in ("q", "p", "k", "v"))
    p, rope_cache = rope_forward(p)
    r, _ = rope_forward(maps["r"][0][:, None])  # [B, 1, T, R], the same angles
    q = jnp.concatenate([q, p], axis=-1)
    k = jnp.concatenate([k, jnp.broadcast_to(r, p.shape)], axis=-1)
    o, attention_cache = attention_forward(q, k, v, causal_mask(x.shape[1]))
    maps["out"] = linear_forward(join_heads(o), params["out"])
    return maps["out"][0], ({name: cache for name, (_, cache) in maps.items()}, rope_cache, attention_cache)


def latent_attention_backward(
    d_y: Float[Array, "B T D"], cache: tuple
) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
    """(d_x, d_params)."""
    linear_caches, rope_cache, attention_cache = cache
    _, heads, _, width = attention_cache[2].shape  # of v
    d_joined, d_out, _ = linear_backward(d_y, linear_caches["out"])
    d_q, d_k, d_v = attention_backward(split_heads(d_joined, heads), attention_cache)
    d_q, d_p = d_q[..., :width], rope_backward(d_q[..., width:], rope_cache)
    d_k, d_r = d_k[..., :width], rope_backward(jnp.sum(d_k[..., width:], axis=1), rope_cache)  # all heads read r
    d_of = {"q": join_heads(d_q), "p": join_heads(d_p), "k": join_heads(d_k), "v": join_heads(d_v), "r": d_r}
    back = {name: linear_backward(d, linear_caches[name]) for name, d in d_of.items()}
    back["c"] = linear_backward(back["k"][0] + back["v"][0], linear_caches["c"])
    d_x = sum((back[name][0] for name in ("c", "r", "q", "p")), start=jnp.zeros(()))
    return d_x, {name: d_kernel for name, (_, d_kernel, _) in back.items()} | {"out": d_out}


def absorbed(x: Float[Array, "B T D"], params: dict[str, Array], heads: int) -> Float[Array, "B T D"]:
    """The same output from what is cached alone: no key and no value of a head is made."""
    c, r = x @ params["c"], rope_forward(x @ params["r"])[0]
    q, p = split_heads(x @ params["q"], heads), rope_forward(split_heads(x @ params["p"], heads))[0]
    width = q.shape[-1]
    w_k, w_v = (params[name].reshape(-1, heads, width) for name in ("k", "v"))
    q = jnp.concatenate([jnp.einsum("bhta,cha->bhtc", q, w_k), p], axis=-1)
    keys = jnp.concatenate([c, r], axis=-1)[:, None]  # one key head
    q = q * math.sqrt(keys.shape[-1] / (width + r.shape[-1]))  # the scale is that of a head's own width
    values = jnp.broadcast_to(c[:, None], (*q.shape[:-1], c.shape[-1]))
    mixed, _ = attention_forward(q, jnp.broadcast_to(keys, q.shape), values, causal_mask(x.shape[1]))
    return join_heads(jnp.einsum("bhtc,cha->bhta", mixed, w_v)) @ params["out"]
