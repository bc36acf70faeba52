"""The certificates on a model that is small enough, and on broken ones, for which they must fail."""

import dataclasses
import types
from collections.abc import Callable
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.certify import arithmetic, causality
from moe_jax.certify import model as all_claims
from moe_jax.certify.arithmetic import layer_arithmetic, step_arithmetic
from moe_jax.certify.causality import VARIANTS, layer_causality, model_causality
from moe_jax.certify.model import certify, compilations, initial_params
from moe_jax.config import DataConfig, ExecutionConfig, ModelConfig, RoutingConfig, RunConfig, TrainConfig
from moe_jax.inference.decode import Decoder
from moe_jax.model.attention import Attention
from moe_jax.model.moe.experts import Experts
from moe_jax.model.moe.layer import AllExpertsMoE, MoE
from moe_jax.model.transformer import Block, create, split
from moe_jax.system import hlo
from moe_jax.training import loss
from moe_jax.training.programs import Programs, RandomTokenTrainer
from tests.support.leaky import LeakyCapacity, Priority, ReversedChunks, leaky_moe
from tests.support.one_hot import OneHotMoE

LEAKS = get_args(Priority)
NIGHT = pytest.mark.slow
"""Of cases that compile much and differ little from the one that the fast suite runs."""


def small(routing: dict | None = None, **changes) -> ModelConfig:
    values = {"vocab_size": 50, "seq_len": 32, "layers": 2, "width": 32, "heads": 2, "experts": 8, "expert_hidden": 32}
    return ModelConfig(**(values | changes), routing=RoutingConfig(**(routing or {})))


def run_config(model: ModelConfig) -> RunConfig:
    execution = ExecutionConfig(compute_dtype="float32")
    return RunConfig(model=model, data=DataConfig(), train=TrainConfig(steps=10), execution=execution)


BLOCKS = {"routing": {"dispatch": "blocks", "top_k": 3}, "width": 48, "expert_hidden": 16, "activation": "swiglu"}


@pytest.mark.parametrize(
    ("changes", "variants"),
    [
        ({"layers": 1}, ["token priority, by capacity"]),
        pytest.param({}, list(VARIANTS), marks=NIGHT),
        pytest.param(BLOCKS | {"zero_init_residual": True}, list(VARIANTS), marks=NIGHT),
    ],
    ids=["short", "capacity", "blocks"],
)
@pytest.mark.planted
def test_all_certificates_of_a_small_model(changes: dict, variants: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks also experts that are narrower than the model and branches that start at zero, as in `story-cpu`.

    The parameters are bound to a device, as those of a run are: jax compiles for each kind of argument.
    """
    monkeypatch.setattr(causality, "VARIANTS", {name: VARIANTS[name] for name in variants})
    config = run_config(small(**changes))
    found = list(certify(config, jax.device_put(initial_params(config), jax.devices()[0]), batch_size=2))
    assert [c.name for c in found if not c.passed] == []
    assert len(found) == len(variants) + 1 + 2 + 4 + 1
    assert all(" at each of 32 positions, in 6 sequences" in c.found for c in found[: len(variants) + 1])
    # Every variant with a capacity was tried under drops.
    tried = [c for c in found[: len(variants)] if "blocks" not in c.name]
    assert len(tried) == sum("blocks" not in name for name in variants)
    assert not any("; 0% of the choices" in c.found for c in tried)
    assert len({c.title for c in found}) == len(found)
    parts = [c for c in found if c.name.endswith("within the step")]
    assert [" 1.000 x" in c.found for c in parts] == [True, True, True]


def in_pairs(expert, valid, experts):
    """The later token of each two has the place first: a leak over one position."""
    order = np.arange(expert.shape[1]) // 2 * 2 + 1 - np.arange(expert.shape[1]) % 2
    hits = (jax.nn.one_hot(expert, experts, dtype=jnp.int32).sum(-2) * valid[..., None])[:, order]
    before = (jnp.cumsum(hits, axis=1) - hits)[:, order]
    return jnp.take_along_axis(before, expert, axis=-1)


QUEUED = ["token priority, by capacity", "shared expert", "balance by bias"]


@pytest.mark.planted
@pytest.mark.parametrize(
    "rule", [LEAKS[0], "pairs", *(pytest.param(rule, marks=NIGHT) for rule in (*LEAKS[1:], "fours"))]
)
def test_a_known_leak_is_found(rule: str) -> None:
    """Each rule over any distance, and two that act between neighbours only."""
    chunk = {"pairs": 2, "fours": 4}.get(rule)
    capacity = partial(ReversedChunks, chunk=chunk) if chunk else partial(LeakyCapacity, priority=rule)
    certificate = causality.variant_causality(rule, causality.Variant(rule, moe=leaky_moe(capacity)), small(), None)
    assert not certificate.passed
    assert ": 0 earlier outputs" not in certificate.found
    assert " and 0 of the sequence that was left alone" in certificate.found


@pytest.mark.planted
def test_pairs_are_found_if_positions_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model so large that only a few positions are changed: those near the places where queues become full. A leak in
    the order of the queues is found in every layer that has them, too."""
    model = small(seq_len=64)
    _, params = split(create(model, jax.random.key(0)))
    monkeypatch.setattr(causality, "MOST_FLOPS", 1)
    sound = model_causality(run_config(model), params)
    assert sound.passed
    assert " at each of " not in sound.found
    monkeypatch.setattr("moe_jax.model.moe.dispatch.queue_positions", in_pairs)
    assert not model_causality(run_config(model), params).passed
    monkeypatch.setattr(causality, "VARIANTS", {name: VARIANTS[name] for name in QUEUED})
    by_name = {c.name.removeprefix("causality: "): c.passed for c in layer_causality(model, None)}
    assert by_name == dict.fromkeys(QUEUED, False)


def test_the_bias_that_balances_is_a_runs_own_or_random() -> None:
    """A bias of zero would change nothing."""
    model = small({"balancing": "bias"})
    blocks = initial_params(run_config(model))["blocks"]
    own, random = (causality._layer(model, MoE, ffn).balance_bias[...] for ffn in (blocks[1]["ffn"], None))
    assert (own == blocks[1]["ffn"]["balance_bias"]).all()
    assert (own != random).all()
    assert (jnp.abs(random) > 0).all()


@pytest.mark.planted
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
    assert " and 0 of the sequence that was left alone" not in certificate.found


@pytest.mark.planted
@pytest.mark.parametrize("wasteful", [AllExpertsMoE, OneHotMoE])
def test_a_layer_that_wastes_arithmetic_is_found(wasteful: type[MoE], monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer that is certified is one of the slow references."""
    compiled = arithmetic._layer_program

    def program(config: ModelConfig, gradients: bool, moe: type[MoE] = wasteful):
        return compiled(config, gradients, moe)

    monkeypatch.setattr(arithmetic, "_layer_program", program)
    failed = [c.name for c in layer_arithmetic(small()) if not c.passed]
    assert [name for name in failed if name.startswith("arithmetic")], failed


def third_of_the_products_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of three matrices that do not multiply with w_gate."""
    monkeypatch.setattr(Experts, "_input_matrices", lambda self: [self.w_in])
    monkeypatch.setattr(Experts, "_activate", lambda self, hidden: jax.nn.silu(hidden[0]))


def no_products_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that does not know the products of this platform."""
    monkeypatch.setattr(hlo, "product", lambda *_: None)


@pytest.mark.planted
@pytest.mark.parametrize("plant", [pytest.param(third_of_the_products_missing, marks=NIGHT), no_products_seen])
def test_missing_products_are_found(plant: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    model = small(activation="swiglu")
    certificates = [*layer_arithmetic(model), *step_arithmetic(run_config(model), batch_size=2)]
    arithmetic = {c.name: c.passed for c in certificates if c.name.startswith("arithmetic")}
    assert len(arithmetic) == 6
    whole = {"arithmetic: attention within the step", "arithmetic: head within the step"}
    sound = whole if plant is third_of_the_products_missing else set()
    assert {name for name, passed in arithmetic.items() if passed} == sound


def all_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that is certified trains the all-experts form."""
    programs = Programs.of
    monkeypatch.setattr(
        arithmetic, "Programs", types.SimpleNamespace(of=lambda c, moe=None: programs(c, moe=AllExpertsMoE))
    )


def attention_four_times(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = Attention.__call__

    def often(self: Attention, *arguments, **named):
        y, cache = attend(self, *arguments, **named)
        z = y
        for _ in range(3):
            z = attend(self, z, *arguments[1:], **named)[0]
        return y + 1e-6 * z, cache

    monkeypatch.setattr(Attention, "__call__", often)


def all_experts_beside_the_scopes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token meets a matrix of every expert once more, outside of the named scopes."""
    forward = Block.__call__

    def wasteful(self: Block, x, *arguments, **named):
        y = jnp.einsum("btd,edf->ebtf", x, self.ffn.experts.w_in[...])
        y = jnp.einsum("ebtf,edf->btd", y, self.ffn.experts.w_in[...])
        after, stats, cache = forward(self, x, *arguments, **named)
        return after + 1e-9 * y, stats, cache

    monkeypatch.setattr(Block, "__call__", wasteful)


def head_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    mean = loss.mean_cross_entropy

    def twice(hidden, head, *arguments):
        return mean(hidden, head, *arguments) + 1e-6 * mean(2 * hidden, head, *arguments)

    monkeypatch.setattr(loss, "mean_cross_entropy", twice)


@pytest.mark.planted
@pytest.mark.parametrize(
    ("waste", "failed"),
    [
        (all_experts, ["expert layers within the step", "the whole step"]),
        pytest.param(attention_four_times, ["attention within the step"], marks=NIGHT),
        (all_experts_beside_the_scopes, ["the whole step"]),
        pytest.param(head_twice, ["head within the step"], marks=NIGHT),
    ],
)
def test_a_step_that_wastes_arithmetic_is_found(
    waste: Callable, failed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waste(monkeypatch)
    found = step_arithmetic(run_config(small()), batch_size=2)
    assert [c.name.removeprefix("arithmetic: ") for c in found if not c.passed] == failed


@pytest.mark.parametrize(
    ("changes", "train", "remat"),
    [
        pytest.param({}, {}, False, marks=NIGHT),
        pytest.param({"shared_experts": 1, "layers": 1}, {"optimizer": "muon", "muon_router": True}, True, marks=NIGHT),
        # One head of keys: the compiler drops the names of the score products.
        pytest.param(
            {"kv_heads": 1, "activation": "gelu", "bias": True, "attention_dropout": 0.1},
            {"lora_rank": 4},
            False,
            marks=NIGHT,
        ),
        pytest.param(
            {"seq_len": 1100, "layers": 1, "routing": {"dispatch": "blocks"}},
            {"optimizer": "adafactor"},
            True,
            marks=NIGHT,
        ),
    ],
    ids=["plain", "remat", "one key head", "long"],
)
def test_the_step_costs_its_formula(changes: dict, train: dict, remat: bool) -> None:
    """Exactly, in every part: with remat, the forward operations of the layers count twice, but for what nobody needs.
    1,100 positions are computed in spans, whose last block is filled up."""
    config = run_config(small(**changes))
    execution = dataclasses.replace(config.execution, remat=remat)
    config = dataclasses.replace(config, execution=execution, train=dataclasses.replace(config.train, **train))
    found = list(step_arithmetic(config, batch_size=2))
    assert [c for c in found if not c.passed] == []
    exact = [" 1.000 x" in c.found for c in found[:3]]
    assert exact == ([False, True, True] if "kv_heads" in changes else [True, True, True])


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

    evaluate = all_claims.evaluate
    monkeypatch.setattr(all_claims, "evaluate", twice)


def prompts_without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: Decoder, params, tokens):
        return self.prefill(params, np.array([tokens], np.int32), np.int32(len(tokens)))

    monkeypatch.setattr(Decoder, "read", read)


@pytest.mark.planted
@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (a_batch_that_shrinks, "step 2, evaluation 1, prefill 1, decoding 1"),
        pytest.param(windows_of_two_lengths, "step 1, evaluation 2, prefill 1, decoding 1", marks=NIGHT),
        pytest.param(prompts_without_padding, "step 1, evaluation 1, prefill 2, decoding 1", marks=NIGHT),
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
