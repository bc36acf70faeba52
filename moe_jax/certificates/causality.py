"""A test of causality: tokens are changed one at a time, and no bit of an earlier output may change, while experts drop
tokens.

No output of another sequence of the batch may change either. `perturbation.py` says which tokens are changed. A leak
that none of these texts shows is not found.

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

from moe_jax.certificates.certificate import Certificate
from moe_jax.certificates.perturbation import (
    PerturbationResult,
    chosen_positions,
    count_changes,
    crowded_positions,
    sequences_for,
)
from moe_jax.config import ModelConfig, RunConfig
from moe_jax.model.costs import attention_flops, layer_flops
from moe_jax.model.moe.layer import Mode, MoE, build_layer
from moe_jax.model.moe.reference import OneHotMoE
from moe_jax.model.transformer import Params, abstract_model, merge

CAPACITY_SCALE = 0.5
"""The tests multiply the configured capacity factor by this number, so that many pairs are dropped."""
BIAS_DEVIATION = 0.05
"""Standard deviation of the random balance biases, times E. They are added to probabilities, whose mean is 1 / E and
whose deviation at initial parameters is about 0.1 / E."""


class Variant(NamedTuple):
    """A layer to test, by its differences from the configured layer under dispatch by capacity."""

    title: str
    """The claim in plain words."""
    routing: dict[str, Any] = {}  # noqa: RUF012
    moe: type[MoE] = MoE


VARIANTS = {
    "token priority, by capacity": Variant("earlier tokens get the slots first"),
    "token priority, one-hot reference": Variant("the same in a second, slow implementation", moe=OneHotMoE),
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

    flops = _pass_flops(model, variant.moe)
    sequences = sequences_for(flops, model.seq_len)
    before, other = np.random.default_rng(0).normal(size=(2, sequences, model.seq_len, model.width)).astype(np.float32)
    slots = None if model.dropless else model.capacity
    positions = chosen_positions(
        flops, sequences, model.seq_len, lambda: _crowded(lambda: run(before, trace=True)[0], slots)
    )
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
    given = ffn or {}
    # A shared expert of the variant is random if the model has none.
    nnx.update(layer, nnx.State({part: value for part, value in given.items() if hasattr(layer, part)}))
    return layer


def random_bias(model: ModelConfig, number: int = 0) -> jax.Array:
    """Random balance biases [E] for the layer of this number."""
    return BIAS_DEVIATION / model.experts * jax.random.normal(jax.random.key(number), (model.experts,))


def _pass_flops(model: ModelConfig, moe: type[MoE]) -> int:
    """Operations of one layer's forward pass over one sequence."""
    masks = 4 * model.seq_len * model.experts * model.capacity * model.width if moe is OneHotMoE else 0
    return layer_flops(model, 1) + masks


def _crowded(places: Callable[[], Any], slots: int | None) -> np.ndarray:
    """The positions where a queue becomes full, in any layer (`crowded_positions`)."""
    return np.zeros(0, int) if slots is None else crowded_positions(np.asarray(places()), slots)


def model_causality(config: RunConfig, params: Params) -> Certificate:
    """Test the whole model in training mode, without dropout, with its capacity factor times CAPACITY_SCALE."""
    model = tight(config.model)
    run, slots = _model_run(model, params), None if model.dropless else model.capacity
    return tokens_causality("causality: the whole model", model, run, lambda x: run(x, trace=True)[0], slots)


def _model_run(model: ModelConfig, params: Params) -> Callable[..., tuple[Any, Any]]:
    """(tokens [B, T]) -> (hidden states [B, T, D], shares dropped), in float32. With `trace`, the places of the pairs
    in their queues [L, B, T, K] instead of the hidden states."""
    graphdef, _ = abstract_model(model)

    @partial(jax.jit, static_argnames="trace")
    def run(tokens: Any, trace: bool = False) -> tuple[Any, Any]:
        hidden, stats, _ = merge(graphdef, params)(tokens, Mode.TRAIN, trace=trace)
        if stats is None:
            return hidden, jnp.zeros(())
        return (hidden if stats.trace is None else stats.trace.slot), stats.drop_fraction

    return run


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
    places: Callable[[Any], Any],
    slots: int | None,
    multiple: int = 1,
) -> Certificate:
    """Test `run(tokens [B, T])`, which returns hidden states [B, T, D] and the share of pairs dropped, on random
    tokens. B is a multiple of `multiple`. `places` gives the places of the pairs in their queues [L, B, T, K], which
    have `slots` slots; None: nothing is dropped."""
    routed = layer_flops(model, 1) if model.dense == "none" else 6 * model.seq_len * model.width * model.dense_hidden
    flops = model.layers * (routed + attention_flops(model, 1))
    sequences = multiple * -(-sequences_for(flops, model.seq_len) // multiple)
    before, other = (
        np.random.default_rng(0).integers(0, model.vocab_size, (2, sequences, model.seq_len)).astype(np.int32)
    )
    positions = chosen_positions(flops, sequences, model.seq_len, lambda: _crowded(partial(places, before), slots))
    counted = count_changes(run, before, other, positions)
    return _certificate(name, name.partition(": ")[2], counted, slots)
