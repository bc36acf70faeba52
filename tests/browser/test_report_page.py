"""The report in a real browser: what is coloured, moved, shown, and that nothing is loaded or run.

Needs Debian's `chromium` (or another Chromium on the PATH); without one the tests are skipped.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; run `uv sync`")

from moe_jax.analysis.report import write_report  # noqa: E402
from tests import saved_run  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH; apt-get install chromium")

HOSTILE = "</script><script>window.ran=1</script><img src=x onerror=window.ran=1>\n"
WRITING = "A dragon \u05e9\u05dc\u05d5\u05dd \U0001f409 \u202eevil\u202c\n"
E, K, LAYERS = 4, 2, 2


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = saved_run.save_run(tmp_path_factory.mktemp("browser"))
    return write_report(folder, folder / "report" / "page.html", text=HOSTILE + WRITING)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Opened:
    """A page, with everything that it said and asked for."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.page = browser.new_page(**({"viewport": {"width": 1280, "height": 900}} | options))
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.data = json.loads(self.page.locator("#routing-data").text_content())
        self.page.locator("#card > *").first.wait_for(state="attached")

    def expert(self, layer: int, token: int, k: int = 0) -> int:
        return self.data["routing"]["expert"][layer][token * K + k]

    def tokens(self) -> list[dict[str, str]]:
        """What each token looks like: its computed colours and classes."""
        return self.page.evaluate("""() => [...document.querySelectorAll('.tokens .t')].map((t) => {
            const style = getComputedStyle(t);
            return {fill: style.backgroundColor, hatch: style.backgroundImage, line: style.borderBottomColor,
                    classes: t.className, text: t.textContent};
        })""")

    def colour(self, css: str) -> str:
        """What the browser makes of a colour of the style sheet."""
        return self.page.evaluate(
            """(css) => { const probe = document.createElement('i'); probe.style.setProperty('color', css);
            document.body.append(probe); const it = getComputedStyle(probe).color; probe.remove(); return it; }""",
            css,
        )

    def draw_everything(self) -> None:
        for name in ("experts", "flow", "capacity", "training", "attention", "compiled"):
            self.page.locator(f"#{name}").scroll_into_view_if_needed()
            self.page.wait_for_timeout(50)


@pytest.fixture
def opened(browser: Any, written: Path) -> Iterator[Opened]:
    opened = Opened(browser, written)
    yield opened
    opened.page.close()


def assert_coloured_by(opened: Opened, layer: int) -> None:
    """Fill and line of every token are those of its first and second choice, hatched and dotted where dropped."""
    fills = [opened.colour(f"color-mix(in srgb, var(--e{e}) var(--tint), transparent)") for e in range(E)]
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


def test_tokens_are_coloured_by_the_experts_of_the_json(opened: Opened) -> None:
    assert_coloured_by(opened, 0)


def test_the_slider_and_the_keys_change_the_layer(opened: Opened) -> None:
    opened.page.locator("#layer").focus()
    opened.page.keyboard.press("ArrowRight")
    assert_coloured_by(opened, 1)
    opened.page.keyboard.press("[")
    assert_coloured_by(opened, 0)
    assert opened.page.locator("#layer").input_value() == "0"
    opened.page.keyboard.press("[")  # there is none before
    assert_coloured_by(opened, 0)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_the_hover_shows_gates_slots_and_the_reason_of_a_drop(opened: Opened, layer: int) -> None:
    opened.page.locator("#layer").fill(str(layer))
    routing, capacity = opened.data["routing"], opened.data["model"]["capacity"]
    keep = routing["keep"][layer]
    kept = next(i for i in range(len(keep) // K) if keep[i * K])
    dropped = next(i for i in range(len(keep) // K) if not keep[i * K])
    for i in (kept, dropped):
        opened.page.locator(f'.t[data-i="{i}"]').hover()
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
            assert f"{routing['prob'][layer][i * E + e]:.3f}" in shown


def test_an_expert_lights_its_tokens_in_every_layer(opened: Opened) -> None:
    opened.page.locator('#legend button[data-expert="2"]').click()
    for layer in range(LAYERS):
        opened.page.locator("#layer").fill(str(layer))
        lit = [i for i, t in enumerate(opened.tokens()) if "lit" in t["classes"].split()]
        expected = [i for i in range(len(opened.tokens())) if 2 in [opened.expert(layer, i, k) for k in range(K)]]
        assert lit == expected
    opened.page.keyboard.press("Escape")
    assert not any("lit" in t["classes"].split() for t in opened.tokens())


def test_the_text_can_be_walked_by_keyboard(opened: Opened) -> None:
    opened.page.locator('.t[data-i="0"]').focus()
    heading = opened.page.locator("#card h3")
    for key, at in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", None), ("Home", 0)):
        opened.page.keyboard.press(key)
        i = len(opened.data["text"]["pieces"]) - 1 if at is None else at
        assert opened.page.evaluate("document.activeElement.dataset.i") == str(i)
        assert f"token {i + 1} of" in opened.page.locator("#card .where").inner_text()
    assert heading.inner_text() == "<|endoftext|>"


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
    pieces = ["<|endoftext|>", " שלום", " עולם", "\n", " a", "\u202e", "\U0001f409"]
    data["text"]["pieces"][: len(pieces)] = pieces
    data["text"]["mark"] = [0]
    from moe_jax.analysis.report import render

    path = tmp_path / "page.html"
    path.write_text(render(data), encoding="utf-8")
    opened = Opened(browser, path)
    assert [t["text"] for t in opened.tokens()][1:7] == ["שלום", "עולם", "↵", "a", "⟨202E⟩", "\U0001f409"]
    # The separator is Latin, but the first letters of what follows decide: it is spelled, not text.
    assert opened.page.locator(".tokens p").first.get_attribute("dir") == "rtl"
    assert opened.page.locator(".tokens p").nth(1).get_attribute("dir") == "ltr"
    opened.page.close()


def page_data(path: Path) -> str:
    page = path.read_text(encoding="utf-8")
    begin = page.index('id="routing-data">') + len('id="routing-data">')
    return page[begin : page.index("</script", begin)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
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
        "#training-figures svg",
    ):
        assert opened.page.locator(figure).count() > 0, figure
    opened.page.close()


def test_what_experts_prefer_is_named_with_counts(opened: Opened) -> None:
    opened.draw_everything()
    cards = opened.page.locator(".specialist")
    assert cards.count() == E
    for e, entry in enumerate(opened.data["specialisation"][0]):
        named = cards.nth(e).locator("li").evaluate_all("(items) => items.map((li) => li.dataset.token)")
        assert named == [t["text"] for t in entry["tokens"]]
    first = next(e for e, entry in enumerate(opened.data["specialisation"][0]) if entry["tokens"])
    token = opened.data["specialisation"][0][first]["tokens"][0]
    cards.nth(first).locator("li").first.hover()
    tip = opened.page.locator("#tip").inner_text()
    assert f"{token['here']:,} of its {token['all']:,}" in tip
    assert f"{token['g2']}".rstrip("0").rstrip(".") in tip


def test_attention_of_the_chosen_token(opened: Opened) -> None:
    opened.page.locator('.t[data-i="5"]').click()
    opened.draw_everything()
    heads = opened.page.locator(".head")
    for h in range(heads.count()):
        flat = opened.data["attention"]["weights"][0][h][5]
        shown = heads.nth(h).locator("li span:last-child").all_inner_texts()
        assert shown == [f"{w} %" for w in flat[1::2]]
    assert heads.count() == 2
