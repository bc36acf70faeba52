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
        for name in ("experts", "flow", "capacity", "training", "attention", "heads", "compiled"):
            self.page.locator(f"#{name}").scroll_into_view_if_needed()
            self.page.wait_for_timeout(50)


@pytest.fixture
def opened(browser: Any, written: Path) -> Iterator[Opened]:
    opened = Opened(browser, written)
    yield opened
    opened.page.close()


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


@pytest.mark.parametrize("reach", ["hover", "focus"])
@pytest.mark.parametrize("layer", range(LAYERS))
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
    hostile = "</script><script>window.ran=1</script><img src=x onerror=window.ran=1>"
    pieces = ["<|endoftext|>", " שלום", " עולם", "\n", " a", "\u202e", "\U0001f409", hostile]
    data["text"]["pieces"][: len(pieces)] = pieces
    data["text"]["mark"] = [0]
    from moe_jax.analysis.report import render

    path = tmp_path / "page.html"
    path.write_text(render(data), encoding="utf-8")
    opened = Opened(browser, path)
    assert [t["text"] for t in opened.tokens()][1:8] == ["שלום", "עולם", "↵", "a", "⟨202E⟩", "\U0001f409", hostile]
    assert opened.page.evaluate("window.ran") is None
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
        "#training-figures canvas",
        "#heads canvas",
        "#costs .bar",
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
    heads = opened.page.locator("#attention-figure .head")
    for h in range(heads.count()):
        flat = opened.data["attention"]["weights"][0][h][5]
        shown = heads.nth(h).locator("li span:last-child").all_inner_texts()
        assert shown == [f"{w} %" for w in flat[1::2]]
    assert heads.count() == 2


def test_a_sentence_at_the_top_says_what_the_experts_specialise_in(browser: Any, written: Path, tmp_path: Path) -> None:
    """Of three planted specialists the clearest (by G^2) comes first; each kind of token is named once."""
    from moe_jax.analysis.report import render

    data = json.loads(page_data(written))
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
            "examples": [f" {name}"],
        }
        data["specialisation"][layer][e]["groups"] = [group]
    path = tmp_path / "page.html"
    path.write_text(render(data), encoding="utf-8")
    opened = Opened(browser, path)
    opened.draw_everything()
    first = opened.page.locator("#experts p").first
    assert first.get_attribute("id") == "specialists-said"
    said = first.inner_text().replace("\u00a0", " ")
    dragons = "expert 3 of layer 1 in dragons (“dragons”; 63 % of them choose it)"
    assert f"{dragons} and expert 0 of layer 1 in cats (“cats”; 63 % of them choose it). By chance 50 % would." in said
    assert "layer 0" not in said
    opened.page.locator("#layer").fill("1")
    opened.page.locator("#specialists").scroll_into_view_if_needed()
    opened.page.locator("#experts-explain", has_text="in layer 1").wait_for()
    assert opened.page.locator(".specialist .groups b").all_inner_texts() == ["cats", "dragons"]
    opened.page.close()


def test_the_counts_are_a_table_too(opened: Opened) -> None:
    opened.draw_everything()
    opened.page.locator("#counts summary").click()
    opened.page.locator("#counts table").wait_for()
    rows = opened.page.locator("#counts tbody tr").all_inner_texts()
    entries = [(e, t) for e, x in enumerate(opened.data["specialisation"][0]) for t in x["tokens"]]
    assert len(rows) == len(entries) > 0
    for row, (e, token) in zip(rows, entries, strict=True):
        cells = row.split("\t")
        assert (cells[0], cells[2], cells[3]) == (str(e), f"{token['here']:,}", f"{token['all']:,}")


def test_the_card_of_an_expert_lights_its_tokens(opened: Opened) -> None:
    opened.draw_everything()
    opened.page.locator(".specialist h4 button").nth(3).click()
    lit = [i for i, t in enumerate(opened.tokens()) if "lit" in t["classes"].split()]
    assert lit == [i for i in range(len(opened.tokens())) if 3 in [opened.expert(0, i, k) for k in range(K)]]
    assert opened.page.locator('#legend [aria-pressed="true"]').inner_text() == "3"


def test_the_saved_traces_are_painted_in_the_colours_of_their_experts(opened: Opened) -> None:
    opened.draw_everything()
    shown = opened.data["training"]["traces"]["shown"]
    assert shown["step"] == [20, 40]
    for layer in range(LAYERS):
        opened.page.locator("#layer").fill(str(layer))
        opened.page.locator("#training").scroll_into_view_if_needed()
        canvas = opened.page.locator(f'canvas[aria-label*="evaluations, layer {layer}"]')
        canvas.wait_for()
        painted = canvas.evaluate(
            """(canvas, [rows, columns]) => [...Array(rows).keys()].map((r) => [...Array(columns).keys()].map((c) =>
            'rgb(' + [...canvas.getContext('2d').getImageData((c + 0.5) * canvas.width / columns,
            (r + 0.5) * canvas.height / rows, 1, 1).data].slice(0, 3).join(', ') + ')'))""",
            [len(shown["step"]), len(shown["pieces"])],
        )
        colours = [opened.colour(f"var(--e{e})") for e in range(E)]
        assert painted == [[colours[e] for e in step[layer]] for step in shown["first"]]
    opened.page.locator('canvas[aria-label*="evaluations, layer"]').focus()
    opened.page.keyboard.press("ArrowRight")
    opened.page.keyboard.press("ArrowDown")
    tip = opened.page.locator("#tip").inner_text()
    assert tip.startswith("Step 40: ")
    assert tip.endswith(f"(token 2) chose expert {shown['first'][1][LAYERS - 1][1]}")


def test_a_press_in_the_picture_of_a_head_chooses_the_token(opened: Opened) -> None:
    opened.draw_everything()
    canvas = opened.page.locator("#heads canvas").first
    box = canvas.bounding_box()
    tokens = opened.data["attention"]["tokens"]
    canvas.click(position={"x": 5, "y": box["height"] * 50.5 / tokens})
    assert "token 51 of" in opened.page.locator("#card .where").inner_text()


CONTRAST = """() => {
    const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
    const numbers = (css) => {
        const pen = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
        pen.fillStyle = css; pen.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    };
    const behind = (node) => {
        if (!node) return [255, 255, 255];
        const [r, g, b, a] = numbers(getComputedStyle(node).backgroundColor);
        if (a === 1) return [r, g, b];
        const under = behind(node.parentElement);
        return [r, g, b].map((c, i) => c * a + under[i] * (1 - a));
    };
    const found = [];
    for (const node of document.querySelectorAll('main *, header *, nav *, .controls *, footer *')) {
        if (node.closest('svg') || ![...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
        const [a, b] = [luminance(numbers(getComputedStyle(node).color)), luminance(behind(node))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < 4.5) found.push([node.tagName, node.className, node.textContent.slice(0, 20), ratio]);
    }
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_its_ground(browser: Any, written: Path, tmp_path: Path, scheme: str) -> None:
    """WCAG 2.2 AA, 4.5 to 1: for twenty experts, as the page is, with a token chosen, and with an expert lit."""
    from moe_jax.analysis.report import render

    data = json.loads(page_data(written))
    count, data["model"]["experts"], data["corpus"] = data["model"]["experts"], 20, None
    n = len(data["text"]["pieces"])
    for layer in range(LAYERS):
        data["routing"]["expert"][layer] = [(i // K + 7 * (i % K)) % 20 for i in range(n * K)]
        data["routing"]["prob"][layer] = [0.05] * (20 * n)
    assert count == E
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


def test_a_long_text_is_laid_out_paragraph_by_paragraph(browser: Any, written: Path, tmp_path: Path) -> None:
    """4,096 tokens in one line: every token is coloured, in paragraphs that the browser may leave out of sight."""
    run = written.parent.parent
    path = write_report(run, tmp_path / "page.html", text=(saved_run.STORY.strip() + " ") * 46)
    opened = Opened(browser, path)
    n = len(opened.data["text"]["pieces"])
    assert n > 4096
    opened.page.locator("#layer").fill("1")
    firsts = opened.page.locator(".tokens .t").evaluate_all("(nodes) => nodes.map((t) => Number(t.dataset.expert))")
    assert firsts == [opened.expert(1, i) for i in range(n)]
    assert (
        opened.page.locator(".tokens").evaluate("(box) => box.textContent").split()
        == ("<|endoftext|>" + (saved_run.STORY.strip() + " ") * 46).split()
    )
    sizes = opened.page.locator(".tokens p").evaluate_all(
        "(boxes) => boxes.map((p) => [p.childElementCount, getComputedStyle(p).contentVisibility])"
    )
    assert max(size for size, _ in sizes) <= 240
    assert {visibility for _, visibility in sizes} == {"auto"}
    assert opened.said == []
    opened.page.close()


def test_on_paper_everything_is_there(browser: Any, written: Path) -> None:
    opened = Opened(browser, written)
    opened.page.emulate_media(media="print")
    opened.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert not opened.page.locator("#controls").is_visible()
    for name in ("#load svg", "#flow-figure svg", "#slots svg", "#training-figures svg", "#dots"):
        assert opened.page.locator(name).first.is_visible(), name
    box = opened.page.locator("#tokens").evaluate("(box) => [box.scrollHeight, box.clientHeight]")
    assert box[0] <= box[1] + 1
    opened.page.close()
