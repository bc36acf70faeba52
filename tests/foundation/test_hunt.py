"""A planted bug shows in the table, and is found by the name of its function."""

import json
from pathlib import Path

import pytest

from foundation.__main__ import main
from foundation.challenges import hunt
from foundation.challenges.planting import BUGS
from foundation.chapters import CHAPTERS

SOFTMAX = next(bug for bug in BUGS if bug.place == "softmax.softmax_backward")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bug, and a table of two operations."""
    monkeypatch.setattr(hunt, "HUNTED", [SOFTMAX])
    monkeypatch.setattr(hunt, "OPERATIONS", ("mse", "softmax"))


@pytest.mark.usefixtures("short")
def test_a_hunt_from_the_table_to_the_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        status = main(["hunt", "--folder", str(tmp_path), *arguments])
        said = capsys.readouterr()
        return status, said.out + said.err

    assert run("--answer", "mse_backward") == (1, "no bug is planted; begin with: uv run python -m foundation hunt\n")
    status, said = run("--seed", "1")
    rows = {line.split(":")[0] for line in said.splitlines() if line.endswith("FAILED")}
    assert (status, rows) == (0, {"softmax"})
    assert any(line.startswith("mse") and line.endswith("ok") for line in said.splitlines())
    told = said[said.index("failed:") :]
    assert said[: said.index(" failed:")].split()[-1] == str(told.count("\n  softmax: ")) != "0"
    kept = json.loads((tmp_path / "score.json").read_text())["hunt"]
    assert "softmax" not in kept["planted"].lower()
    status, again = run()
    assert "The same bug is still planted." in again
    assert again.endswith(told), "the failed rows are told again, without the table"
    assert "  ok" not in again
    status, said = run("--look", "softmax")
    assert status == 0
    assert "a term is missing" in said or "no simple pattern" in said
    assert run("--answer", "mse_backward")[0] == 1
    assert run("--answer", "softmx_backwrd")[0] == 2
    assert run("--look", "softmx") == (2, "operation softmx: unknown; near it: softmax\n")
    status, said = run("--answer", "softmax_backward")
    assert status == 0
    assert "Found, at try 2: softmax" in said
    assert "1 found, 0 given up" in said
    assert json.loads((tmp_path / "score.json").read_text())["hunt"]["found"] == 1


@pytest.mark.usefixtures("short")
def test_after_a_hunt_the_gradients_are_right_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hunt", "--folder", str(tmp_path)]) == 0
    assert main(["hunt", "--folder", str(tmp_path), "--give-up"]) == 0
    assert f"in {SOFTMAX.place}" in capsys.readouterr().out
    assert main(["softmax"]) == 0


def test_a_score_file_of_another_kind_is_no_hunt(tmp_path: Path) -> None:
    for text in ("", "[]", '{"hunt": 3}', '{"hunt": {"planted": 5, "tries": "x", "failed": "!", "before": 1}}'):
        (tmp_path / "score.json").write_text(text)
        assert main(["hunt", "--folder", str(tmp_path), "--give-up"]) == 1


@pytest.mark.parametrize("chapter", ["2", "07", "13"])
def test_a_hunt_up_to_a_chapter_draws_from_its_operations(
    chapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, tuple[str, ...]]] = []
    monkeypatch.setattr(hunt, "_table", lambda bug, operations: drawn.append((bug.caught_by, operations)) or ["row"])
    for seed in range(400):
        assert main(["hunt", chapter, "--seed", str(seed), "--folder", str(tmp_path)]) == 0
    allowed = {name for c in CHAPTERS if int(c.number) <= int(chapter) for name in c.operations}
    assert {own for own, _ in drawn} <= allowed
    assert all(set(operations) == allowed for _, operations in drawn)
    assert any(own in CHAPTERS[int(chapter)].operations for own, _ in drawn), "the chapter's own are among them"
    again = len(drawn)
    assert main(["hunt", chapter, "--seed", "3", "--folder", str(tmp_path)]) == 0
    assert drawn[again] == drawn[3], "a seed gives a class the same bug"


@pytest.mark.parametrize("chapter", ["0", "1", "22", "seven", "softmax"])
def test_a_chapter_without_operations_is_refused_in_one_line(
    chapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["hunt", chapter, "--folder", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"hunt {chapter}: no operation to plant a bug in; give a chapter from 2 to 21\n"
