"""Each link of README and docs resolves; sentences are short; code fits 80 columns; each command is accepted."""

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest
import suites.command

from tests.docs.pages import COMMAND_LINES, OTHERS, PAGES, ROOT, blocks, links, sentences, words_of
from tests.support.commands import accept

IDS = [page.name for page in PAGES]


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_resolves(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert file.is_relative_to(ROOT)
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_sentences_are_short(page: Path) -> None:
    """No sentence over 45 words, 25 on average."""
    counts = {sentence: len(sentence.split()) for sentence in sentences(page)}
    assert [sentence for sentence, words in counts.items() if words > 45] == []
    assert sum(counts.values()) <= 25 * len(counts)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_code_fits_80_columns(page: Path) -> None:
    assert [line for block in blocks(page) for line in block.code.splitlines() if len(line) > 80] == []


def test_the_compilers_of_plans_stay_out_of_the_users_environment() -> None:
    """What the extra `gpu-plan` leaves there: tests/test_package.py."""
    lines = [line for page in [*PAGES, *OTHERS] for line in page.read_text().splitlines() if "--extra gpu-plan" in line]
    assert [line for line in lines if "--isolated" not in line] == []


BUDGETS = {"README.md": 800, "CHANGELOG.md": 900, "docs/gpu.md": 700, "docs/scaling.md": 1200, "docs/quality.md": 800}
BUDGETS |= {"docs/small-weights.md": 600, "docs/large-texts.md": 500, "docs/performance.md": 500}
BUDGETS |= {"docs/reliability.md": 320, "docs/microscope.md": 600, "foundation/README.md": 1000}


def test_pages_are_short() -> None:
    """What grows beyond these words is evidence, and belongs into benchmarks/."""
    words = {str(page.relative_to(ROOT)): len(page.read_text().split()) for page in [*PAGES, *OTHERS]}
    assert {page: words[page] for page, most in BUDGETS.items() if words[page] > most} == {}
    assert sum(count for page, count in words.items() if page.startswith("docs/")) <= 10_500


def test_every_card_that_is_said_to_be_tested_has_a_file() -> None:
    """A row of the table in docs/gpu.md has a link to what `doctor --gpu --test` wrote on the card."""
    page, measured = (ROOT / "docs/gpu.md").read_text(), ROOT / "benchmarks/cards/measured"
    rows = re.findall(r"^\| (.+?) \| (.*?) ?\|$", page.partition("| card | file |\n|---|---|\n")[2], re.MULTILINE)
    files = {path.name for path in measured.glob("card-*.json")}
    assert rows == [("none yet", "")] or {re.sub(r".*/|\)", "", link) for _, link in rows} == files
    assert (rows == [("none yet", "")]) == (not files)


def test_the_front_page_begins_with_a_picture() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 140
    assert next(i for i, line in enumerate(lines) if "<img" in line) < 12  # the picture comes first


def test_the_front_page_names_the_words_of_its_picture() -> None:
    """The picture shows a part of the report: the story with and without one expert."""
    page = (ROOT / "docs/report-nano.html").read_text()
    found = re.search(r"<script[^>]*application/json[^>]*>(.*?)</script>", page, re.DOTALL)
    assert found
    ablation = json.loads(found[1])["ablation"]
    said = re.search(
        r'Without\s+expert (\d+) of layer (\d+), "(\w+)" becomes "(\w+)"',
        (ROOT / "README.md").read_text(),
    )
    assert said
    expert, layer, before, now = said.groups()
    without = ablation["stories"][ablation["layers"].index(int(layer))][int(expert)]
    assert (before in ablation["story"], now in ablation["story"]) == (True, False)
    assert (before in without, now in without) == (False, True)


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_every_command_line_is_accepted(
    line: str, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the parser, with the files in place that the page speaks of."""
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:9876")  # as docs/scaling.md exports it
    words = words_of(line)
    monkeypatch.chdir(tmp_path if words[0] == "train.py" and not COMMAND_LINES[line] else workplace)
    if words[0] == "train.py":
        accept("train", words[1:])
    elif words[:3] == ["python", "-m", "moe_jax"]:
        accept(words[3], words[4:])
    elif words[0] == "moe-jax":
        accept(words[1], words[2:])
    elif words[0] == "benchmark.py":
        suites.command.parse(words[1:], "")
    elif words[0] == "python" and words[1].startswith("benchmarks/"):
        assert (ROOT / words[1]).exists()
    elif words[:2] == ["python", "-c"]:
        compile(words[2], line, "exec")
    else:
        assert words[0] == "pytest" or words[:3] == ["python", "-m", "foundation"]


def test_the_example_report_may_run_its_script() -> None:
    """Its policy allows the script with one digest only. A page whose script was edited alone would stay empty."""
    page = (ROOT / "docs/report-nano.html").read_text()
    (allowed,) = re.findall(r"script-src 'sha256-([^']+)'", page)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert digests == [allowed]
