"""Make the pictures of README and docs from a real run: `uv run --group browser --extra plots docs/pictures.py`.

    docs/images/report-light.png, report-dark.png    the routing report at 1280 pixels
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
WIDTH, HEIGHT = 1280, 800


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
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme)
            page.goto((report / "routing.html").resolve().as_uri())
            page.wait_for_timeout(500)
            page.screenshot(path=images / f"report-{scheme}.png")
        browser.close()


if __name__ == "__main__":
    main()
