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
        "#map canvas",
        "#together canvas",
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
    opened = Opened(browser, twenty_experts(written, tmp_path), color_scheme=scheme)
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


def twenty_experts(written: Path, folder: Path) -> Path:
    """The report as of a model with twenty experts; its last sections are empty."""
    data = json.loads(page_data(written))
    count, data["model"]["experts"], data["corpus"] = data["model"]["experts"], 20, None
    n = len(data["text"]["pieces"])
    for layer in range(LAYERS):
        data["routing"]["expert"][layer] = [(i // K + 7 * (i % K)) % 20 for i in range(n * K)]
        data["routing"]["prob"][layer] = [500] * (20 * n)
    assert count == E
    data["ablation"] = None
    data["training"] |= {"step": [], "traces": {"step": []}}
    path = folder / "page.html"
    path.write_text(render(data), encoding="utf-8")
    return path


def test_on_a_phone_all_chips_and_all_layers_are_reached(browser: Any, written: Path, tmp_path: Path) -> None:
    """Of twenty experts and of twelve layers: each is under the finger after a scroll of its own box."""
    phone = {"viewport": {"width": 390, "height": 800}}
    opened = Opened(browser, twenty_experts(written, tmp_path), **phone)
    seen = """(node) => { node.scrollIntoView({ block: 'center', inline: 'end', behavior: 'instant' });
        const box = node.getBoundingClientRect(), x = (box.left + box.right) / 2, y = (box.top + box.bottom) / 2;
        return box.left >= 0 && box.right <= innerWidth && document.elementFromPoint(x, y) === node; }"""
    assert opened.page.locator("#legend button").evaluate_all(f"(all) => all.map({seen})") == [True] * 20
    assert opened.page.locator("#legend").evaluate("(box) => getComputedStyle(box).overflowX") == "auto"
    opened.page.close()
    data = json.loads(page_data(written))
    data["model"]["layers"] = 6 * LAYERS
    for part in (data["routing"], data["corpus"], data["attention"]):
        part |= {name: 6 * value for name, value in part.items() if isinstance(value, list) and len(value) == LAYERS}
    data["corpus"]["flow"] *= 6 * LAYERS - 1
    data |= {"ablation": None, "specialisation": 6 * data["specialisation"]}
    data["training"] |= {"step": [], "traces": {"step": []}}
    path = tmp_path / "deep.html"
    path.write_text(render(data), encoding="utf-8")
    for source, layers in ((path, 6 * LAYERS), (written, LAYERS)):
        opened = Opened(browser, source, **phone)
        opened.page.locator("#flow").scroll_into_view_if_needed()
        opened.page.locator("#flow-figure svg").wait_for()
        names = opened.page.locator("#flow-figure text.strong")
        assert names.evaluate_all(f"(all) => all.map({seen})") == [True] * layers
        scroll = "(box) => [box.scrollWidth, box.clientWidth, getComputedStyle(box).overflowX]"
        box = opened.page.locator("#flow-figure .scroll").evaluate(scroll)
        assert box[2] == "auto"
        assert layers > LAYERS or box[0] == box[1]  # few layers need no scrolling
        opened.page.close()


def test_on_a_phone_the_card_leaves_the_token_in_view_and_the_other_sections_free(browser: Any, written: Path) -> None:
    opened = Opened(browser, written, viewport={"width": 390, "height": 500}, reduced_motion="reduce")
    opened.draw_everything()
    place = "(node) => { const box = node.getBoundingClientRect(); return [box.top, box.bottom]; }"
    opened.page.locator("#tokens").evaluate("(box) => box.scrollIntoView({ block: 'end', behavior: 'instant' })")
    token = opened.page.locator("#tokens .t").last
    token.click()
    opened.page.wait_for_timeout(300)
    card, (top, bottom) = opened.page.locator("#card"), token.evaluate(place)
    assert opened.page.locator("#bar").evaluate(place)[1] < top < bottom <= card.evaluate(place)[0] < 500
    for name in ("experts", "flow", "own"):
        opened.page.locator(f"#{name}").evaluate("(node) => node.scrollIntoView({ behavior: 'instant' })")
        assert card.evaluate(place)[1] <= opened.page.locator(f"#{name}").evaluate(place)[0]
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
    assert opened.said == []
    opened.page.close()
