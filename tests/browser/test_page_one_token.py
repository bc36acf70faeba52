"""The page "one token, forward and back", in a browser: it shows the numbers of its states, and why a 0 is one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from book import one_token


@pytest.fixture(scope="module")
def numbers() -> dict[str, Any]:
    return one_token.states(tokens=(3, 4))


@pytest.fixture
def page(browser: Any, numbers: dict[str, Any], tmp_path: Path) -> Iterator[Any]:
    html = "<!doctype html><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
    (tmp_path / "page.html").write_text(html + one_token.fragment(numbers), encoding="utf-8")
    page = browser.new_page(viewport={"width": 420, "height": 900})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((tmp_path / "page.html").as_uri())
    yield page
    page.close()
    assert errors == []


def column(page: Any, name: str) -> list[float]:
    texts = page.locator(f"td[data-gradient={name}]").all_inner_texts()
    return [float(text.replace("−", "-")) for text in texts]


def rounded(state: dict[str, Any], name: str) -> list[float]:
    return [round(row[name], 3) for row in state["rows"]]


def test_each_choice_shows_its_state(page: Any, numbers: dict[str, Any]) -> None:
    for word, token in (("the", 3), ("dog", 4)):
        page.get_by_role("group", name="The word to follow").get_by_role("button", name=word).last.click()
        for (top_k, k), (room, r), (balance, b) in (
            (("one", 1), ("half", 0.5), ("on", 0.5)),
            (("two", 2), ("plenty", 2.0), ("off", 0.0)),
        ):
            page.get_by_role("group", name="experts a word").get_by_label(top_k).check()
            page.get_by_role("group", name="room in the experts").get_by_label(room).check()
            page.get_by_role("group", name="balance loss").get_by_label(balance).check()
            state = numbers["states"][f"{token}/{k}/{r}/{b}"]
            for name in ("d_router", "d_logit", "d_balance", "d_gate", "d_weights", "d_answer"):
                assert column(page, name) == pytest.approx(rounded(state, name), abs=1.001e-3), (word, top_k, name)
            assert page.locator("td.fate").all_inner_texts() == [row["fate"] for row in state["rows"]]
            zeros = sum(row[name] == 0 for row in state["rows"] for name in row if name.startswith("d_"))
            assert page.locator("td.zero button").count() == zeros


def test_a_zero_says_why(page: Any, numbers: dict[str, Any]) -> None:
    rows = numbers["states"]["3/2/0.5/0.0"]["rows"]
    expert = next(row["expert"] for row in rows if row["fate"] == "no room")
    page.locator("td[data-gradient=d_weights] button").first.wait_for()
    page.locator("table.back tr").nth(expert + 1).locator("td[data-gradient=d_weights] button").click()
    assert page.locator(".why").inner_text() == f"Expert {expert}: {rows[expert]['why']['d_weights']}"


def test_a_phone_does_not_scroll_sideways(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
