"""Make the pictures of README and docs from a real run: `uv run --group browser --extra plots docs/pictures.py`.

    docs/images/text-light.png, text-dark.png        the routing report: the text, at 1280 pixels
    docs/images/off-light.png, off-dark.png          the routing report: an expert switched off
    docs/images/overview.png                         the curves of the run
    docs/report-nano.html                            the routing report itself

Needs a trained run (`uv run train.py`) and Debian's `chromium`, or another Chromium on the PATH.
"""

import argparse
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
WIDTH = 1280
SECTIONS = {"text": 720, "ablation": 1120}
"""Section of the page -> pixels of it that the picture shows."""
PRESSED = {"text": "#tokens .t:has-text('Kate') >> nth=0", "ablation": "#off-grid [data-layer='0'][data-expert='5']"}
"""What is pressed in each section: a token, and the expert that is switched off."""
NAMES = {"text": "text", "ablation": "off"}


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
    shutil.copy(report / "overview.png", images / "overview.png")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": WIDTH, "height": 800}, color_scheme=scheme)
            page.goto((report / "routing.html").resolve().as_uri())
            for section, height in SECTIONS.items():
                page.set_viewport_size({"width": WIDTH, "height": height})
                page.click(f"#bar a[href='#{section}']")  # a link draws all that is above its section
                page.click(PRESSED[section])
                page.wait_for_timeout(1000)
                page.evaluate(
                    f"scrollBy(0, document.getElementById('{section}-title').getBoundingClientRect().top - 110)"
                )
                page.wait_for_timeout(300)
                page.screenshot(path=images / f"{NAMES[section]}-{scheme}.png")
        browser.close()


if __name__ == "__main__":
    main()
