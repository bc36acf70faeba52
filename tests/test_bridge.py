"""moe_jax == foundation: two gradients of the whole training loss, one derived by hand, are equal.

The two packages share no line of code. Here the parameters of moe_jax get the names of foundation. The gradient of
`moe_jax.training.loss.training_loss`, as the training step takes it, is compared with the gradient of
`foundation.transformer`.
"""

import dataclasses
import itertools
import random
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foundation import transformer as by_hand
from foundation.parity import max_relative_error
from foundation.trained.weights import block_of, config_of
from moe_jax.config import ModelConfig, RoutingConfig, TrainConfig
from moe_jax.model import transformer
from moe_jax.model.layers import keep_mask
from moe_jax.model.moe.layer import MoE
from moe_jax.system.random_keys import fold_each, sequence_keys, split_each
from moe_jax.training.loss import Metrics, training_loss
from tests.support import short_form
from tests.support.one_hot import OneHotMoE

SMALL = {"vocab_size": 19, "seq_len": 12, "layers": 2, "width": 8, "heads": 2, "experts": 4, "expert_hidden": 6}
SLOWED = (
    '{"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,'
    ' "original_max_position_embeddings": 12}'
)
CASES: dict[str, dict[str, Any]] = {
    "nano": {},
    "seed-158m": {
        "norm": "layernorm", "positions": "learned", "activation": "gelu", "bias": True, "tied_head": False,
        "layers": 1,
    },
    "layernorm without bias, tied, learned": {"norm": "layernorm", "positions": "learned"},
    "rmsnorm with attention biases, untied": {"bias": True, "tied_head": False, "activation": "gelu"},
    "top 1": {"top_k": 1, "capacity_factor": 1.0},
    "K = E, dropless": {"top_k": 4, "capacity_factor": 1.0},
    "blocks, dropless": {"dispatch": "blocks", "capacity_factor": 2.0, "layers": 1},
    "one-hot dispatch": {},
    "grouped keys, all heads normalised, slowed pairs, plain gates": {
        "heads": 4, "kv_heads": 2, "head_size": 6, "qk_norm": "full", "norm_eps": 1e-2, "rope_theta": 50.0,
        "rope_scaling": SLOWED, "renormalise_gates": False, "top_k": 3, "layers": 1,
    },
    "one key head, each head normalised": {
        "kv_heads": 1, "qk_norm": "head", "norm": "layernorm", "bias": True, "layers": 1,
    },
    "dropout": {"dropout": 0.25, "attention_dropout": 0.25, "positions": "learned", "layers": 1},
    "shared experts": {"shared_experts": 2, "layers": 1},
    "shared experts with a gate": {"shared_experts": 2, "shared_gate": True, "qkv_bias": True, "layers": 1},
}  # fmt: skip
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "norm": ({"norm": "rmsnorm"}, {"norm": "layernorm"}),
    "positions": ({"positions": "rope"}, {"positions": "learned"}),
    "activation": ({"activation": "swiglu"}, {"activation": "gelu"}),
    "bias": ({"bias": False}, {"bias": True}),
    "head": ({"tied_head": True}, {"tied_head": False}, {"tied_head": False, "scaled_embedding": True}),
    "key heads": ({"kv_heads": 0}, {"kv_heads": 1}),
    "normalised queries": ({"qk_norm": "none"}, {"qk_norm": "head"}, {"qk_norm": "full"}),
    "choices": ({"top_k": 1}, {"top_k": 2}, {"top_k": 4}),
    "gates": ({"renormalise_gates": True}, {"renormalise_gates": False}),
    "shared experts": ({"shared_experts": 0}, {"shared_experts": 2}, {"shared_experts": 2, "shared_gate": True}),
    "dispatch": (
        {"dispatch": "capacity"},
        {"dispatch": "capacity", "roomy": True},
        {"dispatch": "blocks", "roomy": True},
    ),
    "dropout": ({}, {"dropout": 0.25, "attention_dropout": 0.25}),
}
"""What the presets choose between. `covering` combines them."""
LAYERS = {"one-hot dispatch": OneHotMoE}
"""The class of the MoE layer, where it is not `MoE`."""
TRAIN = TrainConfig(aux_loss_coef=0.3, z_loss_coef=0.1)  # large, so that an error in the auxiliary losses shows


@pytest.fixture(params=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> Iterator[str]:
    """The precision of everything, put back afterwards."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", request.param == "float64")
    yield request.param
    jax.config.update("jax_enable_x64", before)


def covering(count: int) -> dict[str, dict[str, Any]]:
    """`count` configurations of one layer, in which every two values of two different options meet at least once."""
    draws = random.Random(0)
    places = [(name, i) for name, values in OPTIONS.items() for i in range(len(values))]
    missing = {pair for pair in itertools.combinations(places, 2) if pair[0][0] != pair[1][0]}
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < count:
        tries = [tuple((name, draws.randrange(len(values))) for name, values in OPTIONS.items()) for _ in range(60)]
        best = max(tries, key=lambda row: len(missing & set(itertools.combinations(row, 2))))
        missing -= set(itertools.combinations(best, 2))
        row = {"layers": 1} | {key: value for name, i in best for key, value in OPTIONS[name][i].items()}
        if row.pop("roomy", False):
            row["capacity_factor"] = SMALL["experts"] / row["top_k"]
        rows[f"covering {len(rows)}, dropless" if "capacity_factor" in row else f"covering {len(rows)}"] = row
    assert not missing, f"{len(missing)} pairs of options never meet; ask for more configurations"
    return rows


FIRST = list(CASES)
COVERING = covering(40)
CASES |= COVERING
SHORT, LONG = list(COVERING)[:12], list(COVERING)[12:]
"""The first rows have most of the pairs. The others are the long form."""
USUAL = ("nano", "seed-158m", "blocks, dropless", "dropout", "shared experts with a gate")
"""What every run of the tests compares. The other cases of `FIRST` are for the night."""
DROPLESS = {case for case in CASES if case.endswith("dropless")}
"""With K = E at factor 1, or with factor E / K, an expert has as many slots as the sequence has tokens. The same holds
in `foundation`."""


def model_config(case: str) -> ModelConfig:
    values = {**SMALL, "capacity_factor": 0.75, **CASES[case]}
    names = [field.name for field in dataclasses.fields(RoutingConfig) if field.name in values]
    routing = RoutingConfig(**{name: values.pop(name) for name in names})
    return ModelConfig(**values, routing=routing)


def real_model(case: str, dtype: str) -> tuple[Any, dict]:
    """The model's definition and parameters: the initial parameters plus noise.

    With the noise no bias is 0, and the routers have clear preferences.
    """
    forms = transformer.Forms(dtype, moe=LAYERS.get(case, MoE))
    model = transformer.create(model_config(case), jax.random.key(0), forms)
    graphdef, params = transformer.split(model)
    noise = np.random.default_rng(0)
    return graphdef, jax.tree.map(
        lambda leaf: jnp.asarray(np.asarray(leaf) + 0.4 * noise.standard_normal(leaf.shape), dtype), params
    )


def to_foundation(params: dict) -> dict:
    """The same parameters, or gradients, under the names of `foundation`."""
    renamed = {"embedding": params["embedding"], "norm": params["norm"]}
    renamed["blocks"] = [block_of(params["blocks"][i]) for i in range(len(params["blocks"]))]
    if "position" in params:
        renamed["positions"] = params["position"]
    if "head" in params:
        renamed["head"] = params["head"]
    return renamed


def to_foundation_config(config: ModelConfig) -> by_hand.ModelConfig:
    """With what concerns training only."""
    model = dataclasses.asdict(config)
    return dataclasses.replace(
        config_of(model, model["routing"]),
        capacity_factor=config.routing.capacity_factor,
        dropout=config.dropout,
        balance_coef=TRAIN.aux_loss_coef,
        z_coef=TRAIN.z_loss_coef,
    )


def same_masks(config: ModelConfig, key: jax.Array, batch: int) -> dict:
    """The dropout masks that the real model draws from a key. `foundation` takes them as arguments."""
    rate = config.dropout
    stream = (config.seq_len, config.width)
    weights = (config.heads, config.seq_len, config.seq_len)
    embedding, *layers = split_each(sequence_keys(key, batch), config.layers + 1)

    def block(layer: jax.Array) -> dict:
        for_weights, for_attention, for_moe = split_each(layer, 3)
        return {
            "weights": keep_mask(fold_each(for_weights, 0), rate, weights),
            "attention": keep_mask(for_attention, rate, stream),
            "moe": keep_mask(for_moe, rate, stream),
        }

    return {"embedding": keep_mask(embedding, rate, stream), "blocks": [block(k) for k in layers]}


def both(case: str, dtype: str) -> tuple[tuple[jax.Array, dict], tuple[jax.Array, dict], Metrics]:
    """(loss, gradient) of the real model and of the hand-derived one, with the same names; and the real metrics."""
    config = model_config(case)
    graphdef, params = real_model(case, dtype)
    tokens = jax.random.randint(jax.random.key(1), (3, config.seq_len + 1), 0, config.vocab_size)
    key = jax.random.key(2) if config.dropout else None

    def loss(params: dict) -> tuple[jax.Array, Metrics]:
        return training_loss(transformer.merge(graphdef, params), tokens, key, TRAIN)

    (real_loss, metrics), real_grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    masks = None if key is None else same_masks(config, key, batch=3)
    hand_config = to_foundation_config(config)
    scale = config.width**0.5 if config.scaled_embedding else 1.0  # of a table, and so of its gradient

    def ours(params: dict) -> tuple[jax.Array, dict]:
        table = {"embedding": scale * params["embedding"]}
        value, grads = by_hand.loss_and_gradient(params | table, tokens[:, :-1], tokens[:, 1:], hand_config, masks)
        return value, grads | {"embedding": scale * grads["embedding"]}

    return (real_loss, to_foundation(real_grads)), jax.jit(ours)(to_foundation(params)), metrics


def compare(case: str, dtype: str) -> None:
    (real_loss, real_grads), (our_loss, our_grads), metrics = both(case, dtype)
    tolerance = {"float64": 1e-10, "float32": 1e-4}[dtype]
    assert {leaf.dtype.name for leaf in jax.tree.leaves((real_grads, our_grads))} == {dtype}
    assert (metrics.drop_fraction > 0.05) == (case not in DROPLESS)
    assert abs(real_loss - our_loss) <= tolerance * abs(real_loss)
    assert max_relative_error(our_grads, real_grads) <= tolerance


@pytest.mark.parametrize(
    ("case", "dtype"),
    short_form(
        [*((case, "float64") for case in FIRST), ("nano", "float32"), ("seed-158m", "float32")],
        [(case, "float64") for case in USUAL],
    ),
    indirect=["dtype"],
)
def test_hand_derived_gradient_equals_the_real_one_in_every_parameter(case: str, dtype: str) -> None:
    compare(case, dtype)


@pytest.mark.reliability
@pytest.mark.parametrize("dtype", ["float64"], indirect=True)
@pytest.mark.parametrize("case", short_form([*SHORT, *LONG], SHORT))
def test_every_two_options_of_the_presets_together(case: str, dtype: str) -> None:
    compare(case, dtype)


@pytest.mark.parametrize("dtype", ["float64"], indirect=True)
def test_the_bridge_can_fail(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Only the real loss has the z-loss. So the gradients of the routers and of earlier layers must differ.
    monkeypatch.setattr(
        sys.modules[__name__],
        "to_foundation_config",
        lambda config, whole=to_foundation_config: dataclasses.replace(whole(config), z_coef=0.0),
    )
    (_, real_grads), (_, our_grads), _ = both("nano", dtype)
    assert max_relative_error(our_grads, real_grads) > 1e-3
