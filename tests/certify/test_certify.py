"""The certificates on a model that is small enough. `tests/support/planted_certify.py` has bugs that they must see."""

import dataclasses
from functools import partial
from typing import get_args

import jax
import pytest

from moe_jax.certify.arithmetic import step_arithmetic
from moe_jax.certify.causality import layer_causality, model_causality
from moe_jax.certify.model import certify, initial_params
from moe_jax.model.transformer import create, split
from tests.support.leaky import LeakyCapacity, Priority, ReversedChunks, leaky_moe
from tests.support.planted_certify import run_config, small

LEAKS = get_args(Priority)
NIGHT = pytest.mark.slow
"""Of cases that compile much and differ little from the one that the fast suite runs."""


BLOCKS = {"routing": {"dispatch": "blocks", "top_k": 3}, "width": 48, "expert_hidden": 16, "activation": "swiglu"}


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": 1},
        pytest.param({"shared_experts": 1, "shared_gate": True, "routing": {"balancing": "bias"}}, marks=NIGHT),
        pytest.param(BLOCKS | {"zero_init_residual": True}, marks=NIGHT),
    ],
    ids=["short", "shared, bias", "blocks"],
)
@pytest.mark.planted
def test_all_certificates_of_a_small_model(changes: dict) -> None:
    """With blocks also experts that are narrower than the model and branches that start at zero, as in `story-cpu`.

    The parameters are bound to a device, as those of a run are: jax compiles for each kind of argument.
    """
    config = run_config(small(**changes))
    found = list(certify(config, jax.device_put(initial_params(config), jax.devices()[0]), batch_size=2))
    assert [c.name for c in found if not c.passed] == []
    assert len(found) == 1 + 3 + 1 + 6 + 1
    trained = [found[0], found[1]]
    assert all(" at each of 32 positions" in c.found for c in trained)
    assert "; 0% of the choices" not in trained[0].found  # a layer is tried under drops
    assert ("; 0% of the choices" in trained[1].found) == config.model.dropless
    assert len({c.title for c in found}) == len(found)


@pytest.mark.planted
@pytest.mark.parametrize(
    "rule", [LEAKS[0], "pairs", *(pytest.param(rule, marks=NIGHT) for rule in (*LEAKS[1:], "fours"))]
)
def test_a_known_leak_is_found(rule: str) -> None:
    """Each rule over any distance, and two that act between neighbours only."""
    chunk = {"pairs": 2, "fours": 4}.get(rule)
    capacity = partial(ReversedChunks, chunk=chunk) if chunk else partial(LeakyCapacity, priority=rule)
    certificate = layer_causality(small(), {}, moe=leaky_moe(capacity))
    assert not certificate.passed
    assert ": 0 earlier outputs" not in certificate.found
    assert " and 0 of the sequence that was left alone" in certificate.found


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
    exact = [" 1.000000 x" in c.found for c in found[:3]]
    assert exact == ([False, True, True] if "kv_heads" in changes else [True, True, True])


def test_a_model_that_drops_nothing_proves_nothing() -> None:
    """Causality must be tried under drops: with slots for all, the certificate does not pass."""
    model = small({"capacity_factor": 8.0})
    _, params = split(create(model, jax.random.key(0)))
    certificate = next(model_causality(run_config(model), params))
    assert not certificate.passed
    assert " 0% of the choices dropped" in certificate.found
