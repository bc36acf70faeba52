"""The suite `peers`: both sides have one shape, each is compared in its faster form; how the process of Mixtral ends.

`tests/peers` compares the real model with ours.
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_jax.benchmarks import mixtral, peers, suites
from moe_jax.config import UserError
from moe_jax.config.presets import PRESETS, preset, with_vocabulary
from moe_jax.model import precision
from moe_jax.model.costs import count_parameters, totals
from moe_jax.system.machine import Measured
from tests.benchmarks.test_suites import config


def test_both_sides_train_in_the_same_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    for taken, compared in (("float32", ["float32"]), ("bfloat16", ["float32", "bfloat16"])):
        monkeypatch.setattr(peers, "choose_policy", lambda kind, taken=taken: precision.choose_policy(taken))
        assert peers.shape_of(peers.like_mixtral(config()), 3).training_precisions == compared
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


class Pretended:
    """A peer that takes 1,000 s with one implementation of experts and 2,000 with the other; 600 s to train in
    bfloat16."""

    def __init__(self, parameters: int, precisions: list[str]) -> None:
        runs = [*(f"train-{precision}" for precision in precisions), "forward", "prefill", "decode"]
        names = [f"{name} {experts}" for name in runs for experts in mixtral.EXPERTS]
        self.about = {"candidates": names, "parameters": parameters, "versions": {"torch": "0"}}

    def run(self, name: str) -> Measured:
        return Measured((600 if "bfloat16" in name else 1000) * (1 if name.endswith("grouped_mm") else 2))


def test_peers_are_compared_by_their_faster_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same precision, and each in its faster one."""
    monkeypatch.setattr(peers, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(peers, "MIN_TURN_SECONDS", 0)
    monkeypatch.setattr(peers, "choose_policy", lambda kind: precision.choose_policy("bfloat16"))
    size = totals(count_parameters(peers.like_mixtral(config()).model)).total
    with_peer = lambda size: lambda shape: contextlib.nullcontext(Pretended(size, shape.training_precisions))  # noqa: E731
    monkeypatch.setattr(peers, "peer", with_peer(size))
    numbers, times = peers.compare(config(), 2, 1)
    for name in ("forward", "prefill", "decode"):
        assert numbers[f"{name}_ratio"] == pytest.approx(1000 / times[name].median)
    assert numbers["train_ratio_float32"] == pytest.approx(1000 / times["train-float32"].median)
    assert numbers["train_ratio_bfloat16"] == pytest.approx(600 / times["train-bfloat16"].median)
    ours = min(times["train-float32"].median, times["train-bfloat16"].median)
    assert numbers["train_ratio_best"] == pytest.approx(600 / ours)
    assert set(suites.RATIOS.values()) == {name for name in numbers if "_ratio" in name}
    json.dumps(numbers)


def test_a_peer_that_ends_says_with_which_status() -> None:
    process: Any = SimpleNamespace(stdout=io.StringIO(""), wait=lambda: 7)
    with pytest.raises(UserError, match="the peer, Mixtral in PyTorch, ended with status 7; its error is above"):
        peers.Peer(process)
    process = SimpleNamespace(stdout=io.StringIO(""), wait=lambda: -9)
    with pytest.raises(UserError, match="memory was full: take a smaller --batch-size"):
        peers.Peer(process)
    answers = io.StringIO('{"candidates": []}\n1.5\n')
    asked = io.StringIO()
    talking = peers.Peer(SimpleNamespace(stdout=answers, stdin=asked))  # pyright: ignore[reportArgumentType]
    assert talking.about == {"candidates": []}
    assert talking.run("train eager") == Measured(1.5)
    assert asked.getvalue() == "train eager\n"


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
    assert arguments.startswith("-W ignore::FutureWarning -m moe_jax.benchmarks.mixtral {")
    assert mixtral.Shape(**json.loads(arguments.partition("mixtral ")[2])) == shape
