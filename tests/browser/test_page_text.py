"""The text of a report in a real browser: how its tokens are coloured, shown and walked, in any writing."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.browser.opened import HOSTILE, E, K, Opened, page_data


def assert_coloured_by(opened: Opened, layer: int) -> None:
    """Fill and line of every token are those of its first and second choice, hatched and dotted where dropped."""
    tint = float(opened.page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--tint')")[:-1])
    fills = [
        opened.colour(f"var(--e{e})").replace("rgb(", "rgba(").replace(")", f", {tint / 100:g})") for e in range(E)
    ]
    lines = [opened.colour(f"var(--e{e})") for e in range(E)]
    assert len(set(fills)) == len(set(lines)) == E
    keep = opened.data["routing"]["keep"][layer]
    tokens = opened.tokens()
    assert len(tokens) == len(opened.data["text"]["pieces"])
    for i, token in enumerate(tokens):
        if keep[i * K]:
            assert (token["fill"], token["hatch"]) == (fills[opened.expert(layer, i)], "none"), i
        else:
            assert "repeating-linear-gradient" in token["hatch"], i
        assert token["line"] == lines[opened.expert(layer, i, 1)], i
        classes = token["classes"].split()
        assert ("db" in classes) == (not keep[i * K + 1])
        assert ("gone" in classes) == (not keep[i * K] and not keep[i * K + 1])
    assert 0 < sum(keep) < len(keep), "the case has drops and choices that were kept"


def test_the_slider_and_the_keys_change_the_layer(opened: Opened) -> None:
    opened.page.locator("#layer").focus()
    opened.page.keyboard.press("ArrowRight")
    assert_coloured_by(opened, 1)
    opened.page.keyboard.press("[")
    assert_coloured_by(opened, 0)
    assert opened.page.locator("#layer").input_value() == "0"
    opened.page.keyboard.press("[")  # there is none before
    assert_coloured_by(opened, 0)


@pytest.mark.parametrize(("layer", "reach"), [(0, "hover"), (1, "focus")])
def test_hover_and_focus_show_gates_slots_and_the_reason_of_a_drop(opened: Opened, layer: int, reach: str) -> None:
    opened.page.locator("#layer").fill(str(layer))
    routing, capacity = opened.data["routing"], opened.data["model"]["capacity"]
    keep = routing["keep"][layer]
    kept = next(i for i in range(len(keep) // K) if keep[i * K])
    dropped = next(i for i in range(len(keep) // K) if not keep[i * K])
    for i in (kept, dropped):
        getattr(opened.page.locator(f'.t[data-i="{i}"]'), reach)()
        shown = opened.page.locator("#card").inner_text()
        for k in range(K):
            at = i * K + k
            assert f"Expert {routing['expert'][layer][at]}" in shown
            assert f"gate {routing['gate'][layer][at]:.3f}" in shown
            slot = routing["slot"][layer][at] + 1
            assert (f"slot {slot} of {capacity}" in shown) == bool(keep[at])
            if not keep[at]:
                assert f"dropped: it came {slot}th" in shown
        for e in range(E):
            assert f"{routing['prob'][layer][i * E + e] / 10_000:.3f}" in shown


def test_the_card_lists_the_likeliest_next_tokens(opened: Opened) -> None:
    following = opened.data["text"]["next"]
    opened.page.locator('.t[data-i="5"]').click()
    shown = opened.page.locator("#card .next > span:nth-child(3n + 1)").all_inner_texts()
    chances = opened.page.locator("#card .next > span:nth-child(3n)").all_inner_texts()
    width = following["width"]
    assert width == len(shown) == 5
    at = slice(5 * width, 6 * width)
    assert [s.replace("␣", " ") for s in shown] == [following["words"][n] for n in following["index"][at]]
    assert chances == [f"{p / 10:.1f}\u00a0%" for p in following["permille"][at]]
    last = len(opened.data["text"]["pieces"]) - 1
    opened.page.locator(f'.t[data-i="{last}"]').click()
    assert opened.page.locator("#card .next > *").count() == 0


def test_text_is_text(opened: Opened) -> None:
    """Markup and scripts are shown and not run; bytes of cut characters and signs that would turn the line round are
    spelled out; every paragraph of Hebrew letters would run to the left."""
    opened.draw_everything()
    page = opened.page
    assert page.evaluate("window.ran") is None
    assert page.locator("main img, main script, main iframe").count() == 0
    shown = [t["text"] for t in opened.tokens()]
    for piece, text in zip(opened.data["text"]["pieces"], shown, strict=True):
        assert text == (piece if piece == " " else piece.strip(" ").replace("\n", "↵"))
    assert "".join(shown[1 : len(HOSTILE)]) == HOSTILE.strip()
    assert "<F0><9F><90><89>" in "".join(shown)
    # Even a script that finds its way into the page is refused by its policy.
    page.evaluate("""() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1';
        document.body.append(s); }""")
    assert page.evaluate("window.ran") is None


def test_whole_characters_of_any_writing(browser: Any, written: Path, tmp_path: Path) -> None:
    """With a tokenizer whose entries are words, Hebrew runs to the left and an override is spelled out."""
    data = json.loads(page_data(written))
    hostile = "</script><script>window.ran=1</script><img src=x onerror=window.ran=1>"
    pieces = ["<|endoftext|>", " שלום", " עולם", "\n", " a", "\u202e", "\U0001f409", hostile]
    data["text"]["pieces"][: len(pieces)] = pieces
    data["text"]["mark"] = [0]
    from moe_jax.inspection.report import render

    path = tmp_path / "page.html"
    path.write_text(render(data), encoding="utf-8")
    opened = Opened(browser, path)
    assert [t["text"] for t in opened.tokens()][1:8] == ["שלום", "עולם", "↵", "a", "⟨202E⟩", "\U0001f409", hostile]
    assert opened.page.evaluate("window.ran") is None
    # The separator is Latin, but the first letters of what follows decide: it is spelled, not text.
    assert opened.page.locator(".tokens p").first.get_attribute("dir") == "rtl"
    assert opened.page.locator(".tokens p").nth(1).get_attribute("dir") == "ltr"
    opened.page.close()
