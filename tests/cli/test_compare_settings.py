"""`compare --config FILE.toml`: it changes what the preset says, and its errors name the file and the key."""

import dataclasses
import json
from pathlib import Path

import pytest

from moe_jax.cli.compare import Compare
from moe_jax.config import ConfigError, RunConfig
from moe_jax.config.presets import preset


def checked(folder: Path, text: str, **arguments: str) -> RunConfig:
    """The settings that `compare --config` has with this file."""
    (folder / "my.toml").write_text(text)
    return Compare(config=str(folder / "my.toml"), **arguments)._check(folder / "out")


def test_a_file_changes_the_preset(tmp_path: Path) -> None:
    text = 'preset = "story-cpu"\n[model]\nexperts = 64\ndropout = 0.0\n[routing]\ntop_k = 2\n[train]\nlr = 0.016\n'
    config = checked(tmp_path, text + '[data]\nsource = "stories"\n', preset="story-cpu")
    start = preset("story-cpu")
    routing = dataclasses.replace(start.model.routing, top_k=2)
    model = dataclasses.replace(start.model, experts=64, dropout=0.0, routing=routing)
    train, data = dataclasses.replace(start.train, lr=0.016), dataclasses.replace(start.data, source="stories")
    assert config == dataclasses.replace(start, model=model, train=train, data=data)


def test_the_flag_of_the_text_overrides_the_file(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("A cat met a dog. " * 2000)
    own = str(tmp_path / "own.txt")
    assert checked(tmp_path, '[data]\nsource = "stories"\n', data=own).data.source == own


def test_the_numbers_of_experts_are_checked_with_the_files_top_k(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--experts 2,4: each number must be between 3 \(a token's experts\)"):
        checked(tmp_path, "[routing]\ntop_k = 3\n", experts="2,4")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('preset = "story"\n', "preset = 'story': --preset is nano; give --preset story, or leave this line out"),
        ('out = "elsewhere"\n', "out = 'elsewhere': compare chooses this for each run; leave it out"),
        ("[train]\nsteps = 5\n", r"\[train\] steps = 5: compare chooses this for each run"),
        ('[model]\ndense = "active"\n', r"\[model\] dense = 'active': compare chooses this"),
        ('[execution]\nmesh = "data=2"\n', r"\[execution\] mesh = 'data=2': compare chooses this"),
        ("[train]\nlr = -1.0\n", r"\[train\] lr = -1.0: must be"),
        ("[routing]\ntop_k = 9\n", r"\[routing\] top_k = 9: must be between 1 and"),
        ("[model]\nexpertz = 9\n", r"\[model\] expertz: no such setting; perhaps experts"),
        ("[train]\nlora_rank = 4\n", r"\[train\] lora_rank = 4: is for fine-tuning"),
        ("[model]\nvocab_size = 300\n", "vocab_size = 300"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/my\.toml: .*{words}"):
        checked(tmp_path, text)


def test_another_file_in_the_folder_of_a_comparison_is_refused(tmp_path: Path) -> None:
    config = checked(tmp_path, "[model]\nexperts = 4\n")
    asked = Compare(config=str(tmp_path / "my.toml"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan.json").write_text(json.dumps({"asked": asked._asked(config)}))
    assert checked(tmp_path, "[model]\nexperts = 4\n") == config
    with pytest.raises(ConfigError, match=r"--config .*my\.toml: the comparison in .* was begun with other settings"):
        checked(tmp_path, "[model]\nexperts = 16\n")
