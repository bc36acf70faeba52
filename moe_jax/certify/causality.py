"""A test of causality: tokens are changed one at a time, and no bit of an earlier output may change, while experts drop
tokens.

Every call changes one position in all sequences of a batch but one. The earlier outputs of the changed sequences, and
all outputs of the sequence that stays the same, are compared bit by bit with those of the unchanged batch. In training
every position is changed in turn. Where that takes too many operations, some positions are left out (`perturbed`).
Evaluation, prefill and decoding, which drop nothing, are tried at FEW positions.

A token is replaced by a random one or by the token before it. A leak shows only where a queue is nearly full, and only
if the change adds a token to this queue or takes one away. A copy of the token before joins the queues of its
neighbour. So copies find leaks between neighbours more often. A leak that none of these texts shows is not found.

Chapter 12 of `foundation` derives which priorities leak, and enumerates all texts of a small case.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.certify import Certificate
from moe_jax.certify.formulas import attention_flops, layer_flops
from moe_jax.config import ModelConfig, RunConfig
from moe_jax.inference.decode import NOTHING_GIVEN, Decoder
from moe_jax.inference.sampling import Sampling
from moe_jax.model.moe.layer import Mode, MoE
from moe_jax.model.transformer import Params, abstract_model, build_layer, merge

CAPACITY_SCALE = 0.5
"""The tests multiply the configured capacity factor by this number, so that many pairs are dropped."""
SEQUENCES = 4
FEW = 24
"""Evenly spaced positions that are tried outside training."""
MOST_FLOPS = 2e12
"""If changing every position takes more operations, some positions are left out: ten seconds at 200 GFLOP/s."""


class PerturbationResult(NamedTuple):
    """What changed when single tokens were changed, summed over all changes."""

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
            f"one token changed at {where} of {self.tokens:,} positions: {self.earlier:,} earlier outputs changed, and "
            f"{self.other_row:,} of the sequence that was left alone; {self.dropped:.0%} of the choices dropped"
        )

    @property
    def causal(self) -> bool:
        """Whether a later output changed, and no earlier one, and none of the sequence that was left alone."""
        return self.earlier == 0 and self.other_row == 0 and self.later > 0


def spaced(first: int, last: int, count: int) -> np.ndarray:
    """Evenly spaced positions, at most `count` of them and at least both ends."""
    return np.unique(np.linspace(first, last, max(count, 2)).round().astype(int))


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
    counts = np.zeros(3, int)
    for t in positions.tolist():
        alone = int(rng.integers(rows))
        after = before.copy()
        after[:, t] = _replaced(before, other, t, rng.random(rows) < 0.5)
        after[alone] = before[alone]
        differs = (_bits(np.asarray(run(after)[0])) != _bits(unchanged)).reshape(rows, tokens, -1).any(-1)
        counts[1] += differs[alone].sum()
        differs[alone] = False
        counts += differs[:, :t].sum(), 0, differs[:, t:].sum()
    earlier, other_row, later = (int(n) for n in counts)
    return PerturbationResult(len(positions), tokens, earlier, other_row, later, float(dropped.max(initial=0)))


def _replaced(before: np.ndarray, other: np.ndarray, t: int, copied: np.ndarray) -> np.ndarray:
    """The new tokens at position t: a copy of the token before where `copied` and where that is another token, else the
    token of `other`."""
    old, previous = before[:, t], before[:, max(t - 1, 0)]
    differs = (previous != old).reshape(len(old), -1).any(-1)
    chosen = (copied & differs).reshape(-1, *[1] * (old.ndim - 1))
    return np.where(chosen, previous, other[:, t])


def _bits(a: np.ndarray) -> np.ndarray:
    """The bits of each number. Zeros of different sign differ, and equal NaNs do not."""
    return np.ascontiguousarray(a).view(f"u{a.dtype.itemsize}")


def layer_causality(config: ModelConfig, ffn: dict[str, Any], moe: type[MoE] = MoE) -> Certificate:
    """Test one layer of the model's shape with the parameters `ffn`. It has a capacity, even if the model trains
    without one. The tests of the package give layers that leak as `moe`."""
    model = tight(config).with_routing(dispatch="capacity")
    flops, layer = layer_flops(model, 1), build_layer(model, nnx.Rngs(params=jax.random.key(1)), moe)
    nnx.update(layer, nnx.State({part: value for part, value in ffn.items() if hasattr(layer, part)}))
    shape = 2, SEQUENCES, model.seq_len, model.width
    before, other = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    graphdef, state = nnx.split(layer)

    @jax.jit
    def run(x: Any) -> tuple[Any, Any]:
        y, stats = nnx.merge(graphdef, state)(x, Mode.TRAIN)
        return y, stats.drop_fraction

    return perturbed("causality: token priority, by capacity", run, before, other, flops, model.capacity)


def perturbed(
    name: str,
    run: Callable[..., tuple[Any, Any]],
    before: np.ndarray,
    other: np.ndarray,
    flops: float,
    slots: int | None,
    positions: np.ndarray | None = None,
) -> Certificate:
    """Test `run(before [B, T, ...])`, which returns outputs [B, T, D] and the share of pairs dropped. The queues have
    `slots` slots; None: nothing is dropped. A sequence takes `flops` operations.

    Unless given, the positions are all, or evenly spaced ones if all take more than MOST_FLOPS operations. With slots,
    a test in which nothing was dropped proves nothing, and fails.
    """
    sequences, tokens = before.shape[:2]
    allowed = int(MOST_FLOPS / (flops * sequences))
    if positions is None and allowed < tokens:
        positions = spaced(0, tokens - 1, allowed)
    found = count_changes(run, before, other, positions)
    claim = "none changes; nothing is dropped" if slots is None else "none changes, while choices are dropped"
    return Certificate(
        name, found.causal and (found.dropped > 0 or slots is None), str(found), claim, name.partition(": ")[2]
    )


def model_causality(config: RunConfig, params: Params) -> Iterator[Certificate]:
    """Test the whole model in float32, without dropout: in training with its capacity factor times CAPACITY_SCALE, and
    in evaluation at FEW positions."""
    model = tight(config.model)
    run = _whole_model(model, params)
    yield tokens_causality("causality: the whole model", model, run, None if model.dropless else model.capacity)
    evaluation, positions = partial(run, mode=Mode.EVALUATE), spaced(0, model.seq_len - 1, FEW)
    yield tokens_causality("causality: the whole model in evaluation", model, evaluation, None, positions=positions)


def _whole_model(model: ModelConfig, params: Params) -> Callable[..., tuple[Any, Any]]:
    """The function of tokens that `perturbed` tests, of a mode."""
    graphdef = abstract_model(model)[0]

    @partial(jax.jit, static_argnames="mode")
    def run(tokens: Any, mode: Mode = Mode.TRAIN) -> tuple[Any, Any]:
        hidden, stats, _ = merge(graphdef, params)(tokens, mode)
        return hidden, jnp.zeros(()) if stats is None else stats.drop_fraction

    return run


def writing_causality(decoder: Decoder, params: Params, vocabulary: int) -> Certificate:
    """Test the programs that write a text: `prefill` of T tokens, of which the first n are the prompt, and `write` of
    one token. All tokens behind the prompt are exchanged. The logits after the prompt and after the written token, and
    the keys and values of the prompt, must keep their bits. Before it is written over, the cache holds the keys and
    values of what was behind the prompt."""
    tokens, other = np.random.default_rng(0).integers(0, vocabulary, (2, 1, decoder.seq_len)).astype(np.int32)
    places = spaced(1, decoder.seq_len - 1, FEW)

    def outputs(n: int, behind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers that may not depend on the tokens behind a prompt of n tokens, and numbers that must."""
        read = decoder.prefill(params, np.concatenate([tokens[:, :n], behind[:, n:]], 1), np.int32(n))
        cache = np.stack([[np.swapaxes(kv.key, -1, -2), kv.value] for kv in read.cache])
        seen = np.zeros(read.logits.shape[1], bool)
        text = decoder.begin(read, seen, Sampling().in_own_types(), jax.random.key(0), False)
        after = decoder.write(params, text, NOTHING_GIVEN, np.int32(1), np.int32(-1)).slots.logits
        return np.concatenate([np.ravel(x) for x in (read.logits, after, cache[..., :n, :])]), cache[..., n:, :]

    pairs = [(outputs(n, tokens), outputs(n, other)) for n in places.tolist()]
    changed = sum(int((_bits(a) != _bits(b)).sum()) for (a, _), (b, _) in pairs)
    return Certificate(
        "causality: prefill and decoding",
        changed == 0 and all((a != b).any() for (_, a), (_, b) in pairs),
        f"{len(places)} prompts of {places[0]} to {places[-1]:,} tokens, with other tokens behind them: {changed:,} of "
        f"{sum(a.size for (a, _), _ in pairs):,} numbers changed",
        "none changes: no logit after the prompt and after the next token, and none of the prompt's keys and values",
        "prefill and decoding",
    )


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
    run: Callable[..., tuple[Any, Any]],
    slots: int | None,
    positions: np.ndarray | None = None,
) -> Certificate:
    """Test `run(tokens [B, T])` as `perturbed` does, on random tokens."""
    routed = layer_flops(model, 1) if model.dense == "none" else 6 * model.seq_len * model.width * model.dense_hidden
    flops = model.layers * (routed + attention_flops(model, 1))
    shape = 2, SEQUENCES, model.seq_len
    before, other = np.random.default_rng(0).integers(0, model.vocab_size, shape).astype(np.int32)
    return perturbed(name, run, before, other, flops, slots, positions)
