"""A report as a whole in a real browser: nothing is loaded or fails, all of it is legible, on paper too."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_jax.inspection.report import render, write_report
from tests.browser.contrast import CONTRAST
from tests.browser.opened import LAYERS, E, K, Opened, page_data
from tests.support import saved_run


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_nothing_is_loaded_nothing_fails_nothing_overflows(
    browser: Any, written: Path, width: int, scheme: str
) -> None:
    opened = Opened(browser, written, viewport={"width": width, "height": 800}, color_scheme=scheme)
    opened.draw_everything()
    for control in ("doubt", "surprise", "expert"):
        opened.page.locator("#colour").select_option(control)
    opened.page.locator("#theme").click()
    opened.page.locator("#barcode").click()
    opened.draw_everything()
    assert opened.said == []
    assert opened.asked == [written.as_uri()]
    body = opened.page.locator("body").inner_text()
    for wrong in ("NaN", "undefined", "null", "Infinity", "[object"):
        assert wrong not in body
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    for figure in (
        "#load svg",
        "#together svg",
        "#flow-figure svg",
        "#slots svg",
        "#factors svg",
        "#off-grid .cell",
        "#off-tokens .o",
        "#off-stories .story",
        "#training-figures svg",
        "#training-figures canvas",
        "#heads canvas",
    ):
        assert opened.page.locator(figure).count() > 0, figure
    opened.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_its_ground(browser: Any, written: Path, tmp_path: Path, scheme: str) -> None:
    """WCAG 2.2 AA, 4.5 to 1: for twenty experts, as the page is, with a token chosen, and with an expert lit."""

    data = json.loads(page_data(written))
    count, data["model"]["experts"], data["corpus"] = data["model"]["experts"], 20, None
    n = len(data["text"]["pieces"])
    for layer in range(LAYERS):
        data["routing"]["expert"][layer] = [(i // K + 7 * (i % K)) % 20 for i in range(n * K)]
        data["routing"]["prob"][layer] = [0.05] * (20 * n)
    assert count == E
    data["ablation"] = None
    data["training"] |= {"step": [], "traces": {"step": []}}
    path = tmp_path / "page.html"
    path.write_text(render(data), encoding="utf-8")
    opened = Opened(browser, path, color_scheme=scheme)
    assert opened.page.evaluate(CONTRAST) == []
    opened.page.locator('.t[data-i="5"]').click()
    for e in (0, 5, 11, 17):
        opened.page.locator(f'#legend button[data-expert="{e}"]').click()
        assert opened.page.evaluate(CONTRAST) == []
    opened.page.close()
    opened = Opened(browser, written, color_scheme=scheme)  # the other sections, as they are
    opened.draw_everything()
    assert opened.page.evaluate(CONTRAST) == []
    opened.page.close()


def test_on_paper_everything_is_there(browser: Any, written: Path) -> None:
    opened = Opened(browser, written)
    opened.page.emulate_media(media="print")
    opened.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    for name in ("#controls", "#counts"):  # what a reader of paper cannot use
        assert not opened.page.locator(name).first.is_visible(), name
    for name in ("#load svg", "#flow-figure svg", "#slots svg", "#training-figures svg", "#off-stories .story"):
        assert opened.page.locator(name).first.is_visible(), name
    for heading in ("h2", "h3", "figcaption", ".explain"):  # no heading is left at the foot of a page
        after = "(nodes) => nodes.map((n) => getComputedStyle(n).breakAfter)"
        assert set(opened.page.locator(f"main {heading}").evaluate_all(after)) == {"avoid"}, heading
    box = opened.page.locator("#tokens").evaluate("(box) => [box.scrollHeight, box.clientHeight]")
    assert box[0] <= box[1] + 1
    opened.page.close()


@pytest.mark.parametrize("dispatch", ["capacity", "blocks"])
def test_a_page_speaks_of_slots_and_drops_only_where_there_is_a_capacity(
    browser: Any, tmp_path: Path, dispatch: str
) -> None:
    """Everywhere alike: at the top, in the table of the layers and in the pictures."""
    folder = saved_run.save_run(tmp_path, dispatch=dispatch, capacity_factor=1.2)
    opened = Opened(browser, write_report(folder, folder / "page.html", text="a cat and a dragon"))
    opened.draw_everything()
    limited = dispatch == "capacity"
    text = lambda name: opened.page.locator(name).inner_text().replace("\u00a0", " ")  # noqa: E731
    dropped = opened.page.locator("#entropy tbody td:nth-child(3)").all_inner_texts()
    assert [cell != "0.00\u00a0%" for cell in dropped] == [limited] * LAYERS
    assert ("this dispatch has no capacity" in text("#facts")) == (not limited)
    assert ("slots that an expert has in training" in text("#facts")) == limited
    assert ("what found no room" in text("#lead")) == limited
    assert ("capacity line" in text("#load")) == limited
    assert ("this run: 1.2" in opened.page.locator("#factors").text_content()) == limited
    assert ("find an expert full" in text("#positions")) == limited
    assert opened.said == []
    opened.page.close()
