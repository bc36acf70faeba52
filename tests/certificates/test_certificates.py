"""The certificates on a model that is small enough, and on broken ones, for which they must fail."""

import dataclasses
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.certificates import arithmetic
from moe_jax.certificates import compilations as compilation_counts
from moe_jax.certificates.arithmetic import layer_arithmetic, step_arithmetic
from moe_jax.certificates.causality import VARIANTS, layer_causality, model_causality
from moe_jax.certificates.certify import certify, initial_params
from moe_jax.certificates.compilations import compilations
from moe_jax.config import DataConfig, ExecutionConfig, ModelConfig, RoutingConfig, RunConfig, TrainConfig
from moe_jax.inference.decode import Decoder
from moe_jax.model.moe.experts import Experts
from moe_jax.model.moe.layer import MoE
from moe_jax.model.moe.reference import AllExpertsMoE, OneHotMoE
from moe_jax.model.transformer import create, split
from moe_jax.system import hlo
from moe_jax.training.programs import Programs
from moe_jax.training.random_tokens import RandomTokenTrainer


def small(routing: dict | None = None, **changes) -> ModelConfig:
    values = {"vocab_size": 50, "seq_len": 32, "layers": 2, "width": 32, "heads": 2, "experts": 8, "expert_hidden": 32}
    return ModelConfig(**(values | changes), routing=RoutingConfig(**(routing or {})))


def run_config(model: ModelConfig) -> RunConfig:
    execution = ExecutionConfig(compute_dtype="float32")
    return RunConfig(model=model, data=DataConfig(), train=TrainConfig(steps=10), execution=execution)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"routing": {"dispatch": "blocks", "top_k": 3}, "width": 48, "expert_hidden": 16, "activation": "swiglu"}
        | {"zero_init_residual": True},
    ],
    ids=["capacity", "blocks"],
)
def test_all_certificates_of_a_small_model(changes: dict) -> None:
    """With blocks also experts that are narrower than the model and branches that start at zero, as in `story-cpu`."""
    config = run_config(small(**changes))
    found = list(certify(config, initial_params(config), batch_size=2))
    assert [c.name for c in found if not c.passed] == []
    assert len(found) == len(VARIANTS) + 1 + 4 + 2 + 1
    leaks = [c.found for c in found if c.asked.startswith("leaks")]
    assert len(leaks) == 3
    assert not any(text.startswith("0 ") for text in leaks)
    # Every variant with a capacity was tried under drops.
    tried = [c for c in found[: len(VARIANTS)] if "blocks" not in c.name]
    assert len(tried) == len(VARIANTS) - 1
    assert not any(", 0% dropped" in c.found for c in tried)


def test_parameters_from_a_disk_compile_no_program_twice() -> None:
    """Such arrays are bound to a device, and random ones are not: jax compiles for each kind of argument."""
    config = run_config(small())
    params = jax.device_put(initial_params(config), jax.devices()[0])
    found = compilations(config, params, batch_size=2)
    assert found.found == "step 1, evaluation 1, prefill 1, decoding 1"
    assert found.passed


def test_a_leak_in_the_priority_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later tokens first: the worst order there is."""
    model = small()
    _, params = split(create(model, jax.random.key(0)))
    assert model_causality(run_config(model), params).passed

    def backwards(expert, valid, experts):
        hits = jax.nn.one_hot(expert, experts, dtype=jnp.int32).sum(-2) * valid[..., None]
        after = jnp.cumsum(hits[:, ::-1], axis=1)[:, ::-1] - hits
        return jnp.take_along_axis(after, expert, axis=-1)

    monkeypatch.setattr("moe_jax.model.moe.dispatch.queue_positions", backwards)
    assert not model_causality(run_config(model), params).passed
    by_name = {c.name: c.passed for c in layer_causality(model, None)}
    assert not by_name["causality: token priority, by capacity"]
    assert not by_name["causality: token priority, one-hot reference"]
    assert by_name["causality: expert choice"]


def test_a_batch_that_shares_its_slots_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def flattened(expert, valid, experts):
        hits = (jax.nn.one_hot(expert, experts, dtype=jnp.int32).sum(-2) * valid[..., None]).reshape(-1, experts)
        before = (jnp.cumsum(hits, axis=0) - hits).reshape(*valid.shape, experts)
        return jnp.take_along_axis(before, expert, axis=-1)

    monkeypatch.setattr("moe_jax.model.moe.dispatch.queue_positions", flattened)
    model = small()
    _, params = split(create(model, jax.random.key(0)))
    certificate = model_causality(run_config(model), params)
    assert not certificate.passed
    assert " 0 of the other sequence" not in certificate.found


@pytest.mark.parametrize("wasteful", [AllExpertsMoE, OneHotMoE])
def test_a_layer_that_wastes_arithmetic_is_found(wasteful: type[MoE], monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer that is certified is one of the slow references."""
    compiled = arithmetic._layer_program

    def program(config: ModelConfig, batch: int, gradients: bool, moe: type[MoE] = wasteful):
        return compiled(config, batch, gradients, moe)

    monkeypatch.setattr(arithmetic, "_layer_program", program)
    failed = [c.name for c in layer_arithmetic(small()) if not c.passed]
    assert [name for name in failed if name.startswith("arithmetic")], failed
    assert (len([name for name in failed if name.startswith("memory")]) == 2) == (wasteful is AllExpertsMoE)


def third_of_the_products_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of three matrices that do not multiply with w_gate."""
    monkeypatch.setattr(Experts, "_input_matrices", lambda self: [self.w_in])
    monkeypatch.setattr(Experts, "_activate", lambda self, hidden: jax.nn.silu(hidden[0]))


def no_products_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that does not know the products of this platform."""
    monkeypatch.setattr(hlo, "product", lambda *_: None)


@pytest.mark.parametrize("plant", [third_of_the_products_missing, no_products_seen])
def test_missing_products_are_found(plant: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    model = small(activation="swiglu")
    certificates = [*layer_arithmetic(model), *step_arithmetic(run_config(model), batch_size=2)]
    arithmetic = {c.name: c.passed for c in certificates if c.name.startswith("arithmetic")}
    assert len(arithmetic) == 4
    assert not any(arithmetic.values()), arithmetic


def test_a_step_that_wastes_arithmetic_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that is certified trains the all-experts form."""
    programs = Programs.of
    monkeypatch.setattr(
        arithmetic, "Programs", types.SimpleNamespace(of=lambda c, moe=None: programs(c, moe=AllExpertsMoE))
    )
    assert [c.passed for c in step_arithmetic(run_config(small()), batch_size=2)] == [False, False]


@pytest.mark.parametrize("remat", [False, True])
def test_the_step_costs_its_bound(remat: bool) -> None:
    """Exactly: with remat, the forward operations of the layers count twice."""
    config = run_config(small())
    config = dataclasses.replace(config, execution=dataclasses.replace(config.execution, remat=remat))
    layers, whole = step_arithmetic(config, batch_size=2)
    assert layers.passed, layers
    assert whole.passed, whole
    assert " 1.000 x" in layers.found


def a_batch_that_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    call = RandomTokenTrainer.__call__

    def shrinking(self: RandomTokenTrainer):
        report = call(self)
        self.batch = self.batch[:, :-1]
        return report

    monkeypatch.setattr(RandomTokenTrainer, "__call__", shrinking)


def windows_of_two_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(step, params, stream, *, seq_len: int, token_bytes):
        evaluate(step, params, stream, seq_len=seq_len // 2, token_bytes=token_bytes)
        return evaluate(step, params, stream, seq_len=seq_len, token_bytes=token_bytes)

    evaluate = compilation_counts.evaluate
    monkeypatch.setattr(compilation_counts, "evaluate", twice)


def prompts_without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: Decoder, params, context, seen):
        return self.prefill(params, np.array([context], np.int32), np.int32(len(context)))

    monkeypatch.setattr(Decoder, "_start", start)


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (a_batch_that_shrinks, "step 2, evaluation 1, prefill 1, decoding 1"),
        (windows_of_two_lengths, "step 1, evaluation 2, prefill 1, decoding 1"),
        (prompts_without_padding, "step 1, evaluation 1, prefill 2, decoding 2"),
    ],
)
def test_a_second_compilation_is_found(plant: Callable, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    config = run_config(small())
    certificate = compilations(config, initial_params(config), batch_size=2)
    assert not certificate.passed
    assert certificate.found == found


def test_a_model_that_drops_nothing_proves_nothing() -> None:
    """Causality must be tried under drops: with slots for all, the certificate does not pass."""
    model = small({"capacity_factor": 8.0})
    _, params = split(create(model, jax.random.key(0)))
    certificate = model_causality(run_config(model), params)
    assert not certificate.passed
    assert " 0% of the choices dropped" in certificate.found
