"""What a model costs, by formula: parameters by group, and training arithmetic."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import ModelConfig, RunConfig
from moe_jax.model.moe import block_rows


class Count(NamedTuple):
    """Parameters of a group."""

    total: int
    active: int
    """Those that touch one token."""
    multiplied: int
    """Active ones that are entries of a matrix a token is multiplied with: 2 operations forward, 4 backward each."""


def count_parameters(config: ModelConfig) -> dict[str, Count]:
    """Parameters by group; the groups sum to the whole model exactly.

    One token touches one row of the embedding, of the positions and of each table of n-grams, K of E experts, and
    everything else. A tied head is the embedding once more: it is counted where it is stored, all of it active and
    multiplied.
    """
    c = config
    bias = int(c.bias)
    norm = c.width * (1 + (bias if c.norm == "layernorm" else 0))
    attention = 4 * c.width**2
    attention_bias = bias * 4 * c.width
    matrices = 3 if c.activation == "swiglu" else 2
    expert = matrices * c.width * c.expert_hidden
    vocabulary = c.vocab_size * c.width
    groups: dict[str, Count] = {}
    if c.tied_head:
        groups["embedding, also the head"] = Count(vocabulary, vocabulary, vocabulary)
    else:
        groups["embedding"] = Count(vocabulary, c.width, 0)
        groups["head"] = Count(vocabulary, vocabulary, vocabulary)
    if c.ngrams > 1:
        groups["n-grams"] = Count((c.ngrams - 1) * c.ngram_rows * c.width, (c.ngrams - 1) * c.width, 0)
    if c.positions == "learned":
        groups["positions"] = Count(c.seq_len * c.width, c.width, 0)
    stored = c.layers * (attention + attention_bias)
    groups["attention"] = Count(stored, stored, c.layers * attention)
    if c.dense == "none":
        router = c.layers * c.width * c.experts
        bias = c.layers * c.experts * (c.balancing == "bias")
        groups["routers"] = Count(router + bias, router + bias, router)
        active = c.layers * c.top_k * expert
        groups["experts"] = Count(c.layers * c.experts * expert, active, active)
        if c.shared_experts:
            shared = c.layers * c.shared_experts * expert
            groups["shared experts"] = Count(shared, shared, shared)
    else:
        dense = c.layers * matrices * c.width * c.dense_hidden
        groups["dense FFN"] = Count(dense, dense, dense)
    norms = (2 * c.layers + 1) * norm
    norms += c.layers * 2 * c.head_width * c.qk_norm
    groups["norms"] = Count(norms, norms, 0)
    return groups


def totals(groups: dict[str, Count]) -> Count:
    """The sum of the groups."""
    total, active, multiplied = (sum(column) for column in zip(*groups.values(), strict=True))
    return Count(total, active, multiplied)


def expert_flops(config: ModelConfig, rows: int) -> int:
    """Forward operations of the experts' matrix products on this many rows of one token each."""
    matrices = 3 if config.activation == "swiglu" else 2
    return 2 * rows * matrices * config.width * config.expert_hidden


def router_flops(config: ModelConfig, tokens: int) -> int:
    """Forward operations of a router on so many tokens."""
    return 2 * tokens * config.width * config.experts


def bound_flops(config: ModelConfig, batch: int) -> int:
    """Forward operations of an MoE layer at its capacity bound: E*C rows a sequence through an expert, shared experts
    and router on every token."""
    return _layer_flops(config, batch, batch * config.experts * config.capacity)


def layer_flops(config: ModelConfig, batch: int) -> int:
    """The same of a layer as it trains: on the rows that its dispatch multiplies, without the masks of `einsum`."""
    return _layer_flops(config, batch, multiplied_rows(config, batch))


def _layer_flops(config: ModelConfig, batch: int, rows: int) -> int:
    tokens = batch * config.seq_len
    return expert_flops(config, rows + tokens * config.shared_experts) + router_flops(config, tokens)


def multiplied_rows(config: ModelConfig, batch: int) -> int:
    """Rows that the routed experts multiply when a layer trains on `batch` sequences: of each expert its slots, filled
    or not; of `blocks` every row of the plan, empty blocks included; of `dense` every token once an expert."""
    tokens = batch * config.seq_len
    if config.dispatch == "dense":
        return config.experts * tokens
    if config.dispatch == "blocks":
        pairs = tokens * config.top_k
        block = block_rows(pairs, config.experts)
        return (config.experts + (pairs - 1) // block) * block
    return batch * config.experts * config.capacity


def training_flops(config: RunConfig, steps: int) -> int:
    """6 x active matmul parameters x tokens: attention, router, K experts and the head, without lookups, norms,
    biases and the attention scores; plus the optimizer's own matrix products."""
    train = config.train
    tokens = steps * train.batch_size * train.grad_accum * config.model.seq_len
    own = muon_flops(config.model, train.muon_router) if train.optimizer == "muon" else 0
    return 6 * totals(count_parameters(config.model)).multiplied * tokens + own * steps


NEWTON_SCHULZ_STEPS = 5


def muon_flops(config: ModelConfig, routers: bool = False) -> int:
    """Matrix products of one Muon step. For a matrix X of m rows and n >= m columns, each Newton-Schulz iteration
    computes X X^T, the square of that, and a product with X: 4 m^2 n + 2 m^3 operations."""
    width, hidden = config.width, config.expert_hidden if config.dense == "none" else config.dense_hidden
    experts = config.experts if config.dense == "none" else 1
    matrices = 3 if config.activation == "swiglu" else 2
    shapes = [(width, 3 * width), (width, width), *[(width, hidden)] * (experts * matrices)]
    shapes += [(width, config.shared_experts * hidden)] * matrices * (config.shared_experts > 0)
    shapes += [(width, config.experts)] * (routers and config.dense == "none")
    once = sum(4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3 for s in shapes)
    return config.layers * NEWTON_SCHULZ_STEPS * once


def matmul_rate(dtype: str, size: int = 1024, repeats: int = 5) -> float:
    """Operations per second of a square matmul on the first device, the best of a few: what is called its peak."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / float(np.min(seconds))
