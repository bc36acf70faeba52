"""A test of causality: one token is changed, and no bit of an earlier output may change, while experts drop tokens.

No output of the other sequence of the batch may change either. The priorities that leak must change earlier outputs.
If they did not, the test could not see a leak.

Chapter 12 of `foundation` derives which priorities leak, and enumerates all texts of a small case.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.certificates.certificate import Certificate
from moe_jax.config import ModelConfig, RunConfig
from moe_jax.model.moe.layer import Mode, MoE, build_layer
from moe_jax.model.moe.reference import OneHotMoE
from moe_jax.model.transformer import Params, abstract_model, merge

BATCH = 2
CAPACITY_SCALE = 0.5
"""The tests multiply the configured capacity factor by this number, so that many pairs are dropped."""


class Variant(NamedTuple):
    """A layer to test, by its differences from dispatch by capacity with token priority."""

    routing: dict[str, Any]
    shape: dict[str, Any] = {}  # noqa: RUF012
    moe: type[MoE] = MoE


VARIANTS = {
    "token priority, by capacity": Variant({}),
    "token priority, one-hot reference": Variant({}, moe=OneHotMoE),
    "noisy router": Variant({"logit_noise": 0.5}),
    "jittered router": Variant({"input_jitter": 0.3}),
    "balance by bias": Variant({"balancing": "bias"}),
    "shared expert": Variant({}, {"shared_experts": 1}),
    "blocks (dropless)": Variant({"dispatch": "blocks"}),
    "choice-major priority": Variant({"priority": "leaky-choice-major"}),
    "batch priority": Variant({"priority": "leaky-batch-priority"}),
    "expert choice": Variant({"priority": "leaky-expert-choice"}),
}


class PerturbationResult(NamedTuple):
    """What changed when single tokens were changed, summed over the changed positions."""

    earlier: int
    """Outputs before the changed token that changed."""
    other_row: int
    """Outputs of the other sequence that changed."""
    later: int
    """Changed outputs at the changed token and after it. If this is 0, the test changed nothing."""
    dropped: float
    """Largest share of (token, choice) pairs that got no slot, over the layers."""

    def __str__(self) -> str:
        return (
            f"{self.earlier} earlier outputs and {self.other_row} of the other sequence changed, "
            f"{self.dropped:.0%} of the choices dropped"
        )

    def causal(self, leaky: bool) -> bool:
        """Whether the layer behaves as expected: a causal layer changes no earlier output, a leaky one changes some."""
        return (self.earlier > 0) == leaky and self.other_row == 0 and self.later > 0


def count_changes(run: Callable[[Any], tuple[Any, Any]], before: np.ndarray, other: np.ndarray) -> PerturbationResult:
    """Compare `run(before)` with runs in which one position of the first or of the last row is taken from `other`.

    `run` returns outputs [B, T, ...] and the share of pairs dropped.
    """
    rows, tokens = before.shape[:2]
    y, dropped = (np.asarray(a) for a in run(before))
    counts = np.zeros(3, int)
    for t in sorted({tokens // 4, tokens // 2, 3 * tokens // 4, tokens - 1}):
        for row in (0, rows - 1):
            after = before.copy()
            after[row, t] = other[row, t]
            changed = (np.asarray(run(after)[0]) != y).reshape(rows, tokens, -1).any(-1)
            counts += changed[row, :t].sum(), np.delete(changed, row, 0).sum(), changed[row, t:].sum()
    return PerturbationResult(int(counts[0]), int(counts[1]), int(counts[2]), float(dropped.max()))


def layer_causality(config: ModelConfig, ffn: dict[str, Any] | None) -> Iterator[Certificate]:
    """Test each variant in one layer of the model's shape. `ffn` gives the router and the experts; None: random ones.

    Every variant except `blocks` has a capacity, even if the model trains without one.
    """
    limited = tight(config).with_routing(dispatch="capacity", priority="token")
    rng = np.random.default_rng(0)
    before, other = rng.normal(size=(2, BATCH, config.seq_len, config.width)).astype(np.float32)
    for name, variant in VARIANTS.items():
        model = dataclasses.replace(limited, **variant.shape).with_routing(**variant.routing)
        layer = build_layer(model, nnx.Rngs(params=jax.random.key(1)), variant.moe)
        if ffn is not None:
            nnx.update(layer, nnx.State({"router": ffn["router"], "experts": ffn["experts"]}))
        graphdef, state = nnx.split(layer)
        key = jax.random.key(2)

        def run(x: Any, graphdef: nnx.GraphDef = graphdef, state: Any = state, key: Any = key) -> tuple[Any, Any]:
            y, stats = nnx.merge(graphdef, state)(x, Mode.TRAIN, key)
            return y, stats.drop_fraction

        found = count_changes(jax.jit(run), before, other)
        leaky = model.routing.priority != "token"
        drops = found.dropped > 0 or model.routing.dispatch == "blocks"
        asked = "leaks: earlier outputs change, and none of the other sequence" if leaky else _expected(model)
        yield Certificate(f"causality: {name}", found.causal(leaky) and drops, str(found), asked, leaky)


def model_causality(config: RunConfig, params: Params) -> Certificate:
    """Test the whole model in training mode, without dropout, with its capacity factor times CAPACITY_SCALE."""
    model = tight(config.model)
    graphdef, _ = abstract_model(model)

    @jax.jit
    def run(tokens: Any) -> tuple[Any, Any]:
        hidden, stats, _ = merge(graphdef, params)(tokens, Mode.TRAIN)
        return hidden, jnp.zeros(()) if stats is None else stats.drop_fraction

    return tokens_causality("causality: the whole model", model, run, BATCH)


def tight(model: ModelConfig) -> ModelConfig:
    """The model with its capacity factor times CAPACITY_SCALE."""
    return model.with_routing(capacity_factor=model.routing.capacity_factor * CAPACITY_SCALE)


def tokens_causality(
    name: str, model: ModelConfig, run: Callable[[Any], tuple[Any, Any]], sequences: int
) -> Certificate:
    """Test `run(tokens [B, T])`, which returns hidden states [B, T, D] and the share of pairs dropped, on random tokens
    of B = `sequences` sequences."""
    rng = np.random.default_rng(0)
    before, other = rng.integers(0, model.vocab_size, (2, sequences, model.seq_len)).astype(np.int32)
    found = count_changes(run, before, other)
    leaky = model.routing.priority != "token"
    drops = found.dropped > 0 or model.dropless
    asked = (
        "leaks, as configured: earlier outputs change, and none of the other sequence" if leaky else _expected(model)
    )
    return Certificate(name, found.causal(leaky) and drops, str(found), asked, leaky)


def _expected(model: ModelConfig) -> str:
    return (
        "none of them changes; nothing is dropped"
        if model.dropless
        else "none of them changes, while choices are dropped"
    )
