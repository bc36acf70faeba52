"""The floating-point operations of compiled programs by formula, rows and scores of padding included."""

import math
from fractions import Fraction

from moe_jax.config import ModelConfig, RunConfig
from moe_jax.model.costs import attention_shapes, muon_flops
from moe_jax.model.kernels import LONGEST_KEPT, computed_scores
from moe_jax.model.moe.layer import block_rows


def expert_flops(config: ModelConfig, rows: int) -> int:
    """Forward floating-point operations of the experts' matrix products on `rows` rows, one token each."""
    matrices = config.expert_matrices
    return 2 * rows * matrices * config.width * config.expert_hidden


def router_flops(config: ModelConfig, tokens: int) -> int:
    """Forward floating-point operations of a router on `tokens` tokens."""
    return 2 * tokens * config.width * config.experts


def layer_flops(config: ModelConfig, batch: int) -> int:
    """Forward floating-point operations of an MoE layer in training, with the rows of its dispatch."""
    tokens, rows = batch * config.seq_len, multiplied_rows(config, batch)
    return expert_flops(config, rows + tokens * config.shared_experts) + router_flops(config, tokens)


def multiplied_rows(config: ModelConfig, batch: int) -> int:
    """Rows that the routed experts multiply when a layer trains on `batch` sequences: all slots of all experts with
    dispatch by `capacity`, all rows of all blocks with `blocks`, filled or empty."""
    tokens = batch * config.seq_len
    if config.routing.dispatch == "blocks":
        pairs = tokens * config.routing.top_k
        block = block_rows(pairs, config.experts)
        return (config.experts + (pairs - 1) // block) * block
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


HEAD_BYTES = 128 * 2**20
"""The head works on as few equal blocks of tokens as keep the float32 logits of a block within so many bytes."""
CARD_COLUMNS = 128
"""On a card the head is padded to a multiple of so many columns."""


def head_flops(width: int, vocabulary: int, tokens: int, on_card: bool = False) -> int:
    """Floating-point operations of the head in a training step, with its padding, by a rule of its own.

    Tokens are padded only where no number of equal blocks, up to twice as many as needed, divides them.
    """
    columns = -(-vocabulary // CARD_COLUMNS) * CARD_COLUMNS if on_card else vocabulary
    needed = math.ceil(Fraction(tokens, max(HEAD_BYTES // (4 * columns), 1)))
    if any(tokens % blocks == 0 for blocks in range(needed, min(2 * needed, tokens) + 1)):
        padded = tokens
    else:
        rows = math.ceil(Fraction(tokens, needed))
        padded = math.ceil(Fraction(tokens, rows)) * rows
    return 6 * width * columns * padded


def step_products(config: RunConfig, batch: int, cudnn: bool = False, on_card: bool = False) -> dict[str, int]:
    """Floating-point operations of all matrix products of a training step with one micro-batch of `batch` sequences, by
    named scope of the program: attention, ffn, head. The `rest` are those of the optimizer. For models without
    adapters.

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
        rows = multiplied_rows(model, batch) + tokens * model.shared_experts
        ffn = (3 + again) * layer_flops(model, batch)
        ffn -= again * (expert_flops(model, rows) // matrices + router_flops(model, tokens))
    else:
        product = 2 * tokens * model.width * model.dense_hidden
        ffn = matrices * (3 + again) * product - again * product
    muon = muon_flops(model, config.train.muon_router) if config.train.optimizer == "muon" else 0
    return {
        "attention": model.layers * ((3 + again) * qkv + 3 * out + scores * score),
        "ffn": model.layers * ffn,
        "head": head_flops(model.width, model.vocab_size, tokens, on_card),
        "rest": muon,
    }
