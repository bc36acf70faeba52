"""A test of causality: tokens are changed one at a time, and no bit of an earlier output may change, while experts drop
tokens.

Every call changes one position in all sequences of a batch but one. The earlier outputs of the changed sequences, and
all outputs of the sequence that stays the same, are compared bit by bit with those of the unchanged batch. Every
position is changed in turn. Where that takes too many operations, some positions are left out (`chosen_positions`).

A token is replaced by a random one or by the token before it. A leak shows only where a queue is nearly full, and only
if the change adds a token to this queue or takes one away. A copy of the token before joins the queues of its
neighbour. So copies find leaks between neighbours more often. A leak that none of these texts shows is not found.

Chapter 12 of `foundation` derives which priorities leak, and enumerates all texts of a small case.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.certify import Certificate
from moe_jax.config import ModelConfig, RunConfig
from moe_jax.model.costs import attention_flops, layer_flops
from moe_jax.model.moe.layer import Mode, MoE, build_layer
from moe_jax.model.transformer import Params, abstract_model, merge

CAPACITY_SCALE = 0.5
"""The tests multiply the configured capacity factor by this number, so that many pairs are dropped."""
BIAS_DEVIATION = 0.05
"""Standard deviation of the random balance biases, times E. They are added to probabilities, whose mean is 1 / E and
whose deviation at initial parameters is about 0.1 / E."""
MOST_SEQUENCES = 6
SOME_FLOPS = 3e11
"""The number of sequences, from 2 to MOST_SEQUENCES, is chosen so that a test takes about as many operations."""
MOST_FLOPS = 2e12
"""If changing every position in 2 sequences takes more operations, some positions are left out. At 200 GFLOP/s these
are ten seconds."""


class PerturbationResult(NamedTuple):
    """What changed when single tokens were changed, summed over all changes."""

    changes: int
    """Tokens that were changed, one at a time in a sequence."""
    sequences: int
    positions: int
    """Positions that were changed in turn."""
    tokens: int
    """T, positions of a sequence."""
    earlier: int
    """Outputs before the changed token that changed."""
    other_row: int
    """Outputs of the unchanged sequence that changed."""
    later: int
    """Changed outputs at the changed token and after it. If this is 0, the test changed nothing."""
    dropped: float
    """Largest share of (token, choice) pairs that got no slot, over the layers."""

    def __str__(self) -> str:
        where = "each" if self.positions == self.tokens else f"{self.positions:,}"
        return (
            f"{self.changes:,} changes of one token, at {where} of {self.tokens:,} positions, in {self.sequences} "
            f"sequences: {self.earlier:,} earlier outputs changed, and {self.other_row:,} of the sequence that was "
            f"left alone; {self.dropped:.0%} of the choices dropped"
        )

    @property
    def causal(self) -> bool:
        """Whether a later output changed, and no earlier one, and none of the sequence that was left alone."""
        return self.earlier == 0 and self.other_row == 0 and self.later > 0


def sequences_for(flops: float, tokens: int) -> int:
    """Sequences of the batch, if a pass over one sequence of `tokens` tokens takes `flops` operations."""
    return int(np.clip(SOME_FLOPS / (flops * tokens), 2, MOST_SEQUENCES))


def chosen_positions(flops: float, sequences: int, tokens: int, crowded: Callable[[], np.ndarray]) -> np.ndarray:
    """The positions to change, sorted: all of them, or if these take more than MOST_FLOPS operations, evenly spaced
    ones and `crowded()`, the positions that must not be left out."""
    allowed = int(MOST_FLOPS / (flops * sequences))
    if allowed >= tokens:
        return np.arange(tokens)
    evenly = np.linspace(0, tokens - 1, max(allowed, 2)).round().astype(int)
    return np.union1d(evenly, crowded())


def crowded_positions(queued: Callable[[], Any], slots: int | None) -> np.ndarray:
    """Positions of the tokens that take the last slot of a queue or are the first to find it full, in any layer, and
    the positions before and after them. `queued()` [*L, B, T, K] has the place of each pair in its queue, from 0."""
    if slots is None:
        return np.zeros(0, int)
    place = np.asarray(queued())
    tokens = place.shape[-2]
    near = np.argwhere((place == slots - 1) | (place == slots))[:, -2]
    around = np.concatenate([near - 1, near, near + 1])
    return np.unique(around[(around >= 0) & (around < tokens)])


def count_changes(
    run: Callable[[Any], tuple[Any, Any]], before: np.ndarray, other: np.ndarray, positions: np.ndarray | None = None
) -> PerturbationResult:
    """Compare `run(before)` with runs in which one position is changed in all sequences but one.

    `run` returns outputs [B, T, ...] and the share of pairs dropped. Half of the new tokens are taken from `other`, the
    others are copies of the token before. All positions are changed unless some are given. B must be at least 2.
    """
    rows, tokens = before.shape[:2]
    positions = np.arange(tokens) if positions is None else positions
    rng = np.random.default_rng(1)
    unchanged, dropped = (np.asarray(a) for a in run(before))
    changes = 0
    counts = np.zeros(3, int)
    for t in positions.tolist():
        alone = int(rng.integers(rows))
        after = before.copy()
        after[:, t] = _replaced(before, other, t, rng.random(rows) < 0.5)
        after[alone] = before[alone]
        changes += int((after != before).reshape(rows, -1).any(-1).sum())
        differs = _bits_differ(np.asarray(run(after)[0]), unchanged)
        counts[1] += differs[alone].sum()
        differs[alone] = False
        counts += differs[:, :t].sum(), 0, differs[:, t:].sum()
    earlier, other_row, later = (int(n) for n in counts)
    return PerturbationResult(
        changes, rows, len(positions), tokens, earlier, other_row, later, float(dropped.max(initial=0))
    )


def _replaced(before: np.ndarray, other: np.ndarray, t: int, copied: np.ndarray) -> np.ndarray:
    """The new tokens at position t: a copy of the token before where `copied` and where that is another token, else the
    token of `other`."""
    old, previous = before[:, t], before[:, max(t - 1, 0)]
    differs = (previous != old).reshape(len(old), -1).any(-1)
    chosen = (copied & differs).reshape(-1, *[1] * (old.ndim - 1))
    return np.where(chosen, previous, other[:, t])


def _bits_differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where any bit of an output differs, [B, T]. Zeros of different sign differ, and equal NaNs do not."""
    bits = f"u{a.dtype.itemsize}"
    differs = np.ascontiguousarray(a).view(bits) != np.ascontiguousarray(b).view(bits)
    return differs.reshape(*a.shape[:2], -1).any(-1)


class Variant(NamedTuple):
    """A layer to test, by its differences from the configured layer under dispatch by capacity."""

    title: str
    """The claim in plain words."""
    routing: dict[str, Any] = {}  # noqa: RUF012
    moe: type[MoE] = MoE


VARIANTS = {
    "token priority, by capacity": Variant("earlier tokens get the slots first"),
    "balance by bias": Variant("with a bias for each expert that balances the load", {"balancing": "bias"}),
    "shared expert": Variant("with one more expert that every token visits"),
    "blocks (dropless)": Variant("with a row for every choice: nothing is dropped", {"dispatch": "blocks"}),
}


def layer_causality(config: ModelConfig, ffn: dict[str, Any] | None) -> Iterator[Certificate]:
    """Test each variant in one layer of the model's shape. `ffn` gives its parameters; None: random ones.

    Every variant except `blocks` has a capacity, even if the model trains without one.
    """
    for name, variant in VARIANTS.items():
        yield variant_causality(name, variant, config, ffn)


def variant_causality(name: str, variant: Variant, config: ModelConfig, ffn: dict[str, Any] | None) -> Certificate:
    """Test one layer. The tests of the package call this with layers that leak, which must fail."""
    model = tight(config).with_routing(**({"dispatch": "capacity"} | variant.routing))
    if name == "shared expert":
        model = dataclasses.replace(model, shared_experts=max(1, model.shared_experts))
    graphdef, state = nnx.split(_layer(model, variant.moe, ffn))

    @partial(jax.jit, static_argnames="trace")
    def run(x: Any, trace: bool = False) -> tuple[Any, Any]:
        y, stats = nnx.merge(graphdef, state)(x, Mode.TRAIN, trace)
        return (y if stats.trace is None else stats.trace.slot), stats.drop_fraction

    flops = layer_flops(model, 1)
    sequences = sequences_for(flops, model.seq_len)
    before, other = np.random.default_rng(0).normal(size=(2, sequences, model.seq_len, model.width)).astype(np.float32)
    slots = None if model.dropless else model.capacity
    crowded = partial(crowded_positions, lambda: run(before, trace=True)[0], slots)
    positions = chosen_positions(flops, sequences, model.seq_len, crowded)
    counted = count_changes(run, before, other, positions)
    return _certificate(f"causality: {name}", variant.title, counted, slots)


def _certificate(name: str, title: str, counted: PerturbationResult, slots: int | None) -> Certificate:
    """With a capacity, a test in which nothing was dropped proves nothing, and fails."""
    claim = "none changes; nothing is dropped" if slots is None else "none changes, while choices are dropped"
    passed = counted.causal and (counted.dropped > 0 or slots is None)
    return Certificate(name, passed, str(counted), claim, title)


def _layer(model: ModelConfig, moe: type[MoE], ffn: dict[str, Any] | None) -> MoE:
    """The layer with the parameters of `ffn`, as far as it has them. A bias that `ffn` does not give is random: at its
    initial value of zero, it would change nothing."""
    layer = build_layer(model, nnx.Rngs(params=jax.random.key(1)), moe)
    if model.routing.balancing == "bias":
        layer.balance_bias[...] = random_bias(model)
    # A shared expert of the variant is random if the model has none.
    nnx.update(layer, nnx.State({part: value for part, value in (ffn or {}).items() if hasattr(layer, part)}))
    return layer


def random_bias(model: ModelConfig, number: int = 0) -> jax.Array:
    """Random balance biases [E] for the layer of this number."""
    return BIAS_DEVIATION / model.experts * jax.random.normal(jax.random.key(number), (model.experts,))


def model_causality(config: RunConfig, params: Params) -> Certificate:
    """Test the whole model in float32 and training mode, without dropout, with its capacity factor times
    CAPACITY_SCALE."""
    model = tight(config.model)
    graphdef, slots = abstract_model(model)[0], None if model.dropless else model.capacity

    @partial(jax.jit, static_argnames="trace")
    def run(tokens: Any, trace: bool = False) -> tuple[Any, Any]:
        hidden, stats, _ = merge(graphdef, params)(tokens, Mode.TRAIN, trace=trace)
        if stats is None:
            return hidden, jnp.zeros(())
        return (hidden if stats.trace is None else stats.trace.slot), stats.drop_fraction

    return tokens_causality("causality: the whole model", model, run, lambda x: run(x, trace=True)[0], slots)


def tight(model: ModelConfig) -> ModelConfig:
    """The model with its capacity factors times CAPACITY_SCALE."""
    routing = model.routing
    return model.with_routing(
        capacity_factor=routing.capacity_factor * CAPACITY_SCALE,
        device_capacity_factor=routing.device_capacity_factor * CAPACITY_SCALE,
    )


def tokens_causality(
    name: str,
    model: ModelConfig,
    run: Callable[[Any], tuple[Any, Any]],
    queued: Callable[[Any], Any],
    slots: int | None,
    multiple: int = 1,
) -> Certificate:
    """Test `run(tokens [B, T])`, which returns hidden states [B, T, D] and the share of pairs dropped, on random
    tokens. B is a multiple of `multiple`. `queued` gives the places of the pairs in their queues [L, B, T, K], which
    have `slots` slots; None: nothing is dropped."""
    routed = layer_flops(model, 1) if model.dense == "none" else 6 * model.seq_len * model.width * model.dense_hidden
    flops = model.layers * (routed + attention_flops(model, 1))
    sequences = multiple * -(-sequences_for(flops, model.seq_len) // multiple)
    before, other = (
        np.random.default_rng(0).integers(0, model.vocab_size, (2, sequences, model.seq_len)).astype(np.int32)
    )
    crowded = partial(crowded_positions, partial(queued, before), slots)
    positions = chosen_positions(flops, sequences, model.seq_len, crowded)
    counted = count_changes(run, before, other, positions)
    return _certificate(name, name.partition(": ")[2], counted, slots)
