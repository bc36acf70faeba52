"""`make site`: one static folder, which opens from disk and under any address.

    index.html    the landing page, with the model inside
    story.html    the shipped model `stories` in one page
    report.html   an example of a routing report
    book/         the notebooks, the pages of docs/, the bug museum, and the reference of both packages

The pages of the book are copied to book/build/source with the paths that they have here, so their links hold. Sphinx
writes them, and a warning is an error. At the end every link within the site is followed.
"""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from book import museum, one_token
from book.conf import REPOSITORY
from foundation.chapters import PATH, part
from moe_jax.pages import filled

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "book" / "build"
PAGES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "CITATION.cff",
    "LICENSE",
    "README.md",
    "benchmarks/*.md",
    "benchmarks/*.png",
    "docs/*.md",
    "docs/images/*",
    "foundation/*.md",
    "foundation/one_file.py",
    "foundation/notebooks/*.ipynb",
    "notebooks/*.ipynb",
    "tests/reliability/README.md",
)


def assemble(source: Path) -> None:
    """Copy the pages into an empty folder, and write those that are made."""
    shutil.rmtree(source, ignore_errors=True)
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            target = source / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            if target.suffix == ".md":
                target.write_text(linked_within(target.read_text(encoding="utf-8"), target.parent), encoding="utf-8")
    index = (ROOT / "book" / "index.md").read_text(encoding="utf-8")
    (source / "index.md").write_text(filled(index, {"path": sidebar_of_chapters()}), encoding="utf-8")
    (source / "museum.md").write_text(museum.page(), encoding="utf-8")
    (source / "one_token.md").write_text(one_token.page(), encoding="utf-8")
    code = "# One file: a mixture and its backward pass\n\n```{literalinclude} one_file.py\n:language: python\n```\n"
    (source / "foundation" / "one_file.md").write_text(code, encoding="utf-8")


def linked_within(text: str, folder: Path) -> str:
    """A page whose links to the report, the published site and the file of code open the site's own pages."""
    up = "../" * (len(folder.relative_to(BUILD / "source").parts) + 1)
    for target, page in ((r"[\w./-]*report-nano\.html", "report.html"), (r"[./]*deployments/[\w-]+", "index.html")):
        text = re.sub(rf"\[([^\]]+)\]\({target}\)", rf'<a href="{up}{page}">\1</a>', text)
    return text.replace("one_file.py)", "one_file.md)")


def sidebar_of_chapters() -> str:
    """The parts of the path with their chapters, in the order of `foundation/chapters.py`."""
    parts = []
    for name in PATH:
        caption = name if name == "The course" else f"Elective: {name}"
        pages = [f"foundation/notebooks/{chapter.stem}" for chapter in part(name)]
        parts.append("\n".join(["```{toctree}", f":caption: {caption}", ":hidden:", "", *pages, "```"]))
    return "\n\n".join(parts)


class _Links(HTMLParser):
    """What a page links to or loads, and the anchors that it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8", errors="replace"))  # the model's page holds bytes

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


def broken_links(html: Path) -> list[str]:
    """Links between the book's pages whose file or anchor is not there."""
    written = [path for path in sorted(html.rglob("*.html")) if "_static" not in path.parts]  # the theme's templates
    pages = {path.resolve(): _Links(path) for path in written}
    found = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            fragment = unquote(parts.fragment)
            missing_anchor = target in pages and fragment and fragment not in pages[target].anchors
            if not target.exists() or missing_anchor:
                found.append(f"{path.relative_to(html)}: {link}")
    return found


def write_model(path: Path) -> None:
    """Write the shipped model as one page."""
    command = [sys.executable, "-m", "moe_jax", "export", "--run", "stories", "--to", "html", "--out", str(path)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def landing_page(model: Path) -> str:
    """The landing page, which shows the page `model`."""
    parts = {
        "size": f"{model.stat().st_size / 1e6:.1f} MB",
        "cases": str(len(museum.SIGHTINGS)),
        "repository": f' <a href="{REPOSITORY}">The code</a>' if REPOSITORY else "",
        "install": f"uvx --from git+{REPOSITORY} moe-jax chat" if REPOSITORY else "uv run moe-jax chat",
    }
    return filled((ROOT / "book" / "landing.html").read_text(encoding="utf-8"), parts)


def main() -> int:
    """Build the site. Returns 0 if there was no warning and every link leads somewhere."""
    source, site = BUILD / "source", BUILD / "site"
    html = site / "book"
    shutil.rmtree(site, ignore_errors=True)
    assemble(source)
    options = ["-b", "html", "-c", str(ROOT / "book"), "-W", "--keep-going", "-q", "-d", str(BUILD / "doctrees")]
    status = subprocess.call([sys.executable, "-m", "sphinx", *options, str(source), str(html)])
    shutil.rmtree(site / "jupyter_execute", ignore_errors=True)  # MyST-NB's copies of the notebooks
    shutil.copytree(source / "docs" / "images", html / "docs" / "images", dirs_exist_ok=True)  # README's <picture>
    shutil.copyfile(ROOT / "docs" / "report-nano.html", site / "report.html")
    write_model(site / "story.html")
    (site / "index.html").write_text(landing_page(site / "story.html"), encoding="utf-8")
    broken = broken_links(site)
    for link in broken:
        print(f"leads nowhere: {link}")
    if status or broken:
        return 1
    print(f"the site: {site / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
