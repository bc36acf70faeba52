"""The static card: parameters and arithmetic by group, by formula beside the compiled program."""

from typing import NamedTuple

from moe_jax.analysis.accounting import Count, count_parameters, expert_flops, layer_flops, router_flops, totals
from moe_jax.analysis.bench.training import compile_step
from moe_jax.analysis.compiled import read_program
from moe_jax.config import ModelConfig, RunConfig
from moe_jax.model import attention

COMPILED_SCOPES = {"attention": "attention", "experts and router": "ffn", "head": "head"}


class Card(NamedTuple):
    """What can be said of a model before anything runs."""

    parameters: dict[str, Count]
    formula: dict[str, float]
    """Training operations of one token by group: forward and backward, and of experts all rows that are
    multiplied."""
    compiled: dict[str, float]
    """The same, read from the optimised program of a whole training step."""
    all_experts: float
    """Training operations of one token if every expert ran on it, over those of this model."""

    @property
    def difference(self) -> float:
        """Largest relative difference between formula and program over the groups."""
        return max(abs(self.compiled[group] / flops - 1) for group, flops in self.formula.items())


def formula(config: ModelConfig, batch_size: int) -> dict[str, float]:
    """Forward and backward operations of one token in a batch of sequences of T, by group.

    Attention: four projections of D x D; and six products of a query with the keys of its block of queries (two
    forward, four backward), of which a block sees those up to its own end. Experts: the rows that the
    dispatch multiplies, filled or not; the products of `einsum` with its masks are left out.
    """
    c = config
    seen = sum((end - first) * end for first, end in attention.query_blocks(c.seq_len)) / c.seq_len
    scores = 6 * 2 * c.width * seen
    if c.dense == "none":
        ffn = 3 * layer_flops(c, batch_size) / (batch_size * c.seq_len)
    else:
        ffn = 6 * totals({"ffn": count_parameters(c)["dense FFN"]}).multiplied / c.layers
    return {
        "attention": c.layers * (6 * 4 * c.width**2 + scores),
        "experts and router": c.layers * ffn,
        "head": 6.0 * c.width * c.vocab_size,
    }


def compute(config: RunConfig, batch_size: int) -> Card:
    """Compiles the training step, for `batch_size` sequences, and counts."""
    program = read_program(compile_step(config, batch_size).as_text())
    tokens = batch_size * config.model.seq_len
    by_formula = formula(config.model, batch_size)
    compiled = {group: program.flops_of(scope) / tokens for group, scope in COMPILED_SCOPES.items()}
    c = config.model
    every = 3 * c.layers * (expert_flops(c, c.experts + c.shared_experts) + router_flops(c, 1))
    whole = sum(by_formula.values())
    dense = whole - by_formula["experts and router"] + every
    return Card(count_parameters(c), by_formula, compiled, dense / whole if c.dense == "none" else 1.0)
