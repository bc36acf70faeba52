"""Switching an expert off, in a real browser: the grid, the text, the worst tokens, and the two stories."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.browser.opened import LAYERS, E, Opened, page_data


@pytest.fixture
def ablated(browser: Any, written: Path, tmp_path: Path) -> Any:
    """The report, but what expert 2 of layer 1 is good for is planted: one token, and the second word of the story."""
    from moe_jax.inspection.report import render

    data = json.loads(page_data(written))
    found = data["ablation"]
    for layer in range(LAYERS):
        found["change"][layer] = [[0] * len(found["loss"]) for _ in range(E)]
        found["stories"][layer] = [found["story"]] * E
    found |= {"mean": [[0.0] * E for _ in range(LAYERS)], "story": "red hat", "prompt": "a "}
    found["stories"] = [["red hat"] * E for _ in range(LAYERS)]
    found["stories"][1][2] = "red shoe, blue hat"
    found["loss"][20], found["change"][1][2][20], found["change"][1][2][40] = 69, 161, -50
    found["mean"][1][2] = 0.25
    data["text"]["loss"] = [1.0] * len(data["text"]["loss"])  # better than a guess
    path = tmp_path / "page.html"
    path.write_text(render(data), encoding="utf-8")
    opened = Opened(browser, path)
    opened.draw_everything()
    yield opened
    opened.page.close()


def text(opened: Opened, name: str) -> str:
    return opened.page.locator(name).inner_text().replace("\u00a0", " ")


def press(opened: Opened, layer: int, expert: int) -> None:
    opened.page.locator(f'.cell[data-layer="{layer}"][data-expert="{expert}"]').click()
    opened.page.locator("#off-title", has_text=f"Layer {layer} without expert {expert}").wait_for()


def test_the_page_begins_with_the_expert_that_is_missed_most(ablated: Opened) -> None:
    said, data = text(ablated, "#off-said"), ablated.data["ablation"]
    mean = sum(data["loss"]) / 100 / len(data["loss"])
    rise = f"The text misses expert 2 of layer 1 most: without it the loss rises by {25 / mean:.1f} %."
    assert rise in said
    assert "whose chance falls from 50 % to 10 %" in said
    assert f"Of the {LAYERS * E} experts, 1 change" in said
    assert rise in text(ablated, "#found")
    assert text(ablated, "#off-title") == "Layer 1 without expert 2"
    assert "".join(ablated.page.locator("#off-stories .after .parted").all_inner_texts()) == "shoe, blue "
    assert ablated.page.locator('.cell[aria-pressed="true"]').inner_text() == "+0.250"


def test_cells_arrows_and_the_slider_choose_the_expert(ablated: Opened) -> None:
    press(ablated, 0, 1)
    assert ablated.page.locator("#layer").input_value() == "0"
    ablated.page.locator('.cell[aria-pressed="true"]').focus()
    for key, at in (("ArrowDown", ("1", "1")), ("ArrowRight", ("1", "2")), ("ArrowUp", ("0", "2"))):
        ablated.page.keyboard.press(key)
        focus = "[document.activeElement.dataset.layer, document.activeElement.dataset.expert]"
        assert tuple(ablated.page.evaluate(focus)) == at
    ablated.page.keyboard.press("Enter")
    ablated.page.locator("#off-title", has_text="Layer 0 without expert 2").wait_for()
    ablated.page.locator("#layer").fill("1")
    ablated.page.locator("#ablation").scroll_into_view_if_needed()
    ablated.page.locator("#off-title", has_text="Layer 1 without expert 2").wait_for()
    assert ablated.page.locator('.cell[aria-pressed="true"]').count() == 1
    assert ablated.said == []


def test_the_numbers_are_those_of_the_data(opened: Opened) -> None:
    """The page as `inspect` wrote it, of random parameters."""
    opened.draw_everything()
    data = opened.data["ablation"]
    for layer in range(LAYERS):
        for e in range(E):
            shown = opened.page.locator(f'.cell[data-layer="{layer}"][data-expert="{e}"]').inner_text()
            assert float(shown.replace("−", "-")) == pytest.approx(data["mean"][layer][e], abs=0.00051)
    press(opened, 1, 0)
    change = data["change"][1][0]
    worst = sorted((i for i in range(len(change)) if change[i] > 5), key=lambda i: -change[i])[:6]
    falls = [s.replace("\u00a0", " ") for s in opened.page.locator("#off-worst .fall b").all_inner_texts()]
    assert len(falls) == len(worst)
    for fall, i in zip(falls, worst, strict=True):
        expected = 100 * math.exp(-(data["loss"][i] + change[i]) / 100)
        assert float(fall.removesuffix(" %")) == pytest.approx(expected, abs=0.51 if expected >= 9.95 else 0.051)
    assert opened.said == []
