"""The process that runs Mixtral: how it is asked, how it ends, and what it is told."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_jax.benchmarks import mixtral, peers
from moe_jax.config import UserError
from moe_jax.system.machine import Measured
from tests.benchmarks.test_benchmarks import config


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


def test_the_prompt_is_at_most_128_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "choose_policy", lambda _: SimpleNamespace(loss_scaling=False, compute="float32"))
    shapes = [peers.shape_of(config(seq_len=length), 3).prompt for length in (64, 128, 256)]
    assert shapes == [64, 128, 128]
