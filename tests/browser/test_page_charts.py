"""The charts of a report in a real browser: what they name, count and light."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.browser.opened import LAYERS, E, K, Opened, page_data


def test_what_experts_prefer_is_named_with_counts(opened: Opened) -> None:
    opened.draw_everything()
    cards = opened.page.locator(".specialist")
    assert cards.count() == E
    for e, entry in enumerate(opened.data["specialisation"][0]):
        named = cards.nth(e).locator(".strongest li").evaluate_all("(items) => items.map((li) => li.dataset.token)")
        assert named == [t["text"] for t in entry["tokens"]]
    first = next(e for e, entry in enumerate(opened.data["specialisation"][0]) if entry["tokens"])
    token = opened.data["specialisation"][0][first]["tokens"][0]
    cards.nth(first).locator("li").first.hover()
    tip = opened.page.locator("#tip").inner_text()
    assert f"{token['here']:,} of its {token['all']:,}" in tip
    assert f"{token['g2']}".rstrip("0").rstrip(".") in tip


def test_a_sentence_at_the_top_says_what_the_experts_specialise_in(browser: Any, written: Path, tmp_path: Path) -> None:
    """Of three planted specialists the clearest (by G^2) comes first; each kind of token is named once."""
    from moe_jax.inspection.report import render

    data = json.loads(page_data(written))
    data["text"]["loss"] = [1.0] * len(data["text"]["loss"])  # better than a guess
    for entry in (entry for layer in data["specialisation"] for entry in layer):
        entry["groups"] = []
    for layer, e, name, g2 in ((0, 1, "cats", 50.0), (1, 3, "dragons", 900.0), (1, 0, "cats", 70.0)):
        group = {
            "name": name,
            "here": 0.5,
            "all": 0.1,
            "reach": 0.625,
            "times": 5.0,
            "g2": g2,
            "tokens": [{"text": f" {name}", "here": 5, "all": 8}],
        }
        data["specialisation"][layer][e]["groups"] = [group]
    path = tmp_path / "page.html"
    path.write_text(render(data), encoding="utf-8")
    opened = Opened(browser, path)
    opened.draw_everything()
    first = opened.page.locator("header .verdict p").first
    assert first.get_attribute("id") == "specialists-said"
    said = first.inner_text().replace("\u00a0", " ")
    dragons = "expert 3 of layer 1 in dragons (“dragons”; 63 % of them choose it)"
    assert f"{dragons} and expert 0 of layer 1 in cats (“cats”; 63 % of them choose it)." in said
    assert "By chance an expert would get 50 % of each kind." in said
    assert "layer 0" not in said
    opened.page.locator("#layer").fill("1")
    opened.page.locator("#specialists").scroll_into_view_if_needed()
    opened.page.locator("#experts-explain", has_text="in layer 1").wait_for()
    assert opened.page.locator(".specialist .kind b").all_inner_texts() == ["cats:", "dragons:"]
    chips = opened.page.locator(".specialist .kind li").all_inner_texts()
    assert [chip.replace("\u00a0", " ") for chip in chips] == ["␣cats 63 %", "␣dragons 63 %"]
    opened.page.close()


CELL = """(canvas, [rows, columns, r, c]) => [...canvas.getContext('2d').getImageData(
    Math.floor((c + 0.4) * canvas.width / columns), Math.floor((r + 0.4) * canvas.height / rows), 1, 1).data]"""


def test_the_map_of_all_experts_leads_to_a_layer_and_an_expert(opened: Opened) -> None:
    opened.draw_everything()
    canvas, load = opened.page.locator("#map canvas"), opened.data["corpus"]["load"]
    shade = [canvas.evaluate(CELL, [LAYERS, E, la, e])[3] for la in range(LAYERS) for e in range(E)]
    expected = [min(1, load[la][e] * E / 2) * 255 for la in range(LAYERS) for e in range(E)]
    assert shade == pytest.approx(expected, abs=1)
    canvas.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        opened.page.keyboard.press(key)
    assert opened.page.locator("#tip").inner_text().startswith("Layer 1, expert 2: ")
    opened.page.keyboard.press("Enter")
    assert opened.page.locator("#layer").input_value() == "1"
    assert opened.page.locator('#legend [aria-pressed="true"]').inner_text() == "2"
    box = canvas.bounding_box()
    canvas.click(position={"x": 3.5 * box["width"] / E, "y": 0.5 * box["height"] / LAYERS})
    assert opened.page.locator("#layer").input_value() == "0"
    assert opened.page.locator('#legend [aria-pressed="true"]').inner_text() == "3"


def test_the_card_shows_the_path_of_a_token_through_all_layers(opened: Opened) -> None:
    """Each chosen cell has the colour of its expert, and no other cell has."""
    opened.page.locator('.t[data-i="5"]').focus()  # the pointer, were it there, would choose tokens too
    canvas = opened.page.locator("#card canvas")
    for la in range(LAYERS):
        chosen = {opened.expert(la, 5, k) for k in range(K)}
        for e in range(E):
            rgb = canvas.evaluate(CELL, [LAYERS, E, la, e])
            wanted = opened.colour(f"var(--e{e})")[4:-1].split(", ")
            near = rgb[3] > 90 and all(abs(a - int(b)) <= 3 for a, b in zip(rgb[:3], wanted, strict=True))
            assert near == (e in chosen), (la, e, rgb)
    canvas.focus()
    opened.page.keyboard.press("ArrowDown")
    assert opened.page.locator("#tip").inner_text().startswith(f"Layer 1, expert {opened.expert(0, 5)}: probability 0.")
    opened.page.keyboard.press("Enter")
    assert opened.page.locator("#layer").input_value() == "1"
    assert opened.page.evaluate("document.activeElement.closest('#card') !== null")
