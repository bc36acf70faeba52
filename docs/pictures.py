"""Make the pictures of README and docs from a real run.

    uv run --group browser --extra plots --extra serve docs/pictures.py

It writes

    docs/images/story-light.svg, story-dark.svg      the shipped model `stories` writes; each token in the colour of its
                                                     expert, one after the other
    docs/images/off-light.png, off-dark.png          the routing report: an expert switched off
    docs/images/serve-light.png, serve-dark.png      the page of `serve` with the shipped model `stories`, after going
                                                     on from another token
    docs/report-nano.html                            the routing report itself

Needs a trained run (`uv run train.py`) and Debian's `chromium`, or another Chromium on the PATH.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

import moe_jax
from moe_jax.pages import page_file

HERE = Path(__file__).parent
WIDTH = 1280
OFF_HEIGHT = 1120
STORY_TOKENS, SECONDS_A_TOKEN = 96, 0.09
COLUMNS, LETTER, LINE, MARGIN = 78, 9, 34, 16
"""Letters of a line; pixels of a letter, from line to line, and around the text."""
SCHEMES = {"light": ("#fbfaf7", "#1f2328", 0.3), "dark": ("#14171c", "#e9e7e2", 0.45)}
"""Of each colour scheme: ground, ink, and how strong an expert's colour is."""
PALETTE = re.findall("#[0-9a-f]{6}", page_file("moe_jax.pages", "parts/colours.js"))[:16]
SERVED = {"width": 1040, "height": 1132}
SERVED_COLOURS = 255
"""Colours of the pictures of the server's page: few, so that the files are small."""


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/nano"), help="folder of the run")
    report = parser.parse_args().run / "report"
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("error: no chromium on the PATH; apt-get install chromium")
    if not (report / "routing.html").is_file():
        sys.exit(f"error: {report}: no report there; train a run first, `uv run train.py`")
    images = HERE / "images"
    images.mkdir(exist_ok=True)
    shutil.copy(report / "routing.html", HERE / "report-nano.html")
    moving_story(images)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with served("stories") as url:
            for scheme in ("light", "dark"):
                report_picture(browser, report / "routing.html", scheme, images)
                served_picture(browser, url, scheme, images / f"serve-{scheme}.png")
        browser.close()


def report_picture(browser: Browser, report: Path, scheme: Literal["light", "dark"], images: Path) -> None:
    """A picture of the routing report, without the expert that the text misses most."""
    page = browser.new_page(viewport={"width": WIDTH, "height": OFF_HEIGHT}, color_scheme=scheme)
    page.goto(report.resolve().as_uri())
    page.click("#bar a[href='#ablation']")  # a link draws all that is above its section
    page.wait_for_timeout(1000)
    page.evaluate("scrollBy(0, document.getElementById('ablation-title').getBoundingClientRect().top - 110)")
    page.wait_for_timeout(300)
    page.screenshot(path=images / f"off-{scheme}.png")


def moving_story(images: Path) -> None:
    """Draw a text of `stories` that appears token by token, in a loop: the ground of a token is the colour of its first
    expert in layer 0, the line below it that of the second. Where motion is not wanted, the whole text stands there."""
    run = moe_jax.load_run("stories")
    text = run.generate("Once upon a time", seed=6, temperature=0.5, max_tokens=STORY_TOKENS)
    ids = run.tokenizer.encode(text)
    chosen = run.trace(text).expert_index[0, 1:]  # without the separator
    drawn, row, column = [], 0, 0
    for n, (token, experts) in enumerate(zip(ids, chosen, strict=True)):
        piece = run.tokenizer.decode([token])
        if "\n" in piece or (piece.startswith(" ") and column + len(piece) > COLUMNS):
            row, column = row + 1, 0
        piece = piece.strip("\n") if column else piece.strip()
        x, y, width = MARGIN + column * LETTER, MARGIN + row * LINE, max(len(piece) * LETTER - 1, 0)
        first, second = (PALETTE[e] for e in experts[:2])
        drawn.append(
            f'<g style="animation-delay:{n * SECONDS_A_TOKEN:.2f}s"><rect x="{x:g}" y="{y}" width="{width:g}" '
            f'height="22" rx="2" fill="{first}" class="tint"/><rect x="{x:g}" y="{y + 22}" width="{width:g}" '
            f'height="3" fill="{second}"/>'
            f'<text x="{x:g}" y="{y + 16}" textLength="{width:g}">{escape(piece)}</text></g>'
        )
        column += len(piece)
    size = f"{2 * MARGIN + COLUMNS * LETTER:g} {2 * MARGIN + row * LINE + 25}"
    loop = len(ids) * SECONDS_A_TOKEN + 8
    for scheme, (paper, ink, tint) in SCHEMES.items():
        style = (
            f"text{{font:15px ui-monospace,Menlo,Consolas,monospace;fill:{ink};white-space:pre}}.tint{{opacity:{tint}}}"
            f"g{{animation:write {loop:.1f}s linear infinite backwards}}"
            "@keyframes write{0%{opacity:0}0.4%,93%{opacity:1}95%,to{opacity:0}}"
            "@media(prefers-reduced-motion:reduce){g{animation:none}}"
        )
        picture = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}"><style>{style}</style>'
        picture += f'<rect width="100%" height="100%" rx="8" fill="{paper}"/>' + "\n".join(drawn) + "</svg>\n"
        (images / f"story-{scheme}.svg").write_text(picture, encoding="utf-8")


@contextmanager
def served(run: str) -> Iterator[str]:
    """The address of a server of a run or of a shipped model."""
    command = [sys.executable, "-m", "moe_jax", "serve", "--run", run, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    try:
        ready = next(filter(None, (re.match(r"ready: (\S+)", line) for line in server.stdout)), None)
        if ready is None:
            sys.exit("error: the server did not start; try `uv run --extra serve python -m moe_jax serve`")
        yield ready[1]
    finally:
        server.terminate()
        server.wait()


def served_picture(browser: Browser, url: str, scheme: Literal["light", "dark"], out: Path) -> None:
    """The server's page: a text is written, and goes on from another token."""
    page = browser.new_page(viewport=SERVED, color_scheme=scheme, reduced_motion="reduce")
    page.goto(url)
    page.fill("#seed", "1")  # the same text in both pictures
    page.click("#suggested button")
    written(page)
    page.click("#tokens .t >> nth=15")
    page.click("#card button.other")
    written(page)
    page.mouse.move(0, 0)
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=out)
    Image.open(out).convert("RGB").quantize(SERVED_COLOURS).save(out, optimize=True)


def written(page: Page) -> None:
    """Waits for the end of the text."""
    page.wait_for_timeout(500)  # by then the button says Stop, or Write again if the text was short
    page.locator("#write", has_text="Write").wait_for()


if __name__ == "__main__":
    main()
