"""The suite `peers`: both sides have one shape, each is compared in its faster form; how the process of Mixtral ends.

`tests/interop` compares the models themselves.
"""

import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from suites import mixtral, peers, request

from moe_jax.config import UserError
from moe_jax.config.presets import PRESETS, preset, with_vocabulary
from moe_jax.model import precision
from moe_jax.model.costs import count_parameters, totals
from moe_jax.system.machine import Times
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


SECONDS = {
    "train-float32": 500.0,
    "train-bfloat16": 200.0,
    "forward": 250.0,
    "prefill-float32": 400.0,
    "prefill-bfloat16": 500.0,
    "decode": 800.0,
}
"""Of our candidates. Mixtral's take 1,000 s with one implementation of experts and 2,000 with the other; 600 s in
bfloat16."""


def test_peers_are_compared_by_their_faster_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same precision, and each in its faster one. A peer of another size is refused."""
    trainer = SimpleNamespace(state=SimpleNamespace(params={}), batch=np.zeros((1, 2, 17), np.int32))
    monkeypatch.setattr(peers.RandomTokenTrainer, "of", lambda *_: trainer)
    for call in ("prefill_call", "token_call"):
        monkeypatch.setattr(peers.decoding, call, lambda *_: None)
    monkeypatch.setattr(peers, "choose_policy", lambda kind: precision.choose_policy("bfloat16"))
    names = [f"{name} {experts}" for name in SECONDS for experts in mixtral.EXPERTS]
    theirs = {n: (600.0 if "bfloat16" in n else 1000.0) * (1 if n.endswith("grouped_mm") else 2) for n in names}

    def alternate(candidates: dict[str, Any], rounds: int) -> dict[str, Times]:
        return {name: Times(((SECONDS | theirs)[name],)) for name in candidates}

    monkeypatch.setattr(peers, "alternate", alternate)
    size = totals(count_parameters(peers.like_mixtral(config()).model)).total
    other = SimpleNamespace(about={"candidates": names, "parameters": size, "versions": {"torch": "0"}})
    monkeypatch.setattr(peers, "peer", lambda shape: contextlib.nullcontext(other))
    numbers, times = peers.compare(config(), 2, 1)
    assert set(times) == {*SECONDS, *names}
    assert json.loads(json.dumps(numbers)) == {
        "train_ratio_float32": 2.0,
        "train_ratio_bfloat16": 3.0,
        "train_ratio_best": 3.0,
        "forward_ratio": 4.0,
        "prefill_ratio_float32": 2.5,
        "prefill_ratio_bfloat16": 1.2,
        "prefill_ratio_best": 1.5,
        "decode_ratio": 1.25,
        "peer": {"torch": "0"},
    }
    assert {name for name in request.WORDS if "_ratio" in name} == {name for name in numbers if "_ratio" in name}
    other.about["parameters"] += 1
    with pytest.raises(AssertionError, match="the peer has"):
        peers.compare(config(), 2, 1)


def test_a_peer_is_killed_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/arguments\necho '{{\"pid\": '$$'}}'\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(peers.sys, "executable", str(program))
    monkeypatch.setattr(peers, "choose_policy", lambda _: SimpleNamespace(loss_scaling=False, compute="float32"))
    shape = peers.shape_of(config(), 3)
    with peers.peer(shape) as talking:
        assert Path(f"/proc/{talking.about['pid']}").exists() or sys.platform != "linux"
    assert talking._process.returncode == -9
    arguments = (tmp_path / "arguments").read_text()
    assert arguments.startswith(f"-P -W ignore::FutureWarning {mixtral.__file__} {{")
    assert mixtral.Shape(**json.loads(arguments.partition(".py ")[2])) == shape
