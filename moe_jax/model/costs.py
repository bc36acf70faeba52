"""The cost of a model, by formula: parameters by group, floating-point operations and least memory of training.

It needs no jax, so the commands know it before anything starts. Chapter 16 of `foundation` derives the formulas. The
operations of a compiled program, padding included: `certify/formulas.py`.
"""

from typing import NamedTuple

from moe_jax.config import ModelConfig, RunConfig
from moe_jax.config.presets import with_vocabulary
from moe_jax.config.train import NEWTON_SCHULZ_STEPS, STATE_BYTES
from moe_jax.model.kernels import LONGEST_KEPT, kept_scores


class Count(NamedTuple):
    """Parameters of a group."""

    total: int
    active: int
    """Parameters that are used for one token."""
    multiplied: int
    """Active matrix entries that a token is multiplied with: 2 floating-point operations each forward, 4 backward."""


def count_parameters(config: ModelConfig) -> dict[str, Count]:
    """Parameters by group; the groups sum to the whole model exactly.

    One token uses one row of the embedding, one row of the positions, K of E experts, and all other parameters. A tied
    head is the same matrix as the embedding: it is counted once, and all of it is active and multiplied.
    """
    c = config
    bias = int(c.bias)
    norm = c.width * (1 + (bias if c.norm == "layernorm" else 0))
    attention = sum(rows * columns for rows, columns in attention_shapes(c))
    (_, qkv), (_, out) = attention_shapes(c)
    attention_bias = (bias or c.qkv_bias) * qkv + bias * out
    matrices = c.expert_matrices
    expert = matrices * c.width * c.expert_hidden
    vocabulary = c.vocab_size * c.width
    groups: dict[str, Count] = {}
    if c.tied_head:
        groups["embedding, also the head"] = Count(vocabulary, vocabulary, vocabulary)
    else:
        groups["embedding"] = Count(vocabulary, c.width, 0)
        groups["head"] = Count(vocabulary, vocabulary, vocabulary)
    if c.positions == "learned":
        groups["positions"] = Count(c.seq_len * c.width, c.width, 0)
    stored = c.layers * (attention + attention_bias)
    groups["attention"] = Count(stored, stored, c.layers * attention)
    if c.dense == "none":
        router = c.layers * c.width * c.experts
        vectors = c.layers * (c.experts * (c.routing.balancing == "bias") + c.width * c.shared_gate)
        groups["routers"] = Count(router + vectors, router + vectors, router)
        active = c.layers * c.routing.top_k * expert
        groups["experts"] = Count(c.layers * c.experts * expert, active, active)
        if c.shared_experts:
            shared = c.layers * c.shared_experts * expert
            groups["shared experts"] = Count(shared, shared, shared)
    else:
        dense = c.layers * matrices * c.width * c.dense_hidden
        groups["dense FFN"] = Count(dense, dense, dense)
    norms = (2 * c.layers + 1) * norm
    normalised = {"none": 0, "head": 2, "full": c.heads + c.key_value_heads}[c.qk_norm]
    norms += c.layers * normalised * c.head_width
    groups["norms"] = Count(norms, norms, 0)
    return groups


def adapter_parameters(config: RunConfig) -> Count:
    """Parameters of the low-rank adapters (`model/low_rank.py`); zeros if there are none.

    A matrix of D rows and F columns has R (D + F). Those of the K chosen experts are active.
    """
    model, rank = config.model, config.train.lora_rank
    if not rank:
        return Count(0, 0, 0)
    matrices = model.expert_matrices
    routed = model.dense == "none"
    attention = sum(rank * (rows + columns) for rows, columns in attention_shapes(model))
    hidden = model.expert_hidden if routed else model.dense_hidden
    expert_rank = max(1, rank // model.routing.top_k) if routed else rank
    expert = matrices * expert_rank * (model.width + hidden)
    shared = 0
    if routed and model.shared_experts:
        shared = matrices * rank * (model.width + model.shared_experts * hidden)
    router = model.width * model.experts * config.train.train_router
    total = attention + (model.experts if routed else 1) * expert + shared + router
    active = attention + (model.routing.top_k if routed else 1) * expert + shared + router
    return Count(model.layers * total, model.layers * active, model.layers * active)


def attention_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """The shapes of the two matrices of an attention layer: qkv and out."""
    c = config
    return [
        (c.width, (c.heads + 2 * c.key_value_heads) * c.head_width),
        (c.heads * c.head_width, c.width),
    ]


def totals(groups: dict[str, Count]) -> Count:
    """The sum of the groups."""
    total, active, multiplied = (sum(column) for column in zip(*groups.values(), strict=True))
    return Count(total, active, multiplied)


def training_flops(config: RunConfig, steps: int) -> int:
    """Floating-point operations of training: 6 x active matmul parameters x tokens, plus the matrix products of Muon.

    Matmul parameters are attention, router, K experts, shared experts (or the dense network) and head. Lookups, norms,
    biases and attention scores are not counted. With adapters, the model's own matrices have no gradient: 4 operations
    for each of their entries, and 6 for those of the adapters.
    """
    train = config.train
    tokens = steps * config.tokens_per_step
    if train.lora_rank:
        whole, added = totals(count_parameters(config.model)).multiplied, adapter_parameters(config).multiplied
        return (4 * whole + 6 * added) * tokens
    own = muon_flops(config.model, train.muon_router) if train.optimizer == "muon" else 0
    return 6 * totals(count_parameters(config.model)).multiplied * tokens + own * steps


def muon_flops(config: ModelConfig, routers: bool = False) -> int:
    """Floating-point operations of the matrix products in one Muon step.

    For a matrix X of m rows and n >= m columns, each Newton-Schulz iteration computes S = X X^T, then S S, then a
    product of an m x m matrix with X: 4 m^2 n + 2 m^3 operations.
    """
    width, hidden = config.width, config.expert_hidden if config.dense == "none" else config.dense_hidden
    experts = config.experts if config.dense == "none" else 1
    matrices = config.expert_matrices
    shapes = [*attention_shapes(config), *[(width, hidden)] * (experts * matrices)]
    if config.dense == "none" and config.shared_experts:  # the hidden width of a dense baseline includes them
        shapes += [(width, config.shared_experts * hidden)] * matrices
    shapes += [(width, config.experts)] * (routers and config.dense == "none")
    once = sum(4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3 for s in shapes)
    return config.layers * NEWTON_SCHULZ_STEPS * once


# Memory


def least_step_bytes(config: RunConfig) -> int:
    """Bytes that are in memory at once in a training step, whatever the compiler does.

    Parameters, and gradients and optimizer state of what is trained; the residual stream of each layer; and the
    attention weights. All gradients are there at once, because clipping needs the norm of all before the first update.
    The compiler may keep them in the precision of the products that they come from; the sum over micro-batches is
    float32. Up to 1,024 positions the backward pass keeps the attention weights of each layer, or with remat those of
    one layer: batch x heads x T^2 / 2. For longer sequences it computes them again, a block at a time: batch x heads x
    128 x T.
    """
    config = with_vocabulary(config)
    model, train = config.model, config.train
    # `auto` may become a precision of two bytes.
    number = 4 if config.execution.compute_dtype == "float32" else 2
    weight = 2 if train.param_dtype == "bfloat16" else 4
    whole, state = totals(count_parameters(model)).total, STATE_BYTES[train.optimizer]
    parameters, trained, stored = whole * weight, whole, weight
    if train.lora_rank:  # the model's own weights have neither gradient nor state; adapters are float32
        trained, stored = adapter_parameters(config).total, 4
        parameters += trained * stored
    gradient = 4 if train.grad_accum > 1 else min(stored, number)
    parameters += trained * (gradient + state)
    residual = model.layers * train.batch_size * model.seq_len * model.width
    layers = 1 if config.execution.remat or model.seq_len > LONGEST_KEPT else model.layers
    weights = layers * train.batch_size * model.heads * kept_scores(model.seq_len)
    return int(parameters) + (residual + weights) * number
