"""The suite `peers`: both sides have one shape, each is compared in its faster form; how the process of Mixtral ends.

`tests/interop` compares the models themselves.
"""

import io
from types import SimpleNamespace
from typing import Any

import pytest
from suites import peers

from moe_jax.config import UserError
from moe_jax.config.presets import PRESETS, preset, with_vocabulary
from moe_jax.model import precision
from moe_jax.model.costs import count_parameters, totals
from moe_jax.system.machine import Measured
from tests.benchmarks.test_suites import config


def test_both_sides_have_the_same_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    for taken, compared in (("float32", ["float32"]), ("bfloat16", ["float32", "bfloat16"])):
        monkeypatch.setattr(peers, "choose_policy", lambda kind, taken=taken: precision.choose_policy(taken))
        assert peers.shape_of(peers.like_mixtral(config()), 3).precisions == compared
    monkeypatch.setattr(peers, "choose_policy", lambda kind: precision.choose_policy("float16"))
    with pytest.raises(UserError, match="this device trains in float16"):
        peers.shape_of(peers.like_mixtral(config()), 3)


EVERYTHING = {
    "norm": "layernorm",
    "positions": "learned",
    "activation": "gelu",
    "bias": True,
    "tie_value_output_init": True,
    "scaled_embedding": True,
    "zero_init_residual": True,
    "qk_norm": "head",
    "norm_eps": 1e-3,
    "renormalise_gates": False,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "dense": "active",
    "balancing": "bias",
    "shared_experts": 1,
}


@pytest.mark.parametrize("name", [*PRESETS, "everything"])
def test_ours_has_the_parameters_of_mixtral(name: str) -> None:
    """Embedding, head and last norm; in a layer four projections, two of them narrower where queries share keys, a
    router, three matrices an expert and two norms."""
    given = config(**EVERYTHING) if name == "everything" else with_vocabulary(preset(name))
    ours = peers.like_mixtral(given)
    c = ours.model
    if name == "everything":
        plain = {"norm": "rmsnorm", "positions": "rope", "activation": "swiglu", "bias": False, "tied_head": False}
        assert c == config(**plain).model, "nothing that Mixtral has not"
    keys = c.width * c.key_value_heads // c.heads  # and values: their heads are as wide as the queries'
    attention = 2 * c.width * (c.width + keys)
    layer = attention + c.width * c.experts + 3 * c.experts * c.width * c.expert_hidden + 2 * c.width
    assert totals(count_parameters(c)).total == 2 * c.vocab_size * c.width + c.width + c.layers * layer
    assert peers.shape_of(ours, 8) == peers.shape_of(given, 8)
    assert (ours.train.optimizer, ours.train.param_dtype, ours.execution.remat) == ("adamw", "float32", False)


def test_a_peer_that_ends_says_with_which_status() -> None:
    process: Any = SimpleNamespace(stdout=io.StringIO(""), wait=lambda: 7)
    with pytest.raises(UserError, match="the peer, Mixtral in PyTorch, ended with status 7; its error is above"):
        peers.Peer(process)
    answers = io.StringIO('{"candidates": []}\n1.5\n')
    asked = io.StringIO()
    talking = peers.Peer(SimpleNamespace(stdout=answers, stdin=asked))  # pyright: ignore[reportArgumentType]
    assert talking.about == {"candidates": []}
    assert talking.run("train eager") == Measured(1.5)
    assert asked.getvalue() == "train eager\n"
