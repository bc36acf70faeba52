"""Every notebook executes and is built from its source. Every exercise accepts a right answer and no wrong one."""

import math
import sys
from pathlib import Path

import pytest

from foundation import exercises

NOTEBOOKS = Path(__file__).resolve().parents[1] / "foundation/notebooks"
SOURCES = sorted(NOTEBOOKS.glob("[0-9]*.py"))


@pytest.mark.notebooks
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_notebook_executes_and_is_up_to_date(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(NOTEBOOKS)
    import build  # needs jupytext and nbclient, of the group `dev`

    notebook = build.execute(source)
    assert not build.differs(source), f"python foundation/notebooks/build.py: {source.name} has changed"
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs), "the chapter has no picture"
    sys.modules.pop("build", None)


def test_there_is_a_path_of_eight_and_each_ends_with_exercises() -> None:
    assert len(SOURCES) >= 8
    for chapter, source in enumerate(SOURCES, start=1):
        text = source.read_text()
        assert "from foundation" in text
        assert {n for n in exercises.EXERCISES if n.startswith(f"{chapter}.")}, source.name
        for number in exercises.EXERCISES:
            assert (f'check("{number}"' in text) == number.startswith(f"{chapter}."), (source.name, number)


@pytest.mark.parametrize("number", exercises.EXERCISES)
def test_exercise_takes_its_solution_and_no_other(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    right = exercises.solution(number)
    assert exercises.check(number, right) is True
    wrong = (lambda *arrays: 1.01 * right(*arrays)) if callable(right) else right * 1.5 + 1.0
    assert exercises.check(number, wrong) is False
    assert exercises.check(number, None) is None
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("right.")
    assert "Hint" in said[1]
    assert said[2].endswith("not tried yet.")


def test_a_number_is_judged_relatively() -> None:
    judge = exercises.number(2.0**-20)
    assert judge(2.0**-20)
    assert not judge(2.0**-19)
    assert not judge(0.0)
    assert not judge(math.nan)
