"""Every notebook executes, is built from its source, and has its prose, its exercises and its picture."""

import json
import re
import sys
from pathlib import Path

import pytest

from foundation.chapters import CHAPTERS, PATH, Chapter, part
from foundation.exercises import EXERCISES
from tests.support import short_form

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "foundation/notebooks"
TEN_MINUTES = ROOT / "notebooks/00_ten_minutes.py"
SOURCES = sorted(NOTEBOOKS.glob("[0-9]*.py"))


@pytest.mark.notebooks
@pytest.mark.parametrize("source", short_form(SOURCES, SOURCES[::6]), ids=lambda path: path.stem)
def test_notebook_executes_and_is_up_to_date(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(NOTEBOOKS)
    import build  # needs jupytext and nbclient, of the extra `lessons`

    notebook = build.execute(source)
    assert not build.differs(source), f"python foundation/notebooks/build.py: {source.name} has changed"
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs), "the chapter has no picture"
    sys.modules.pop("build", None)


@pytest.mark.notebooks
def test_ten_minutes_open_the_model_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trained."""
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(NOTEBOOKS)
    import build

    notebook = build.execute(TEN_MINUTES)
    assert not build.differs(TEN_MINUTES), "python foundation/notebooks/build.py 00: the source has changed"
    kinds = [kind for cell in notebook.cells for out in cell.get("outputs", []) for kind in out.get("data", {})]
    assert kinds.count("image/png") == 2
    assert kinds.count("text/html") == 1
    sys.modules.pop("build", None)


def markdown_words(source: Path) -> int:
    """Words of prose: without formulas and code."""
    cells = [cell for cell in source.read_text().split("# %%") if cell.startswith(" [markdown]")]
    prose = " ".join(re.sub(r"```.*?```|\$\$.*?\$\$|\$[^$]*\$|`[^`]*`", "", cell, flags=re.DOTALL) for cell in cells)
    return len(re.findall(r"[A-Za-z']{2,}", prose.replace("[markdown]", "")))


@pytest.mark.parametrize(
    ("source", "chapter"), list(zip(SOURCES, CHAPTERS, strict=True)), ids=lambda x: getattr(x, "stem", "")
)
def test_a_chapter_has_prose_exercises_and_cells_of_mathematics(source: Path, chapter: Chapter) -> None:
    text = source.read_text()
    assert source.stem == chapter.stem
    assert markdown_words(source) >= 600
    assert max(map(len, text.splitlines())) <= 88
    assert "matplotlib" not in text  # plotting is in foundation/lessons
    assert "from foundation" in text
    own = [number for number in EXERCISES if number.startswith(f"{chapter.number}.")]
    assert len(own) >= 3
    for number in EXERCISES:
        alone = f'# %%\ncheck("{number}", None)\n'
        assert (alone in text) == (f'check("{number}"' in text) == (number in own), number


@pytest.mark.parametrize("chapter", [c for c in CHAPTERS if c.production], ids=lambda chapter: chapter.stem)
def test_a_chapter_and_the_production_code_that_it_proves_name_each_other(chapter: Chapter) -> None:
    notebook = (NOTEBOOKS / f"{chapter.stem}.py").read_text()
    for file in chapter.production:
        named = re.sub(r"\s+", " ", (ROOT / "moe_jax" / file).read_text())
        assert f"hapter {chapter.number} of `foundation`" in named, file
        assert f"`moe_jax/{file}`" in notebook, file


def test_the_front_door_lists_the_path() -> None:
    rows = [line for line in (ROOT / "foundation/README.md").read_text().splitlines() if "](notebooks/" in line]
    path = [(name, chapter) for name in PATH for chapter in part(name)]
    for row, (name, c) in zip(rows, path, strict=True):
        elective = "" if name == "The course" else f" {name} |"
        link = f"[{c.question}](notebooks/{c.stem}.ipynb)"
        assert row == f"|{elective} {c.number} | {link} | {c.minutes} | {c.needs} |"
        assert (NOTEBOOKS / f"{c.stem}.ipynb").exists()


def test_the_stored_notebooks_are_built_from_their_sources() -> None:
    """Without executing them: each code cell of the stored notebook is in its source."""
    for source in SOURCES:
        stored = json.loads(source.with_suffix(".ipynb").read_text())
        text = source.read_text()
        for cell in stored["cells"]:
            if cell["cell_type"] == "code":
                assert "".join(cell["source"]) in text, source.name
