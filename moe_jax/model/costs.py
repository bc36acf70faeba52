"""The cost of a model, by formula: parameters by group, floating-point operations, least memory and time of
training.

It needs no jax, so the commands know it before anything starts. Chapter 16 of `foundation` derives the formulas.
"""

import math
from fractions import Fraction
from typing import NamedTuple

from moe_jax.config import ModelConfig, RunConfig
from moe_jax.config.presets import with_vocabulary
from moe_jax.config.train import NEWTON_SCHULZ_STEPS, STATE_BYTES
from moe_jax.model.kernels.query_blocks import LONGEST_KEPT, computed_scores, kept_scores


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


def expert_flops(config: ModelConfig, rows: int) -> int:
    """Forward floating-point operations of the experts' matrix products on `rows` rows, one token each."""
    matrices = config.expert_matrices
    return 2 * rows * matrices * config.width * config.expert_hidden


def router_flops(config: ModelConfig, tokens: int) -> int:
    """Forward floating-point operations of a router on `tokens` tokens."""
    return 2 * tokens * config.width * config.experts


def layer_flops(config: ModelConfig, batch: int, devices: int = 1) -> int:
    """Forward floating-point operations of an MoE layer in training, with the rows of its dispatch: of one device, with
    `batch` sequences, of `devices` along a mesh axis `expert`."""
    tokens, rows = batch * config.seq_len, multiplied_rows(config, batch, devices)
    return expert_flops(config, rows + tokens * config.shared_experts) + router_flops(config, tokens)


def multiplied_rows(config: ModelConfig, batch: int, devices: int = 1) -> int:
    """Rows that the routed experts of a device multiply when a layer trains on `batch` sequences of each device.

    With dispatch by `capacity`, the rows are all slots of all experts, filled or empty. With `blocks`, they are all
    rows of all blocks, filled or empty. With several `devices` along a mesh axis `expert`, the blocks have room for all
    rows that may arrive.
    """
    tokens = batch * config.seq_len
    if config.routing.dispatch == "blocks":
        from moe_jax.model.moe.layer import block_rows  # imports jax, which the other formulas do without

        pairs, own = tokens * config.routing.top_k, config.experts // devices
        block = block_rows(pairs, own)
        arriving = pairs if devices == 1 else devices * batch * config.device_rows(devices)
        return (own + (arriving - 1) // block) * block
    # Not `config.capacity`: certificates compare programs, which have that one, with these slots.
    share = Fraction(str(config.routing.capacity_factor)) * config.seq_len * config.routing.top_k / config.experts
    return batch * config.experts * min(config.seq_len, max(1, math.ceil(share)))


def attention_flops(config: ModelConfig, batch: int) -> int:
    """Forward floating-point operations of an attention layer: its two matrices, and two products of all scores that
    are computed."""
    matrices = sum(rows * columns for rows, columns in attention_shapes(config))
    return 2 * batch * config.seq_len * matrices + 2 * _score_product(config, batch, computed_scores(config.seq_len))


def _score_product(config: ModelConfig, batch: int, scores: int) -> int:
    """Operations of one product of the scores or weights with vectors of the heads, in one layer. `scores` is the
    number of them that are computed for a head of a sequence."""
    return 2 * batch * config.heads * config.head_width * scores


def step_products(config: RunConfig, batch: int, devices: int = 1, cudnn: bool = False) -> dict[str, int]:
    """Floating-point operations of all matrix products of a training step with one micro-batch of `batch` sequences, by
    named scope of the program: attention, ffn, head. The `rest` are those of the optimizer. For models without
    adapters. With several `devices` along a mesh axis `expert`, `ffn` counts the work of one of them.

    The backward pass of a product is two products. Besides, the backward pass repeats

        the scores of a sequence above LONGEST_KEPT
        with remat: the forward pass of the blocks, without the products whose result it does not need (the output
        projection of attention, and the last matrix of the experts, before which the gates enter) or keeps (the router)

    With `cudnn`, attention is that of `library_attention.py`: the scores of later positions are not computed. The
    backward pass computes the scores again, and with remat both products of the forward pass.
    """
    model, again = config.model, int(config.execution.remat)
    tokens = batch * model.seq_len
    qkv, out = (2 * tokens * rows * columns for rows, columns in attention_shapes(model))
    computed = model.seq_len * (model.seq_len + 1) // 2 if cudnn else computed_scores(model.seq_len)
    score = _score_product(model, batch, computed)
    scores = 6 + 2 * again + (cudnn or model.seq_len > LONGEST_KEPT)
    matrices = model.expert_matrices
    if model.dense == "none":
        rows = multiplied_rows(model, batch, devices) + tokens * model.shared_experts
        ffn = (3 + again) * layer_flops(model, batch, devices)
        ffn -= again * (expert_flops(model, rows) // matrices + router_flops(model, tokens))
    else:
        product = 2 * tokens * model.width * model.dense_hidden
        ffn = matrices * (3 + again) * product - again * product
    muon = muon_flops(model, config.train.muon_router) if config.train.optimizer == "muon" else 0
    return {
        "attention": model.layers * ((3 + again) * qkv + 3 * out + scores * score),
        "ffn": model.layers * ffn,
        "head": 6 * model.vocab_size * model.width * tokens,
        "rest": muon,
    }


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


# The time of training

LOWEST, HIGHEST = 0.3, 0.6
"""A training step is expected to reach a share of the matmul rate between these two."""
USEFUL_PASSES = 4
"""Reading a text up to four times is nearly as good as new text. More passes are worth less and less, and about 16 are
the end (Muennighoff et al. 2023, "Scaling data-constrained language models", section 5)."""


def expected_time(config: RunConfig, rate: float) -> str:
    """The time of a run on a machine of `rate` floating-point operations a second in one matrix product, as a person
    would say it. Compiling, evaluations and checkpoints are not in it. The vocabulary size must be known
    (`with_vocabulary`)."""
    flops = training_flops(config, config.train.steps)
    return f"{duration(flops / (HIGHEST * rate))} to {duration(flops / (LOWEST * rate))}"


def steps_within(config: RunConfig, rate: float, seconds: float) -> int:
    """Most steps whose slowest expected time is at most `seconds`; at least 1."""
    return max(1, int(seconds * LOWEST * rate / training_flops(config, 1)))


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would use."""
    if seconds < 1:
        return "under a second"
    if seconds < 100:
        return f"{seconds:.0f} s"
    for limit, size, unit in ((100 * 60, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"
