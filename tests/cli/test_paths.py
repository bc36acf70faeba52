"""Names of files and folders that cannot be: refused with status 2, by the name of the flag, before anything else."""

import os
from pathlib import Path
from typing import Any

import pytest

from moe_jax.cli.arguments import arguments_of
from moe_jax.cli.command import command
from moe_jax.cli.train import Sft, Train
from moe_jax.config import ConfigError
from moe_jax.config.run import missing_run
from tests.cli.test_cli import make_held, refused


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that trains refuses a folder of the present one that holds a run."""
    monkeypatch.chdir(tmp_path)


def required(name: str) -> list[str]:
    """Arguments that the command must have."""
    return ["--run", "held"] if any(a.name == "run" for a in arguments_of(command(name))) else []


@pytest.mark.parametrize("case", ["train --out", "generate --run", "evaluate --data", "plot --out"])
def test_a_text_that_is_not_utf_8_is_refused(case: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """As Python hands it over: `--out $'x\\xff'`. It can be in no JSON file, so not in config.json."""
    make_held(tmp_path)
    name, flag = case.split()
    line = refused([name, *required(name), flag, os.fsdecode(b"x\xff")], capsys)
    assert line == f"error: {flag} 'x\\udcff': is not UTF-8, or holds a zero byte; give it in UTF-8\n"


WRITTEN = [
    (["train"], "--out", "folder"),
    (["plot", "--run", "held"], "--out", "folder"),
    (["inspect", "--run", "held"], "--out", "file"),
    (["inspect", "--run", "held"], "--json", "file"),
]


@pytest.mark.parametrize(("start", "flag", "kind"), WRITTEN, ids=lambda x: " ".join(x) if isinstance(x, list) else x)
def test_an_output_that_cannot_be_written(start: list[str], flag: str, kind: str, tmp_path: Path, monkeypatch, capsys):
    """A folder that refuses stands for one without permission: root may write anywhere."""
    make_held(tmp_path)
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "nowhere").symlink_to("missing")
    (tmp_path / "closed").mkdir()
    true = Path.mkdir

    def mkdir(self: Path, *arguments: Any, **named: Any) -> None:
        if self.parent.name == "closed":
            raise PermissionError(13, "Permission denied", str(self))
        true(self, *arguments, **named)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    wrong = {
        "taken/deep/below": "taken cannot be written (Not a directory); name another",
        "closed/deep/below": "closed cannot be written (Permission denied); name another",
        "nowhere/below": "nowhere cannot be written (No such file or directory); name another",
    }
    wrong |= {"taken": "is a file; name a folder"} if kind == "folder" else {"held": "is a folder; name a file"}
    for path, problem in wrong.items():
        assert f"{flag} {path}: {problem}" in refused([*start, flag, path], capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["closed", "held", "nowhere", "taken"]
    if start == ["train"]:
        Train.parse(["--out", "new/runs/x"])
        assert not (tmp_path / "new").exists()  # nothing is left of the attempt


@pytest.mark.parametrize(
    ("arguments", "entries"),
    [
        (["--tokenizer", "gpt2", "--set", "model.vocab_size=50256"], "50,257"),
        (["--tokenizer", "byte", "--set", "model.vocab_size=256"], "257"),
        (["--data.vocab-size", "2000", "--set", "model.vocab_size=1999"], "2,000"),
    ],
)
def test_a_vocabulary_below_the_tokenizers(arguments: list[str], entries: str) -> None:
    name, _, size = arguments[-1].partition("=")
    with pytest.raises(ConfigError, match=f"--set model.vocab_size={size}: .* {entries} entries"):
        Train.parse(arguments)
    Train.parse([*arguments[:-1], f"{name}={int(size) + 1}"])


def test_a_run_of_a_small_text_may_be_resumed(tmp_path: Path, monkeypatch) -> None:
    """Its tokenizer has fewer entries than were asked for, and its config.json says how many."""
    monkeypatch.chdir(tmp_path)
    make_held(tmp_path, vocab_size=400)
    for more in ([], ["--set", "model.vocab_size=0"]):  # 0 is the tokenizer's number, which the run has by now
        assert Train.parse(["--out", "held", "--resume", *more]).settings.config.model.vocab_size == 400


def test_without_a_checkpoint_a_new_run_starts_with_the_flags_alone(tmp_path: Path, monkeypatch) -> None:
    """A config.json of a run that ended early is not read. A fine-tuning must be told what it tunes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text("{")
    config, start = Train.parse(["--out", "begun", "--resume", "--steps", "7"]).settings
    assert (start.saved, config.train.steps, config.data.source) == (None, 7, "stories")
    with pytest.raises(ConfigError, match="--run: must be given"):
        Sft.parse(["--out", "begun", "--resume"])


def test_a_run_that_is_not_there_is_said_so() -> None:
    said = "--run runs/x: no run with a complete checkpoint there; make one with `make`"
    assert missing_run("--run", "runs/x", "make one with `make`") == said
