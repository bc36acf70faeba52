"""Parameters by group against the model itself, and the arithmetic of the published size."""

import dataclasses
import math

import jax
import pytest
from flax import nnx

from moe_jax.certify.formulas import step_products
from moe_jax.config import ExecutionConfig, ModelConfig, RunConfig, TrainConfig
from moe_jax.config.presets import preset
from moe_jax.model.costs import Count, count_parameters, muon_flops, totals, training_flops
from moe_jax.model.transformer import create, split
from moe_jax.runs.checkpoint import named_leaves
from moe_jax.training.optimizers.factory import muon_labels
from tests.support import tiny


def arrays(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the model's arrays by name."""
    _, shapes = split(nnx.eval_shape(lambda: create(config, jax.random.key(0))))
    return {name: leaf.shape for name, leaf in named_leaves(shapes).items()}


OPTIONS = [
    {"shared_experts": 2},
    {"shared_experts": 2, "shared_gate": True, "qkv_bias": True},
    {"shared_experts": 1, "activation": "gelu", "tied_head": False},
    {"shared_experts": 2, "dense": "active"},
    {"shared_experts": 2, "dense": "total"},
    {"balancing": "bias", "positions": "learned", "bias": True},
    {"heads": 4, "kv_heads": 2, "head_size": 6, "qk_norm": "full", "bias": True},
    {"heads": 4, "kv_heads": 1, "qk_norm": "head"},
]
"""Options that no preset uses."""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "layernorm", "bias": True, "tied_head": False, "positions": "learned", "activation": "gelu"},
        {"norm": "rmsnorm", "bias": True, "layers": 3},
        {"norm": "layernorm", "bias": False},
        {"dense": "active", "tied_head": False},
        {"dense": "total", "activation": "gelu"},
        {"experts": 1, "top_k": 1, "layers": 1},
        {"qk_norm": "head"},
        *OPTIONS,
    ],
    ids=str,
)
def test_parameters_of_every_option(changes: dict) -> None:
    """Counted from the arrays. A token uses one row of embedding and positions, K of E experts, and all else. It is
    multiplied with each of these that is a matrix, but for the tables."""
    config = tiny.config(**changes)
    total = active = multiplied = 0.0
    for name, shape in arrays(config).items():
        size = math.prod(shape)
        if name == "position" or (name == "embedding" and not config.tied_head):
            used, matrix = size / shape[0], 0
        elif ".ffn.experts." in name and config.dense == "none":
            used = matrix = size * config.routing.top_k / config.experts
        else:
            used, matrix = size, size if len(shape) > 1 else 0
        total, active, multiplied = total + size, active + used, multiplied + matrix
    found = totals(count_parameters(config))
    assert (found.total, found.active, found.multiplied) == (total, active, multiplied)


def test_the_published_size() -> None:
    """158,623,744, and of those one token touches, by hand (width 512, six layers):

    embedding row 512, position row 512, head 512 * 50257 = 25,731,584
    attention 6 * (512 * 1536 + 1536 + 512 * 512 + 512) = 6,303,744
    routers 6 * 512 * 16 = 49,152; experts 6 * 2 of 16 * 2 * 512 * 1024 = 12,582,912
    norms 13 * 2 * 512 = 13,312
    """
    config = dataclasses.replace(preset("seed-158m").model, vocab_size=50_257)
    groups = count_parameters(config)
    assert sum(map(math.prod, arrays(config).values())) == totals(groups).total == 158_623_744
    assert groups["embedding"] == Count(25_731_584, 512, 0)
    assert groups["head"] == Count(25_731_584, 25_731_584, 25_731_584)
    assert groups["positions"] == Count(131_072, 512, 0)
    assert groups["attention"] == Count(6_303_744, 6_303_744, 6_303_744 - 6 * 2048)
    assert groups["routers"].total == 49_152
    assert groups["experts"] == Count(100_663_296, 12_582_912, 12_582_912)
    assert groups["norms"].active == 13_312
    assert totals(groups).active == 1024 + 25_731_584 + 6_303_744 + 49_152 + 12_582_912 + 13_312
    multiplied = 25_731_584 + 6_291_456 + 49_152 + 12_582_912
    run = dataclasses.replace(preset("seed-158m"), model=config)
    # 4 sequences of 256 tokens in each of 8 micro-batches; 2 operations forward and 4 backward for each entry.
    assert training_flops(run, 3) == 6 * multiplied * 3 * 4 * 8 * 256


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("name", ["nano", "story", "story-cpu", "seed-158m"])
def test_dense_baselines_match_to_half_a_hidden_unit_a_layer(name: str, activation: str) -> None:
    sparse = dataclasses.replace(preset(name).model, vocab_size=1024, activation=activation)
    unit = (3 if activation == "swiglu" else 2) * sparse.width * sparse.layers
    for kind in ("active", "total"):
        baseline = totals(count_parameters(dataclasses.replace(sparse, dense=kind)))
        ours = totals(count_parameters(sparse))
        assert abs(getattr(baseline, kind) - getattr(ours, kind)) <= unit / 2
        if kind == "active":
            assert abs(baseline.multiplied - ours.multiplied) <= unit / 2
        groups = count_parameters(dataclasses.replace(sparse, dense=kind))
        rest = [group for name, group in groups.items() if not name.startswith(("embedding", "positions"))]
        assert all(group.active == group.total for group in rest), "of a dense model, but for the tables"


@pytest.mark.parametrize("routers", [False, True])
@pytest.mark.parametrize("changes", [{}, *OPTIONS], ids=str)
def test_muon_multiplies_the_matrices_that_it_trains_once(changes: dict, routers: bool) -> None:
    """Counted from the arrays that the optimizer gives to Muon: 4 m^2 n + 2 m^3 for each matrix and iteration."""
    config = tiny.config(**changes)
    labels = named_leaves(muon_labels(split(nnx.eval_shape(lambda: create(config, jax.random.key(0))))[1], routers))
    expected = 0
    for name, shape in arrays(config).items():
        if labels[name] == "muon":
            m, n = sorted(shape[-2:])
            expected += 5 * math.prod(shape[:-2]) * (4 * m * m * n + 2 * m**3)
    assert muon_flops(config, routers) == expected
    run = RunConfig(model=config, train=TrainConfig(batch_size=2, muon_router=routers))
    with_muon = dataclasses.replace(run, train=dataclasses.replace(run.train, optimizer="muon"))
    assert training_flops(with_muon, 7) - training_flops(run, 7) == 7 * expected


@pytest.mark.parametrize(("remat", "operations"), [(False, 2 * 48_960), (True, 2 * 61_632)])
def test_the_products_of_attention_by_cudnn(remat: bool, operations: int) -> None:
    """By hand: two layers, 3 sequences of 8 positions, width 8, 2 heads of 4 numbers.

    qkv 8 x 24: 2 * 24 * 8 * 24 = 9,216; out 8 x 8: 3,072; each three times, and qkv a fourth time with remat. Scores:
    each head has 1 + 2 + ... + 8 = 36, with 2 * 4 operations in a product, so 3 * 2 * 36 * 8 = 1,728. Two products
    forward and five backward; with remat two more.
    """
    run = RunConfig(model=tiny.config(seq_len=8), execution=ExecutionConfig(remat=remat))
    assert step_products(run, 3, cudnn=True)["attention"] == operations
