"""Which run a name finds, and which one is opened without a name."""

import json
import os
from pathlib import Path

import pytest

from moe_jax.cli.main import main, run_command
from moe_jax.runs import catalog


def make_run(folder: Path, seconds: int, **summary: object) -> None:
    (folder / "checkpoints" / "step_00000001").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    os.utime(folder / "checkpoints", (seconds, seconds))


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(catalog, "SHIPPED", tmp_path / "package")
    monkeypatch.setattr("moe_jax.cli.runs.SHIPPED", tmp_path / "package")
    for name in ("nano", "stories"):
        make_run(tmp_path / "package" / name, 0, preset=name, steps=900, weights="int8", params_total=1_511_488)


def test_a_name_is_a_folder_then_a_run_then_a_model_of_the_package(tmp_path: Path) -> None:
    assert catalog.run_folder("nano") == tmp_path / "package" / "nano"
    assert catalog.title(catalog.run_folder("nano")) == "nano"
    make_run(Path("runs/nano"), 5)
    assert catalog.run_folder("nano") == Path("runs/nano")
    Path("nano").mkdir()  # holds no run
    assert catalog.run_folder("nano") == Path("runs/nano")
    make_run(Path("nano"), 5)
    assert catalog.run_folder("nano") == Path("nano")
    assert catalog.run_folder("absent") == Path("absent")


def test_without_a_name_the_newest_run_and_one_line_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    assert catalog.title(catalog.run_or_default("")) == "stories"
    assert capsys.readouterr().err == "no --run: this is stories, a model that comes with moe-jax\n"
    for name, seconds in (("old", 1_000_000_000), ("new", 1_000_000_100), ("older", 999_999_999)):
        make_run(Path("runs") / name, seconds)
    Path("runs/bench").mkdir()
    assert catalog.run_or_default("") == Path("runs/new")
    assert capsys.readouterr() == ("", "no --run: this is runs/new, the newest run in runs\n")


def test_one_odd_run_hides_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    """A name with a line end makes one row, a long text is cut, and a summary that cannot be read counts as none."""
    make_run(Path("runs/a\nb"), 1, preset="x\n" * 100)
    for name in ("pipe", "folder", "list", "words"):
        make_run(Path("runs") / name, 2, val_bits_per_byte="much")
    for name in ("pipe", "folder"):
        Path("runs", name, "summary.json").unlink()
    os.mkfifo("runs/pipe/summary.json")
    Path("runs/folder/summary.json").mkdir()
    Path("runs/list/summary.json").write_text("[1]")
    assert run_command(["runs"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 1 + 5 + 2
    assert max(map(len, rows)) < 160
    assert sum(row.split()[:4] == ["a", "b", "x", "x"] for row in rows) == 1


def test_no_command_shows_the_commands_and_the_version_is_that_of_the_package(capsys) -> None:
    assert main(run_command, []) == 2
    assert "  chat  " in capsys.readouterr().out
    assert main(run_command, ["--version"]) == 0
    assert capsys.readouterr().out.startswith("moe-jax 0.")
