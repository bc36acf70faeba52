"""The certificates on a model that is small enough, and on broken ones, for which they must fail."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from moe_jax.analysis import certificates
from moe_jax.analysis.certificates import certify, initial_params, layer_arithmetic, layer_causality, model_causality
from moe_jax.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from moe_jax.model.transformer import create, split


def small(**changes) -> ModelConfig:
    values = {"vocab_size": 50, "seq_len": 32, "layers": 2, "width": 32, "heads": 2, "experts": 8, "expert_hidden": 32}
    return ModelConfig(**(values | changes))


def run_config(model: ModelConfig) -> RunConfig:
    return RunConfig(model=model, data=DataConfig(), train=TrainConfig(steps=10, precision="float32"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dispatch": "blocks", "width": 48, "expert_hidden": 16, "activation": "swiglu", "top_k": 3}
        | {"quiet_branches": True},
    ],
    ids=["gather", "blocks"],
)
def test_all_certificates_of_a_small_model(changes: dict) -> None:
    """With blocks also experts that are narrower than the model and branches that start at zero, as in `story-cpu`."""
    config = run_config(small(**changes))
    found = list(certify(config, initial_params(config), batch_size=2))
    assert [c.name for c in found if not c.passed] == []
    assert len(found) == len(certificates.VARIANTS) + 1 + 4 + 2 + 1
    leaks = [c.found for c in found if c.asked.startswith("leaks")]
    assert len(leaks) == 3
    assert not any(text.startswith("0 ") for text in leaks)
    # Every variant with a capacity was tried under drops.
    tried = [c for c in found[: len(certificates.VARIANTS)] if "blocks" not in c.name]
    assert len(tried) == len(certificates.VARIANTS) - 1
    assert not any(", 0% dropped" in c.found for c in tried)


def test_a_leak_in_the_priority_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later tokens first: the worst order there is."""
    model = small()
    _, params = split(create(model, jax.random.key(0)))
    assert model_causality(run_config(model), params).passed

    def backwards(expert, valid, experts):
        hits = jax.nn.one_hot(expert, experts, dtype=jnp.int32).sum(-2) * valid[..., None]
        after = jnp.cumsum(hits[:, ::-1], axis=1)[:, ::-1] - hits
        return jnp.take_along_axis(after, expert, axis=-1)

    monkeypatch.setattr("moe_jax.model.routing.positions_in_expert", backwards)
    assert not model_causality(run_config(model), params).passed
    by_name = {c.name: c.passed for c in layer_causality(model, None)}
    assert not by_name["causality: token priority, gather"]
    assert not by_name["causality: token priority, einsum"]
    assert by_name["causality: expert choice"]


def test_a_batch_that_shares_its_slots_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def flattened(expert, valid, experts):
        hits = (jax.nn.one_hot(expert, experts, dtype=jnp.int32).sum(-2) * valid[..., None]).reshape(-1, experts)
        before = (jnp.cumsum(hits, axis=0) - hits).reshape(*valid.shape, experts)
        return jnp.take_along_axis(before, expert, axis=-1)

    monkeypatch.setattr("moe_jax.model.routing.positions_in_expert", flattened)
    model = small()
    _, params = split(create(model, jax.random.key(0)))
    certificate = model_causality(run_config(model), params)
    assert not certificate.passed
    assert " 0 of the other row" not in certificate.found


@pytest.mark.parametrize("dispatch", ["dense", "einsum"])
def test_a_layer_that_wastes_arithmetic_is_found(dispatch: str) -> None:
    failed = [c.name for c in layer_arithmetic(small(dispatch=dispatch)) if not c.passed]
    assert [name for name in failed if name.startswith("arithmetic")], failed
    assert (len([name for name in failed if name.startswith("memory")]) == 2) == (dispatch == "dense")


def test_a_model_that_drops_nothing_proves_nothing() -> None:
    """Causality must be tried under drops: with slots for all, the certificate does not pass."""
    model = dataclasses.replace(small(), capacity_factor=8.0)
    _, params = split(create(model, jax.random.key(0)))
    certificate = model_causality(run_config(model), params)
    assert not certificate.passed
    assert "0% dropped" in certificate.found
