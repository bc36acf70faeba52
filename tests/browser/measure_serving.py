"""How fast the server's page is in headless Chromium: `python -m tests.browser.measure_serving`. JSON on the last line.

A server without a model writes 2,000 tokens on the page, one in an event and all in one event. Then the layer is
changed. Of the tasks of the page's main thread the longest is given, in milliseconds on the clock, and in milliseconds
of the processor, which other programs do not lengthen; and how many lasted more than 50 ms on the clock.
"""

import json
import shutil
from collections.abc import Callable
from typing import Any

from playwright.sync_api import sync_playwright

from tests.browser.served import Served
from tests.support.stand_in_server import StandIn, stand_in

TOKENS = 2000
WATCH = """() => {
    const seen = new MutationObserver(() => {
        if (!document.querySelector('#tokens .t:not(.given)')) return;
        seen.disconnect();
        requestAnimationFrame(() => setTimeout(() => { window.painted = performance.timeOrigin + performance.now(); }));
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


def measured(browser: Any, says: StandIn, burst: int) -> dict[str, Any]:
    """One text of TOKENS tokens, `burst` of them in an event."""
    says.burst = burst
    served = Served(browser, says).ready()
    served.page.evaluate(WATCH)
    written = tasks(browser, served.page, lambda: served.write(length=TOKENS))
    painted = served.page.evaluate("window.painted") - 1000 * says.first_sent
    changed = tasks(browser, served.page, lambda: served.page.locator("#layer").fill("1"))
    result = {
        "written": written | {"first_token_painted_after_ms": round(painted)},
        "layer_changed": changed | {"ms_to_second_frame": round(served.page.evaluate(CHANGE))},
    }
    served.page.close()
    return result


def main() -> None:
    with sync_playwright() as play, stand_in() as says:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        print(json.dumps({f"{burst}_in_an_event": measured(browser, says, burst) for burst in (TOKENS, 1)}))
        browser.close()


if __name__ == "__main__":
    main()
