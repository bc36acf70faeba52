"""The server's page as a whole: keyboard, contrast, phone width, motion, long texts, conversations, failures."""

from typing import Any

import pytest

from tests.browser.contrast import CONTRAST
from tests.browser.served import Served
from tests.support.stand_in_server import MODEL, StandIn

WRITTEN = [" there", " was", " a", " dragon", ".", " It", " had", " 7", " hats"]


def focused(page: Any) -> str:
    """The element with the focus: its id, or the number of a chip, or its class."""
    return page.evaluate("(({id, dataset, className}) => id || dataset.i || className)(document.activeElement)")


def test_the_keyboard_reaches_everything_in_the_order_of_the_page(served: Served) -> None:
    """A group is one stop. Arrow keys move within it, Enter goes from a token to its card, Escape comes back."""
    page = served.page
    page.locator("#prompt").focus()
    page.keyboard.type("Once")
    page.locator("#length").fill("9")
    page.locator("#prompt").press("Enter")
    served.finished()
    page.locator("#prompt").focus()
    order = []
    for _ in range(16):
        page.keyboard.press("Tab")
        order.append(focused(page))
    suggested = [""] * len(MODEL["prompts"])
    own = ["go-on", "again", "fresh", "copy", "temperature", "length", "seed", "layer", "", "colour", "numbers", "save"]
    assert order == ["write", *suggested, *own]
    page.keyboard.press("Tab")
    assert focused(page) == "0"
    for key, at in (("ArrowRight", "1"), ("End", "9"), ("ArrowRight", "9"), ("ArrowLeft", "8"), ("Home", "0")):
        page.keyboard.press(key)
        assert focused(page) == at, key
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert focused(page) == "other"
    page.keyboard.press("Escape")
    assert focused(page) == "1"
    page.keyboard.press("ArrowRight")
    assert page.locator("#card h3").inner_text() == "was"
    assert page.locator('#tokens [tabindex="0"]').count() == page.locator('#loads [tabindex="0"]').count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_its_ground(browser: Any, says: StandIn, scheme: str) -> None:
    """WCAG 2.2 AA, 4.5 to 1: empty, with a text, a card, an expert lit, a former text, and an error; 20 experts."""
    says.model = MODEL | {"experts": 20}
    served = Served(browser, says, color_scheme=scheme, reduced_motion="reduce").ready()
    assert served.page.evaluate(CONTRAST) == []
    served.page.locator("#key-row").evaluate("(row) => { row.hidden = false; }")
    served.write(length=60)
    served.page.locator('.t[data-i="12"]').click()
    served.press("#card button.other >> nth=0")
    assert served.page.evaluate(CONTRAST) == []
    for e in (0, 3, 5, 7, 15):
        served.page.locator("#loads button").nth(e).click()
        assert served.page.evaluate(CONTRAST) == []
    served.page.locator("#colour").select_option("surprise")
    says.refuse = (503, "the queue is full")
    served.page.locator("#write").click()
    served.page.locator("#error").wait_for()
    assert served.page.evaluate(CONTRAST) == []
    served.page.locator("#theme").click()
    assert served.page.evaluate(CONTRAST) == []
    served.page.close()


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_window(browser: Any, says: StandIn, width: int) -> None:
    """With a word without end, a card, a former text, and sixteen experts."""
    says.writes = [" a", " W" + "o" * 90 + "rd", " kite", "."]
    says.model = MODEL | {"experts": 16}
    served = Served(browser, says, viewport={"width": width, "height": 850}).ready()
    assert served.page.evaluate("document.documentElement.scrollWidth") == width
    served.write(length=30)
    served.page.locator('.t[data-i="5"]').evaluate("(chip) => chip.click()")
    assert served.page.evaluate("document.documentElement.scrollWidth") == width
    served.page.locator("#card button.other").first.click()
    served.finished()
    assert served.page.evaluate("document.documentElement.scrollWidth") == width
    text = served.page.locator("#tokens").evaluate("(box) => [box.scrollWidth, box.clientWidth]")
    assert text[0] <= text[1] + 1
    assert served.page.locator("#loads").evaluate("(box) => box.scrollWidth - box.clientWidth") == 0
    served.page.close()


def test_a_conversation(browser: Any, says: StandIn) -> None:
    """Messages go out as they were said and written; an answer can be gone on from; a new one begins empty."""
    says.model = MODEL | {"chat": True}
    served = Served(browser, says).ready().write("Tell me of <b>dragons</b>")
    answer = "".join(WRITTEN)
    assert says.asked[-1][0] == "/v1/chat/completions"
    assert says.asked[-1][1]["messages"] == [{"role": "user", "content": "Tell me of <b>dragons</b>"}]
    assert served.page.locator(".said").all_inner_texts() == ["Tell me of <b>dragons</b>"]
    ids = [says.id_of(piece) for piece in WRITTEN]
    served.assert_coloured(0, [*ids[:-1], None])
    served.page.locator("#system").fill(" Be brief. ")
    served.write("And then?")
    assert says.asked[-1][1]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert says.asked[-1][1]["messages"][2:] == [
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And then?"},
    ]
    served.page.locator('.t[data-i="2"]').click()  # in the first answer
    served.press("#card button.other[data-id='4'] >> nth=0")
    assert says.asked[-1][0] == "/v1/completions"
    assert says.asked[-1][1]["prompt"] == [0, says.id_of("[user]Tell me of <b>dragons</b>"), *ids[:2], 4]
    assert served.page.locator(".said").count() == 1
    assert served.page.locator(".turn.assistant").inner_text().split("\n")[-1].startswith("there was kite there was a")
    served.page.locator("#edit").click()
    assert served.page.locator("#prompt").input_value() == "Tell me of <b>dragons</b>"
    served.write("Tell me of cats")
    assert served.page.locator(".said").all_inner_texts() == ["Tell me of cats"]
    served.page.locator("#fresh").click()
    assert served.page.locator("#tokens > *").count() == 0
    served.page.locator("#former button").nth(1).click()
    served.page.locator(".said", has_text="dragons").wait_for()
    served.page.close()
