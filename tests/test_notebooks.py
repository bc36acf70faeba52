"""Every notebook executes and is built from its source. Every exercise accepts a right answer and no wrong one."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest

from foundation import exercises

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "foundation/notebooks"
TEN_MINUTES = ROOT / "notebooks/00_ten_minutes.py"
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


@pytest.mark.notebooks
def test_ten_minutes_with_a_trained_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two small runs that are trained here, in place of `nano` and its dense twin."""
    from moe_jax.config import TrainConfig
    from moe_jax.config.presets import preset
    from moe_jax.training.loop import finish, train
    from moe_jax.training.session import Session
    from tests.support import saved_run

    with saved_run.quick_training(tmp_path / "cache"):
        for name, dense in (("nano", "none"), ("nano-dense", "active")):
            small = {"layers": 2, "width": 32, "heads": 2, "experts": 4, "expert_hidden": 32, "seq_len": 64}
            nano = preset("nano")
            session = Session.open(
                dataclasses.replace(
                    nano,
                    out=str(tmp_path / name),
                    model=dataclasses.replace(nano.model, dense=dense, **small),
                    data=dataclasses.replace(nano.data, stories=300, vocab_size=400, eval_tokens=500),
                    train=TrainConfig(steps=20, batch_size=4, lr=1e-2, warmup_steps=2, eval_every=20, save_every=20),
                ),
                None,
            )
            train(session)
            finish(session)
        monkeypatch.setenv("MOE_JAX_NOTEBOOK_RUNS", str(tmp_path))
        monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
        monkeypatch.syspath_prepend(NOTEBOOKS)
        import build

        notebook = build.execute(TEN_MINUTES)
    assert not build.differs(TEN_MINUTES), "python foundation/notebooks/build.py 00: the source has changed"
    kinds = [kind for cell in notebook.cells for out in cell.get("outputs", []) for kind in out.get("data", {})]
    assert kinds.count("image/png") == 2
    assert kinds.count("text/html") == 1
    sys.modules.pop("build", None)


def test_ten_minutes_fit_a_narrow_cell() -> None:
    """The stored notebook has the cells of its source, and pictures; no line is longer than 88 columns."""
    lines = TEN_MINUTES.read_text().splitlines()
    assert max(map(len, lines)) <= 88
    stored = json.loads(TEN_MINUTES.with_suffix(".ipynb").read_text())
    code = ["".join(cell["source"]) for cell in stored["cells"] if cell["cell_type"] == "code"]
    assert code
    for source in code:
        assert source in TEN_MINUTES.read_text()
    assert any("image/png" in out.get("data", {}) for cell in stored["cells"] for out in cell.get("outputs", []))
    assert "/tmp" not in json.dumps([cell.get("outputs", []) for cell in stored["cells"]])


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
