"""A transformer without experts: the model of `transformer.py` with one network for all tokens. Derived in chapter 7.

    x      = embedding[tokens]
    a      = x + attention(norm(x))          for each block
    x      = a + feed_forward(norm(a))
    logits = norm(x) embedding^T

RMSNorm, rotary positions, SwiGLU, a tied table, no biases. Backward, a plus is a plus: d_x = d_a + (what the branch
sends back), and the table's gradient is the sum of both uses.

Sources: Vaswani et al. 2017; Radford et al. 2019, section 2.3 (the norm before the branch).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from foundation.attention import multi_head_backward, multi_head_forward
from foundation.embedding import embedding_backward, embedding_forward, tied_head_backward, tied_head_forward
from foundation.feed_forward import feed_forward_backward, feed_forward_forward
from foundation.initializers import normal, residual_scaled
from foundation.losses import cross_entropy_backward, cross_entropy_forward
from foundation.norms import rmsnorm_backward, rmsnorm_forward

Stream = Float[Array, "B T D"]
Scalar = Float[Array, ""]
MATRICES = ("w_gate", "w_in", "w_out")


def dense_block_forward(x: Stream, params: dict, heads: int) -> tuple[Stream, tuple]:
    """One block. params: {"norm1" [D], "attention": see `multi_head_forward`, "norm2" [D], "w_gate" [D, F], "w_in"
    [D, F], "w_out" [F, D]}."""
    n1, norm1_cache = rmsnorm_forward(x, params["norm1"])
    attended, attention_cache = multi_head_forward(n1, params["attention"], heads, rotary=True)
    a = x + attended
    n2, norm2_cache = rmsnorm_forward(a, params["norm2"])
    fed, feed_cache = feed_forward_forward(n2, *(params[name] for name in MATRICES))
    return a + fed, (norm1_cache, attention_cache, norm2_cache, feed_cache)


def dense_block_backward(d_y: Stream, cache: tuple) -> tuple[Stream, dict]:
    """(d_x, d_params)."""
    norm1_cache, attention_cache, norm2_cache, feed_cache = cache
    d_n2, *d_matrices = feed_forward_backward(d_y, feed_cache)
    d_a_branch, d_norm2 = rmsnorm_backward(d_n2, norm2_cache)
    d_a = d_y + d_a_branch  # straight, and through the network
    d_n1, d_attention = multi_head_backward(d_a, attention_cache)
    d_x_branch, d_norm1 = rmsnorm_backward(d_n1, norm1_cache)
    d_params = {"norm1": d_norm1, "attention": d_attention, "norm2": d_norm2}
    return d_a + d_x_branch, {**d_params, **dict(zip(MATRICES, d_matrices, strict=True))}


def dense_model_forward(params: dict, tokens: Int[Array, "B T"], heads: int) -> tuple[Float[Array, "B T V"], tuple]:
    """Logits. params: {"embedding" [V, D], "blocks": [block, ...], "norm" [D]}."""
    x, embedding_cache = embedding_forward(params["embedding"], tokens)
    block_caches = []
    for block in params["blocks"]:
        x, cache = dense_block_forward(x, block, heads)
        block_caches.append(cache)
    x, norm_cache = rmsnorm_forward(x, params["norm"])
    logits, head_cache = tied_head_forward(x, params["embedding"])
    return logits, (embedding_cache, block_caches, norm_cache, head_cache)


def dense_model_backward(d_logits: Float[Array, "B T V"], cache: tuple) -> dict:
    """d_params: the forward lines in reverse order, each replaced by its backward pass."""
    embedding_cache, block_caches, norm_cache, head_cache = cache
    d_x, d_table_head = tied_head_backward(d_logits, head_cache)
    d_x, d_norm = rmsnorm_backward(d_x, norm_cache)
    d_blocks = []
    for block_cache in reversed(block_caches):
        d_x, d_block = dense_block_backward(d_x, block_cache)
        d_blocks.append(d_block)
    d_table = d_table_head + embedding_backward(d_x, embedding_cache)  # used at both ends
    return {"embedding": d_table, "blocks": d_blocks[::-1], "norm": d_norm}


def dense_loss_forward(
    params: dict, tokens: Int[Array, "B T"], targets: Int[Array, "B T"], heads: int
) -> tuple[Scalar, tuple]:
    """Mean cross-entropy of the next token, in nats."""
    logits, model_cache = dense_model_forward(params, tokens, heads)
    loss, loss_cache = cross_entropy_forward(logits, targets)
    return loss, (model_cache, loss_cache)


def dense_loss_backward(d_loss: Scalar, cache: tuple) -> dict:
    """d_params: the gradient of the loss."""
    model_cache, loss_cache = cache
    return dense_model_backward(cross_entropy_backward(d_loss, loss_cache), model_cache)


def init_dense_params(key: Array, vocabulary: int, width: int, layers: int, hidden: int) -> dict:
    """Normal with variance 1 / fan_in, so that signals keep their size; what ends a branch is divided by sqrt(2L)."""
    key, table_key = jax.random.split(key)
    std = width**-0.5
    blocks = []
    for block_key in jax.random.split(key, layers):
        qkv_key, out_key, gate_key, in_key, last_key = jax.random.split(block_key, 5)
        attention = {
            "qkv": {"kernel": normal(qkv_key, (width, 3 * width), std)},
            "out": {"kernel": residual_scaled(out_key, (width, width), layers, std)},
        }
        matrices = {
            "w_gate": normal(gate_key, (width, hidden), std),
            "w_in": normal(in_key, (width, hidden), std),
            "w_out": residual_scaled(last_key, (hidden, width), layers, hidden**-0.5),
        }
        blocks.append({"norm1": jnp.ones(width), "attention": attention, "norm2": jnp.ones(width), **matrices})
    return {"embedding": normal(table_key, (vocabulary, width), std), "blocks": blocks, "norm": jnp.ones(width)}
