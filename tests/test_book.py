"""The site: every planted bug has its place in the museum, and links that lead nowhere are found.

`make site` itself is run by `.ci/run`.
"""

import re
from pathlib import Path

from book import museum
from book.build import broken_links
from foundation.challenges.planting import BUGS


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


def test_a_link_without_a_page_and_an_anchor_without_a_place_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<p id="here"></p><a href="b/c.html#there"></a><a href="https://x.org/no"></a>')
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.html").write_text(
        '<p id="there"><a href="../a.html#here"></a><a href="#gone"></a><img src="no.png"><a href="../a.html#no"></a>'
    )
    assert broken_links(tmp_path) == ["b/c.html: #gone", "b/c.html: no.png", "b/c.html: ../a.html#no"]
