"""The site: every planted bug has its place in the museum, and links that lead nowhere are found.

`make site` itself is run by `.ci/run`.
"""

import re
import runpy
from pathlib import Path

import pytest

from book import museum
from book.build import PAGES, ROOT, broken_links, sidebar_of_chapters
from foundation.challenges.planting import BUGS
from foundation.chapters import CHAPTERS, PATH


def test_every_bug_is_shown_once_with_its_change_and_what_catches_it() -> None:
    exhibits = [text for text in re.split(r"\n####? ", museum.page())[1:] if "```diff" in text]
    assert len(exhibits) == len(BUGS)
    for bug in BUGS:
        own = f"`{bug.name}`" if bug.name in museum.SIGHTINGS else f"{museum._title(bug)}\n"
        (shown,) = [text for text in exhibits if own in text and f"`{bug.place}`" in text]
        removed = [line[2:] for line in shown.splitlines() if line.startswith("- ")]
        added = [line[2:] for line in shown.splitlines() if line.startswith("+ ")]
        assert set(removed) <= set(bug.old.splitlines()), bug.name
        assert set(added) <= set(bug.new.splitlines()), bug.name
        assert removed or added, bug.name
        assert bug.caught_by.removeprefix("test:") in shown


def test_public_cases_come_first_and_are_of_bugs_that_are_planted() -> None:
    assert set(museum.SIGHTINGS) <= {bug.name for bug in BUGS}
    public, _, _ = museum.page().partition("\n## Planted by us\n")
    for case in museum.SIGHTINGS.values():
        repository, _, number = case.issue.partition("#")
        assert repository.count("/") == 1
        assert number.isdigit()
        assert (
            f"[{case.issue}](https://github.com/{repository}/issues/{number})\n\n**Symptom.** {case.symptom}" in public
        )


@pytest.mark.parametrize("pattern", PAGES)
def test_every_pattern_finds_pages(pattern: str) -> None:
    assert list(ROOT.glob(pattern))


def test_the_sidebar_has_every_chapter_once_and_tokens_beside_the_model_that_writes() -> None:
    sidebar = sidebar_of_chapters()
    stems = re.findall(r"^foundation/notebooks/(.+)$", sidebar, flags=re.MULTILINE)
    assert sorted(stems) == [chapter.stem for chapter in CHAPTERS]
    assert stems[7:9] == ["20_byte_pairs", "07_a_transformer_that_writes"]
    assert re.findall(r"^:caption: (?:Elective: )?(.+)$", sidebar, flags=re.MULTILINE) == list(PATH)
    assert "{{path}}" in (ROOT / "book/index.md").read_text()


def test_a_link_without_a_page_and_an_anchor_without_a_place_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<p id="here"></p><a href="b/c.html#there"></a><a href="https://x.org/no"></a>')
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.html").write_text(
        '<p id="there"><a href="../a.html#here"></a><a href="#gone"></a><img src="no.png"><a href="../a.html#no"></a>'
    )
    assert broken_links(tmp_path) == ["b/c.html: #gone", "b/c.html: no.png", "b/c.html: ../a.html#no"]


def test_a_public_address_gives_the_notebooks_a_colab_button(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_JAX_REPOSITORY", raising=False)
    without = runpy.run_path(str(ROOT / "book" / "conf.py"))["html_theme_options"]
    assert not {"launch_buttons", "repository_url"} & set(without)
    monkeypatch.setenv("MOE_JAX_REPOSITORY", "https://github.com/owner/name/")
    options = runpy.run_path(str(ROOT / "book" / "conf.py"))["html_theme_options"]
    assert options.pop("launch_buttons") == {"colab_url": "https://colab.research.google.com"}
    assert options.pop("repository_url") == "https://github.com/owner/name"
    assert options.pop("repository_branch") == "main"
    assert options == without
