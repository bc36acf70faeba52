"""The pages of the documentation, read: blocks of code, links, sentences."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [
    *ROOT.glob("C*.md"),
    *(p for d in ("benchmarks", "foundation", "tests/reliability") for p in (ROOT / d).glob("*.md")),
]
"""Pages whose links are followed; their commands are not tried."""

_BLOCK = re.compile(r"(?:<!-- with: (?P<needs>[^>]*) -->\n)?```(?P<kind>\w*)\n(?P<code>.*?)```", re.DOTALL)
_NO_PROSE = re.compile(r"<!--.*?-->|<picture>.*?</picture>", re.DOTALL)
_LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)|(?:src|srcset)=\"(?P<source>[^\"]+)\"")


class Block(NamedTuple):
    """A block of code in a page."""

    page: str
    kind: str
    """"python", "text", or "" for commands and listings."""
    code: str
    needs: tuple[str, ...]
    """What must be there to run it, from the comment `<!-- with: ... -->` above the block."""


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(page.name, b["kind"], b["code"], tuple((b["needs"] or "").split())) for b in _BLOCK.finditer(text)]


def commands(block: Block) -> list[str]:
    """The command lines of a block, joined where a line goes on after a backslash. A listing has none."""
    joined = re.sub(r"\s*\\\n\s*", " ", block.code)
    return [] if block.kind else [line for line in joined.splitlines() if line.startswith("uv run ")]


def links(page: Path) -> list[str]:
    """Targets of links and pictures that are files of the project. (The forge has a page of the deployed site.)"""
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    found = (m["target"] or m["source"] for m in _LINK.finditer(text))
    return [target for target in found if not target.startswith(("https://", "http://", "../../deployments"))]


def sentences(page: Path) -> Iterator[str]:
    """The sentences of the prose: paragraphs and points of lists, without code, tables, headings and pictures."""
    text = _NO_PROSE.sub("", _BLOCK.sub("", page.read_text(encoding="utf-8")))
    paragraphs, lines = [], []
    for line in [*text.splitlines(), ""]:
        starts_point = re.match(r"\s*- ", line)
        if not line.strip() or line.startswith(("#", "|", "!")) or starts_point:
            paragraphs.append(" ".join(lines))
            lines = []
        if line.strip() and not line.startswith(("#", "|", "!")):
            lines.append(re.sub(r"^\s*- ", "", line).strip())
    for paragraph in [*paragraphs, " ".join(lines)]:
        plain = re.sub(r"\]\([^)]*\)", "]", paragraph)
        yield from (s for s in re.split(r"(?<=[.?!])\s+(?=[\"`*\[(A-Z0-9])", plain) if s.strip())


COMMAND_LINES = {line: block.needs for page in PAGES for block in blocks(page) for line in commands(block)}
"""Every command line of the pages -> what must be there to run it."""


def words_of(line: str) -> list[str]:
    """The words of a command line, after `uv run` and its extras."""
    words = shlex.split(line.removeprefix("uv run ").removeprefix("--isolated "))
    while words[0] in ("--extra", "--group"):
        words = words[2:]
    return ["python", "-m", "moe_jax", *words[1:]] if words[0] == "moe-jax" else words
