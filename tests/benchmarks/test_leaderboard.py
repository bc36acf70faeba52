"""The command in a row of the leaderboard starts the same run again."""

import dataclasses
import shlex
from pathlib import Path

import leaderboard
import pytest

from moe_jax.config import ExecutionConfig
from moe_jax.config.presets import preset
from tests.support.commands import train_settings


@pytest.mark.parametrize("changed", [False, True])
def test_the_command_gives_the_configuration_back(changed: bool, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = preset("story-cpu")
    if changed:
        model = dataclasses.replace(config.model, dropout=0.0, tied_head=True, bias=True, experts=8)
        model = model.with_routing(top_k=2, dispatch="capacity", capacity_factor=2.0)
        train = dataclasses.replace(config.train, steps=7, seed=3, muon_router=False, optimizer="adamw")
        execution = ExecutionConfig(compute_dtype="float32", remat=True, deterministic=True)
        config = dataclasses.replace(config, model=model, train=train, execution=execution)
    # The configuration of a finished run has a vocabulary size and a local path to the text. The command has neither.
    seen = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=2048),
        data=dataclasses.replace(config.data, source="somewhere/else"),
    )
    words = shlex.split(leaderboard.command(seen))
    assert words[:3] == ["uv", "run", "train.py"]
    arguments = [config.data.source if word == "FOLDER" else word for word in words[3:]]
    assert train_settings(*arguments)[0] == config
