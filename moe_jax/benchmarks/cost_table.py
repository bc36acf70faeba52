"""The cost table: parameters and arithmetic by group; the arithmetic by formula and as compiled."""

from typing import NamedTuple

from moe_jax.config import ModelConfig, RunConfig
from moe_jax.model.costs import (
    Count,
    attention_shapes,
    count_parameters,
    expert_flops,
    layer_flops,
    router_flops,
    totals,
)
from moe_jax.model.kernels.query_blocks import LONGEST_KEPT, computed_scores
from moe_jax.model.moe.layer import MoE
from moe_jax.system.hlo import read_program
from moe_jax.training.programs import Programs

COMPILED_SCOPES = {"attention": "attention", "experts and router": "ffn", "head": "head"}


class CostTable(NamedTuple):
    """The costs of a model that are known before anything runs."""

    parameters: dict[str, Count]
    formula: dict[str, float]
    """Training operations of one token by group, forward and backward. The experts' group counts every row that is
    multiplied, filled or not."""
    compiled: dict[str, float]
    """The same, read from the optimised program of a whole training step."""
    all_experts: float
    """Training operations of one token if every expert ran on it, divided by the training operations of this model."""

    @property
    def difference(self) -> float:
        """Largest relative difference between the formula and the compiled program, over the groups."""
        return max(abs(self.compiled[group] / flops - 1) for group, flops in self.formula.items())


def formula(config: ModelConfig, batch_size: int) -> dict[str, float]:
    """Forward and backward operations of one token in a batch of sequences of T, by group.

    Attention: the projections, and six products (two forward, four backward) of each query with keys or
    values; seven for a long sequence, whose scores are computed twice. Queries are computed in blocks; all queries of
    a block, or of a span of a long sequence, read the keys up to its end.
    Experts: the rows that the dispatch multiplies, filled or not.
    """
    c = config
    products = 6 if c.seq_len <= LONGEST_KEPT else 7
    scores = products * 2 * c.heads * c.head_width * computed_scores(c.seq_len) / c.seq_len
    projections = sum(rows * columns for rows, columns in attention_shapes(c))
    if c.dense == "none":
        ffn = 3 * layer_flops(c, batch_size) / (batch_size * c.seq_len)
    else:
        ffn = 6 * totals({"ffn": count_parameters(c)["dense FFN"]}).multiplied / c.layers
    return {
        "attention": c.layers * (6 * projections + scores),
        "experts and router": c.layers * ffn,
        "head": 6.0 * c.width * c.vocab_size,
    }


def compute(config: RunConfig, batch_size: int, moe: type[MoE] = MoE) -> CostTable:
    """The cost table of the training step for `batch_size` sequences, which is compiled here."""
    program = read_program(Programs.of(config, moe=moe).compiled_step(batch_size).as_text())
    tokens = batch_size * config.model.seq_len
    by_formula = formula(config.model, batch_size)
    compiled = {group: program.flops_of(scope) / tokens for group, scope in COMPILED_SCOPES.items()}
    c = config.model
    every = 3 * c.layers * (expert_flops(c, c.experts + c.shared_experts) + router_flops(c, 1))
    whole = sum(by_formula.values())
    dense = whole - by_formula["experts and router"] + every
    return CostTable(count_parameters(c), by_formula, compiled, dense / whole if c.dense == "none" else 1.0)
