"""How fast the server's page is in headless Chromium: `python -m benchmarks.measure_page`. JSON on the last line.

Three servers write 2,000 tokens on the page. Two have no model: one sends all tokens in one event, the other sends one
in an event, as fast as it can. The third is the real server with a tiny model. Then the layer is changed.

The first token is painted when the browser says so (Element Timing), counted from when the server sent it, or the
engine had it. Of the tasks of the page's main thread the longest is given, in milliseconds on the clock, and in
milliseconds of the processor, which other programs do not lengthen; and how many lasted more than 50 ms on the clock.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from tests.browser.served import Real, Served
from tests.serving.site import Site, site
from tests.support.stand_in_server import StandIn, stand_in

TOKENS = 2000
WATCH = """() => {
    new PerformanceObserver((list) => { window.painted = performance.timeOrigin + list.getEntries()[0].renderTime; })
        .observe({ type: 'element' });
    const seen = new MutationObserver(() => {
        const token = document.querySelector('#tokens .t:not(.given)');
        if (!token) return;
        seen.disconnect();
        token.setAttribute('elementtiming', 'first');
    });
    seen.observe(document.getElementById('tokens'), { childList: true, subtree: true });
}"""
CHANGE = """async () => {
    const slider = document.getElementById('layer'), frame = () => new Promise(requestAnimationFrame);
    await frame();
    const begin = performance.now();
    slider.value = 2;
    slider.dispatchEvent(new Event('input'));
    await frame();
    await frame();
    return performance.now() - begin;
}"""


def tasks(browser: Any, page: Any, act: Callable[[], object]) -> dict[str, float]:
    """What the page's main thread did during `act` and half a second after it."""
    browser.start_tracing(page=page, categories=["toplevel"])
    act()
    page.wait_for_timeout(500)
    events = json.loads(browser.stop_tracing())["traceEvents"]
    names = [e for e in events if e["name"] == "thread_name" and e["args"]["name"] == "CrRendererMain"]
    main = {(e["pid"], e["tid"]) for e in names}
    ran = [e for e in events if (e["pid"], e["tid"]) in main and e["name"].endswith("RunTask") and "dur" in e]
    return {
        "longest_task_ms": round(max(e["dur"] for e in ran) / 1000),
        "longest_task_processor_ms": round(max(e.get("tdur", 0) for e in ran) / 1000),
        "tasks_over_50_ms": sum(e["dur"] > 50_000 for e in ran),
    }


def measured(browser: Any, page: Any, write: Callable[[], object], first_sent: Callable[[], float]) -> dict[str, Any]:
    """One text of TOKENS tokens. `first_sent` says when the first of them was sent, in seconds since 1970."""
    page.evaluate(WATCH)
    written = tasks(browser, page, write)
    painted = page.evaluate("window.painted") - 1000 * first_sent()
    changed = tasks(browser, page, lambda: page.locator("#layer").fill("1"))
    result = {
        "written": written | {"first_token_painted_after_ms": round(painted)},
        "layer_changed": changed | {"ms_to_second_frame": round(page.evaluate(CHANGE))},
    }
    page.close()
    return result


def without_a_model(browser: Any, says: StandIn, burst: int) -> dict[str, Any]:
    """`burst` tokens in an event."""
    says.burst = burst
    served = Served(browser, says).ready()
    return measured(browser, served.page, lambda: served.write(length=TOKENS), lambda: says.first_sent)


def real(browser: Any, api: Site) -> dict[str, Any]:
    """Counted from when the engine hands over the first token that it has drawn."""
    sent, deliver = [], api.engine._deliver

    def timed(news: Any) -> None:
        if any(event.pieces for _, event in news):
            sent.append(time.time())
        deliver(news)

    api.engine._deliver = timed
    page = Real(browser, api.port)
    return measured(browser, page.page, lambda: page.write("Once upon a time", TOKENS), lambda: sent[0])


def main() -> None:
    with sync_playwright() as play, stand_in() as says, tempfile.TemporaryDirectory() as folder:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        found = {f"{burst}_in_an_event": without_a_model(browser, says, burst) for burst in (TOKENS, 1)}
        with site(Path(folder)) as api:
            found["a_real_server"] = real(browser, api)
        print(json.dumps(found))
        browser.close()


if __name__ == "__main__":
    main()
