"""Low-rank adapters: what they add, what stays as it is, and what they cost."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import RunConfig, TrainConfig
from moe_jax.interop.source import open_source
from moe_jax.model.costs import adapter_parameters, count_parameters, least_step_bytes, totals, training_flops
from moe_jax.model.low_rank import LoraShape, adapted, initial_adapters, merged
from moe_jax.model.moe.layer import Mode
from moe_jax.model.quantized import quantize
from moe_jax.model.transformer import Forms, abstract_adapted
from moe_jax.model.transformer import merge as build
from moe_jax.runs.arrays import named_leaves
from moe_jax.runs.checkpoint import CheckpointStore
from moe_jax.runs.load import open_run
from moe_jax.training.gradients import gradients
from moe_jax.training.optimizers.factory import make_optimizer
from moe_jax.training.quantize import quantize_run
from moe_jax.training.run import finish, take_steps
from moe_jax.training.session import Session
from moe_jax.training.start import new_start
from moe_jax.training.state import initial_state
from moe_jax.training.step import make_step
from tests.support import short_form, tiny, tuning

SHAPE = LoraShape(4, 0.75, train_router=True)
CASES = {
    "capacity": {},
    "blocks": {"dispatch": "blocks", "renormalise_gates": False},
    "shared": {"shared_experts": 1, "shared_gate": True, "qkv_bias": True, "activation": "gelu", "kv_heads": 1},
    "dense": {"dense": "active"},
}


@functools.lru_cache
def adapted_model(case: str, dtype: str = "float32", zero: bool = False) -> tuple[Any, ...]:
    """(plain definition, adapted definition, parameters, adapters), the adapters random unless `zero`."""
    config = tiny.config(capacity_factor=1.0, **CASES[case])
    shape = SHAPE if config.dense == "none" else SHAPE._replace(train_router=False)
    graphdef, params = tiny.build(config, dtype=dtype)
    training, shapes = abstract_adapted(config, shape, Forms(dtype))
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.3, dtype), shapes)
    return graphdef, training, params, initial_adapters(shapes, jax.random.key(0)) if zero else adapters


@functools.partial(jax.jit, static_argnums=0)
def outputs(graphdef: Any, params: Any, tokens: np.ndarray) -> jax.Array:
    model = build(graphdef, params)
    return model.logits(model(jnp.asarray(tokens), Mode.TRAIN)[0])


@pytest.mark.parametrize("case", short_form(CASES, ["capacity", "dense"]))
def test_merged_is_unmerged(case: str) -> None:
    graphdef, training, params, adapters = adapted_model(case)
    tokens = tiny.tokens(2, tiny.T)
    unmerged = outputs(training, adapted(params, adapters), tokens)
    assert tiny.relative_error(unmerged, outputs(graphdef, merged(params, adapters, SHAPE.scale), tokens)) < 1e-5
    assert tiny.relative_error(unmerged, outputs(graphdef, params, tokens)) > 1e-2, "the adapters do something"


def test_it_starts_as_the_model_by_bits() -> None:
    """A is random and B is 0: nothing is added, whether merged or not."""
    graphdef, training, params, adapters = adapted_model("capacity", zero=True)
    tokens = tiny.tokens(2, tiny.T)
    plain = outputs(graphdef, params, tokens)
    np.testing.assert_array_equal(plain, outputs(training, adapted(params, adapters), tokens))
    tiny.assert_same_bits(merged(params, adapters, 0.75), jax.tree.map(lambda x: x, params))
    named = named_leaves(adapters)
    assert {name for name, x in named.items() if np.asarray(x).any()} == {n for n in named if n.endswith(".a")}
    first = np.concatenate([np.asarray(x).ravel() * np.sqrt(x.shape[-2]) for n, x in named.items() if n.endswith(".a")])
    assert abs(first.std() - 1) < 0.1


@pytest.mark.parametrize("case", ["capacity", "dense"])
def test_gradients_follow_the_chain_rule(case: str, float64: None) -> None:
    """dA = s dW B^T and dB = s A^T dW, for each expert, with dW = the gradient of the merged model's weights by jax."""
    graphdef, training, params, adapters = adapted_model(case, "float64")
    batch = jnp.asarray(tiny.tokens(1, 2, tiny.T + 1))
    config, key = TrainConfig(), jax.random.key(0)
    found = jax.jit(lambda a, p: gradients(training, a, batch, key, None, config, frozen=p)[0])(adapters, params)
    of_merged = jax.jit(lambda a, p: gradients(graphdef, merged(p, a, SHAPE.scale), batch, key, None, config)[0])(
        adapters, params
    )
    weights, parts, expected = named_leaves(of_merged), named_leaves(adapters), {}
    for name in parts:
        target = name.partition("_lora")[0].removesuffix("_delta")
        d_w, a, b = weights[target], parts.get(f"{target}_lora.a"), parts.get(f"{target}_lora.b")
        if name.endswith("delta"):
            expected[name] = d_w
        elif name.endswith(".a"):
            expected[name] = SHAPE.scale * jnp.einsum("...df,...rf->...dr", d_w, b)
        else:
            expected[name] = SHAPE.scale * jnp.einsum("...dr,...df->...rf", a, d_w)
    assert max(tiny.gradient_errors(named_leaves(found), expected).values()) < 1e-9


def test_only_adapters_change_and_only_they_have_a_state() -> None:
    """Five steps: every frozen parameter keeps every bit, every B leaves 0. The optimizer holds two moments for each
    adapter, a count, and nothing else."""
    _, training, params, adapters = adapted_model("capacity", zero=True)
    config = TrainConfig(steps=5, lr=1e-2)
    optimizer = make_optimizer(config)
    before = jax.tree.map(np.asarray, params)
    state = initial_state(jax.tree.map(jnp.array, params), optimizer, False, jax.tree.map(jnp.array, adapters))
    shapes = sorted(x.shape for x in jax.tree.leaves(adapters))
    assert sorted(x.shape for x in jax.tree.leaves(state.optimizer)) == sorted([*shapes, *shapes, ()])
    step = make_step(training, optimizer, config, False)
    for seed in range(5):
        state, _ = step(state, tiny.tokens(1, 2, tiny.T + 1, seed=seed))
    tiny.assert_same_bits(jax.tree.map(np.asarray, state.params), before)
    for name, value in named_leaves(state.adapters).items():
        assert np.asarray(value).any(), name
    assert step._cache_size() == 1


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("router", [False, True])
def test_adapters_are_counted_exactly(case: str, router: bool) -> None:
    model = tiny.config(**CASES[case])
    router = router and model.dense == "none"
    config = RunConfig(model=model, train=TrainConfig(lora_rank=6, train_router=router))
    shape = LoraShape.of(config.train)
    assert shape is not None
    _, shapes = abstract_adapted(model, shape)
    assert adapter_parameters(config).total == sum(x.size for x in jax.tree.leaves(shapes))
    assert any("router" in name for name in named_leaves(shapes)) == router
    ranks = {
        n.rpartition("_lora")[0].split(".")[2:][0]: x.shape[-1]
        for n, x in named_leaves(shapes).items()
        if n[-2:] == ".a"
    }
    assert ranks == {"attention": 6, "ffn": 6 if model.dense != "none" or model.shared_experts else 3}


def test_costs_by_hand() -> None:
    """One layer of width 8: attention [8, 24] and [8, 8], 4 experts of three matrices with 6 hidden units; rank 4, so 2
    for an expert of the top 2. 4 operations for a frozen entry, 6 for an adapter's."""
    model = tiny.config(layers=1)
    plain = RunConfig(model=model, train=TrainConfig(batch_size=2))
    lora = dataclasses.replace(plain, train=TrainConfig(batch_size=2, lora_rank=4))
    count = adapter_parameters(lora)
    attention, expert = 4 * (8 + 24) + 4 * (8 + 8), 3 * 2 * (8 + 6)
    assert count == (attention + 4 * expert, attention + 2 * expert, attention + 2 * expert)
    whole = totals(count_parameters(model)).multiplied
    assert training_flops(lora, 3) == (4 * whole + 6 * (attention + 2 * expert)) * 3 * 2 * tiny.T
    total = totals(count_parameters(model)).total
    assert least_step_bytes(plain) - least_step_bytes(lora) == total * (2 + 8) - count.total * (
        4 + 2 + 8
    )  # gradients may be narrow


# Whole runs


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, dict[str, Any], Path]:
    """A run with adapters of 6 steps, its result, and its base."""
    folder = tmp_path_factory.mktemp("lora")
    base, data = tuning.base_run(folder / "base"), tuning.write_conversations(folder / "chats.jsonl")
    config = tuning.settings(base, data, folder / "run", "--lora", "4", "--lr", "1e-2")
    session = Session.open(config, new_start(config))
    take_steps(session)
    return session, finish(session), base


@pytest.mark.runs
def test_a_run_with_adapters_holds_its_base_and_opens_merged(tuned: Any) -> None:
    session, result, base = tuned
    start, opened = open_run(base), open_run(session.folder.path)
    tiny.assert_same_bits(session.state.params, start.params)
    tiny.assert_same_bits(opened.params, session.params)
    assert session.score(session.data.store.valid.stream, opened.params).loss == result["val_loss"]
    assert result["val_loss"] < session.score(session.data.store.valid.stream, start.params).loss
    assert result["params_trained"] == adapter_parameters(session.config).total < result["params_total"]
    assert {damage for _, damage in CheckpointStore(session.folder.path).examine()} == {None}


@pytest.mark.runs
def test_a_quantised_run_has_the_adapters_in_its_codes(tuned: Any, tmp_path: Path) -> None:
    session, _, _ = tuned
    quantize_run(session.folder.path, "int8", tmp_path / "small")
    opened = open_run(tmp_path / "small")
    assert opened.config.train.lora_rank == 0
    tiny.assert_same_bits(opened.params, quantize(session.params, "int8"))


@pytest.mark.runs
def test_an_export_has_the_adapters_in_its_weights(tuned: Any) -> None:
    session, _, _ = tuned
    there, here = open_source(session.folder.path), named_leaves(session.params)
    assert set(there.weights) == set(here)
    assert max(tiny.relative_error(there.weights[name], here[name]) for name in here) < 1e-6
    assert there.tuned
