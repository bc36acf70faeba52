"""Make the pictures of README and docs from a real run.

    uv run --group browser --extra plots --extra serve docs/pictures.py

It writes

    docs/images/text-light.png, text-dark.png        the routing report: the text, at 1280 pixels
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
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

HERE = Path(__file__).parent
WIDTH = 1280
SECTIONS = {"text": 720, "ablation": 1120}
"""Section of the page -> pixels of it that the picture shows."""
PRESSED = {"text": "#tokens .t:has-text('Kate') >> nth=0", "ablation": "#off-grid [data-layer='0'][data-expert='5']"}
"""What is pressed in each section: a token, and the expert that is switched off."""
NAMES = {"text": "text", "ablation": "off"}
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
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with served("stories") as url:
            for scheme in ("light", "dark"):
                report_pictures(browser, report / "routing.html", scheme, images)
                served_picture(browser, url, scheme, images / f"serve-{scheme}.png")
        browser.close()


def report_pictures(browser: Browser, report: Path, scheme: Literal["light", "dark"], images: Path) -> None:
    """Pictures of sections of the routing report."""
    page = browser.new_page(viewport={"width": WIDTH, "height": 800}, color_scheme=scheme)
    page.goto(report.resolve().as_uri())
    for section, height in SECTIONS.items():
        page.set_viewport_size({"width": WIDTH, "height": height})
        page.click(f"#bar a[href='#{section}']")  # a link draws all that is above its section
        page.click(PRESSED[section])
        page.wait_for_timeout(1000)
        page.evaluate(f"scrollBy(0, document.getElementById('{section}-title').getBoundingClientRect().top - 110)")
        page.wait_for_timeout(300)
        page.screenshot(path=images / f"{NAMES[section]}-{scheme}.png")


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
