"""How fast a report is in headless Chromium: `python benchmarks/measure_report.py report.html`. JSON on the last line.

First contentful paint of a fresh page, and the time from a layer change to the second frame after it (so that the
first is on the screen), each the median of a few.
"""

import json
import shutil
import statistics
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

LOADS, CHANGES = 5, 20
CHANGE = """async () => {
  const slider = document.getElementById('layer'), frame = () => new Promise(requestAnimationFrame);
  await frame();
  const begin = performance.now();
  slider.value = (Number(slider.value) + 1) % (Number(slider.max) + 1);
  slider.dispatchEvent(new Event('input'));
  await frame();
  await frame();
  return performance.now() - begin;
}"""
PAINT = "() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


def main(path: Path) -> None:
    chromium = shutil.which("chromium")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        paints, changes = [], []
        for _ in range(LOADS):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(path.resolve().as_uri())
            page.wait_for_function(PAINT)
            paints.append(page.evaluate(PAINT))
            changes += [page.evaluate(CHANGE) for _ in range(CHANGES // LOADS)]
            page.close()
        browser.close()
    result = {
        "bytes": path.stat().st_size,
        "first_paint_ms": round(statistics.median(paints)),
        "layer_change_ms": round(statistics.median(changes)),
        "layer_change_worst_ms": round(max(changes)),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
