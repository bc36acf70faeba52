"""The page that `export --to html` writes, in a real browser: it computes what the int8 model in JAX computes."""

import base64
import dataclasses
import functools
import json
import random
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.config import DataConfig
from moe_jax.data.chats import answer_prompt
from moe_jax.data.documents import Message
from moe_jax.data.tokenizers import Tokenizer, token_pieces, train_tokenizer
from moe_jax.inference.decode import Decoder
from moe_jax.inference.sampling import Sampling
from moe_jax.inspection.switches import SwitchableMoE, with_switches
from moe_jax.interop import html
from moe_jax.interop.html import html_page
from moe_jax.model.moe.layer import Mode
from moe_jax.model.quantized import quantize
from moe_jax.model.transformer import merge
from moe_jax.runs.load import LoadedRun
from tests.browser.contrast import CONTRAST
from tests.browser.opened import Watched
from tests.support import tiny
from tests.support.saved_run import unsaved_run

T, SEPARATOR = 32, 256
KINDS: dict[str, dict[str, Any]] = {
    "nano": {"qk_norm": "head"},
    "story-cpu": {"qk_norm": "head", "kv_heads": 1, "tied_head": False, "scaled_embedding": True},
    "norm of all heads, plain gates": {"qk_norm": "full", "renormalise_gates": False, "top_k": 3},
    "shared experts, balance by bias": {"shared_experts": 2, "balancing": "bias", "top_k": 3},
    "shared experts with a gate, biases of keys": {"shared_experts": 1, "shared_gate": True, "qkv_bias": True},
    "one expert a token": {"top_k": 1, "expert_hidden": 5},
    "LayerNorm, GELU, biases, learned positions": {
        "norm": "layernorm", "activation": "gelu", "bias": True, "positions": "learned"
    },
    "dense": {"dense": "total", "head_size": 6},
}  # fmt: skip
CALL = """([file, code]) => {
    const bytes = Uint8Array.from(atob(file), (c) => c.charCodeAt(0));
    const html = new TextDecoder("windows-1252").decode(bytes);
    const script = html.split('id="worker">')[1].split("</script>")[0];
    const said = [], run = new Function("postMessage", "file", "said", "let onmessage;" + script + ";return (async () => {" + code + "})()");
    return run((message) => { said.push(message); }, bytes.buffer, said);
}"""  # noqa: E501


@functools.lru_cache
def made(kind: str, tuned: bool = False, tokenizer: Tokenizer | None = None) -> LoadedRun:
    entries = tokenizer.vocab_size if tokenizer else 257
    return unsaved_run(tiny.config(**({"vocab_size": entries, "seq_len": T} | KINDS[kind])), tokenizer, tuned)


@functools.lru_cache
def page_of(kind: str) -> bytes:
    return html_page(made(kind), kind, {"opening": "Once"})


@pytest.fixture(scope="module")
def blank(browser: Any) -> Iterator[Any]:
    page = browser.new_page()
    yield page
    page.close()


def call(blank: Any, page: bytes, code: str) -> Any:
    """What code returns inside the scope of the page's worker."""
    return blank.evaluate(CALL, [base64.b64encode(page).decode(), code])


@functools.lru_cache
def forward(kind: str) -> Any:
    """The jitted (off bool [L, 1, E], tokens) -> logits, experts and gates of the int8 model."""
    run, params = made(kind), quantize(made(kind).params, "int8")
    graphdef = tiny.build(run.config.model, moe=SwitchableMoE)[0]

    def whole(off: jax.Array, tokens: jax.Array) -> Any:
        model = merge(graphdef, with_switches(params, off) if run.config.model.dense == "none" else params)
        hidden, stats, _ = model(tokens, Mode.GENERATE, trace=True)
        trace = stats and (stats.trace.expert_index[:, 0], stats.trace.gate[:, 0])
        return model.logits(hidden[0]), trace

    return jax.jit(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_experts_and_gates_are_those_of_the_int8_model(blank: Any, kind: str) -> None:
    """With experts off too, as the report's ablation switches them off."""
    config = made(kind).config.model
    ids = np.random.default_rng(1).integers(0, 257, (1, 12)).astype(np.int32)
    for off in [[], [2], [0, 2]] if config.dense == "none" else [[]]:
        code = f"""await open(file);
            const all = {ids[0].tolist()}.map((token, t) => model.read(token, t, [[], {off}]));
            return all.map((r) => [[...model.logits(r.hidden)], r.experts, r.gates]);"""
        logits, experts, gates = zip(*call(blank, page_of(kind), code), strict=True)
        switches = np.zeros((config.layers, 1, config.experts), bool)
        switches[1, 0, off] = True
        expected, trace = jax.device_get(forward(kind)(switches, ids))
        assert np.abs(np.array(logits) - expected).max() < 2e-4 * np.abs(expected).max()
        if trace is not None:
            np.testing.assert_array_equal(np.array(experts).swapaxes(0, 1), trace[0])
            np.testing.assert_allclose(np.array(gates).swapaxes(0, 1), trace[1], atol=1e-5)
            assert trace[1][1][np.isin(trace[0][1], off)].sum() == 0


def test_greedy_text_is_what_generate_writes_far_beyond_the_context(blank: Any) -> None:
    run = made("story-cpu")
    code = """await open(file);
        const body = { prompt: "Once", echo: true, max_tokens: 300, temperature: 0, seed: 1, off: [] };
        await write(1, body);
        return said.flatMap(({ event }) => event.choices[0].token_ids ?? []);"""
    ids = call(blank, page_of("story-cpu"), code)
    prompt = [SEPARATOR, *b"Once"]
    decoder = Decoder(run.graphdef, T, 257)
    settings = {"settings": Sampling(0.0), "key": jax.random.key(0), "stop": SEPARATOR, "limit": 300}
    assert ids == [*prompt, *decoder.stream(quantize(run.params, "int8"), prompt, **settings)]


ODD = [
    *(
        "",
        " ",
        "  a  b ",
        "\x00\x00 \x00",
        "Don't\n\n stop 1234 'll'VE 'd",
        "日本 😀 naïve\x7f",
        "ſs İ ٢٣ ²",
        "<|endoftext|>",
    ),
    *(
        "\u0085\u00a0\ufeff x\u2028y\u200b!\u0085 \ufeff",
        "\r\n\t end   ",
        "\u202e\u05e9\u05dc\u05d5\u05dd",
        "a" * 700,
        " " * 700 + "x",
    ),
]
WORDS = (
    " the dragon 'll    \n\n 1234 <|end oftext|> ſs 😀 Once upon a time, there was a cat !£ \ufeff and they ate a cake."
)
"""Its merges join `!` with the first byte of £, and a space with that of U+FEFF: so it is seen what white space is."""


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_ids_and_pieces_are_those_of_the_tokenizer(blank: Any, kind: str) -> None:
    ours = (
        Tokenizer({"kind": "byte"})
        if kind == "byte"
        else train_tokenizer(DataConfig(tokenizer="bpe", vocab_size=420), [WORDS * 3] * 9)
    )
    page = html_page(made("nano", tokenizer=ours), kind, {})
    alphabet, draw = [*"aeht .,'\n\r\x00\u00a0é日😀İſ0١²", " the", "  "], random.Random(0)
    texts = [*ODD, "the dragon" * 300] + ["".join(draw.choices(alphabet, k=40)) for _ in range(200)]
    chat = [Message("user", " hello "), Message("assistant", "a cat"), Message("user", "assistant\nx")]
    messages = [{"role": role, "content": content} for role, content in chat]
    code = f"""await open(file);
        const texts = {json.dumps(texts)};
        const ids = texts.map((text) => tokenizer.encode(text));
        return [ids, tokenizer.pieces, tokenizer.conversation({messages})];"""
    ids, pieces, conversation = call(blank, page, code)
    assert ids == [ours.encode(text) for text in texts]
    assert pieces == token_pieces(ours, np.arange(ours.vocab_size))
    stripped = [message._replace(content=message.content.strip()) for message in chat]
    assert conversation == answer_prompt(ours, stripped)


class Inside(Watched):
    """An exported page, opened from the disk or from a web server."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        super().__init__(browser, **options)
        self.page.goto(url)
        self.page.locator("#model-name", has_text="layers").wait_for(state="attached")

    def write(self, text: str, length: int, **settings: str) -> None:
        self.page.locator("#settings").evaluate("(node) => { node.open = true; }")
        for name, value in ({"length": str(length), "prompt": text} | settings).items():
            self.page.locator(f"#{name}").fill(value)
        self.press("#write")

    def pieces(self) -> list[str]:
        chips = "(all) => all.map((t) => (t.previousSibling?.nodeType === 3 ? ' ' : '') + t.textContent)"
        return self.page.locator("#tokens .t").evaluate_all(chips)

    def first_choices(self, layer: int) -> list[int]:
        """The number below each chip that the model wrote."""
        self.page.locator("#layer").fill(str(layer))
        return self.page.locator("#tokens .t:not(.given)").evaluate_all(
            "(all) => all.map((t) => Number(t.dataset.expert))"
        )


class Utf8(SimpleHTTPRequestHandler):
    """A web server that says UTF-8 of every page, as static hosts do."""

    extensions_map = {".html": "text/html; charset=utf-8"}  # noqa: RUF012

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page of each of three models."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "story.html").write_bytes(page_of("story-cpu"))
    (folder / "dense.html").write_bytes(page_of("dense"))
    (folder / "chat.html").write_bytes(html_page(made("nano", tuned=True), "tuned", {}))
    return folder


def test_it_writes_from_the_disk_and_from_any_web_server_and_asks_for_nothing(browser: Any, folder: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Utf8, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    texts, site = [], f"http://127.0.0.1:{server.server_address[1]}/story.html"
    for url, charset in (((folder / "story.html").as_uri(), "windows-1252"), (site, "UTF-8")):
        inside = Inside(browser, url)
        assert inside.page.evaluate("document.characterSet") == charset
        assert not inside.page.locator("#error").is_visible()
        inside.write("One dragon", 40, temperature="0")
        texts.append(inside.pieces())
        assert {asked for asked in inside.asked if not asked.startswith("blob:")} == {url}
        assert inside.said == []
        inside.page.close()
    server.shutdown()
    server.server_close()
    run = made("story-cpu")
    prompt = [SEPARATOR, *b"One dragon"]
    settings = {"settings": Sampling(0.0), "key": jax.random.key(0), "stop": SEPARATOR, "limit": 40}
    ids = [*prompt[1:], *Decoder(run.graphdef, T, 257).stream(quantize(run.params, "int8"), prompt, **settings)]
    shown = "".join(token_pieces(run.tokenizer, np.array(ids)))
    shown = re.sub("[\0-\t\v-\x1f\x7f]", lambda c: f"\u27e8{ord(c[0]):04X}\u27e9", shown).replace("\n", "\u21b5")
    assert texts[0] == texts[1]
    assert "".join(texts[0]).replace(" ", "") == shown.replace(" ", "")  # a paragraph begins without its space


def test_an_expert_that_is_off_is_chosen_no_more_and_on_again_the_text_is_the_same(browser: Any, folder: Path) -> None:
    inside = Inside(browser, (folder / "story.html").as_uri())
    inside.write("One dragon", 60, seed="7")
    text, choices = inside.pieces(), inside.first_choices(1)
    expert = max(set(choices), key=choices.count)
    inside.page.locator("#loads button").nth(expert).click()
    inside.page.locator("#flip", has_text=f"Switch expert {expert} off in layer 1").click()
    assert inside.page.locator("#loads .off b").all_inner_texts() == [str(expert)]
    assert inside.pieces() == text
    inside.press("#rewrite")
    assert inside.pieces() != text
    assert expert not in inside.first_choices(1)
    assert f"seed 7 · without expert {expert} in layer 1" in inside.page.locator("#speed").inner_text()
    inside.page.locator("#all-on").click()
    assert inside.page.locator("#loads .off").count() == 0
    inside.press("#again")  # with the next seed
    inside.write("One dragon", 60, seed="7")
    assert (inside.pieces(), inside.first_choices(1)) == (text, choices)
    for e in range(3):  # one has to stay on
        inside.page.locator("#loads button").nth(e).click()
        inside.page.locator("#flip").click()
    inside.page.locator("#loads button").nth(3).click()
    assert inside.page.locator("#flip").is_disabled()
    inside.page.close()


STOP_AT_TOKEN_60 = """() => {
  const look = () => {
    if (document.querySelector('.t[data-i="60"]')) document.querySelector("#write").click();
    else requestAnimationFrame(look);
  };
  look();
}"""
"""The page presses Stop itself: so small a model writes thousands of tokens before a press from here arrives."""


def test_a_text_that_was_stopped_goes_on_as_it_would_have(browser: Any, folder: Path) -> None:
    """And one that goes on from another token ends as a text that began with it. Both use the cache of the worker."""
    inside = Inside(browser, (folder / "story.html").as_uri())
    inside.write("One dragon", 24, seed="3")
    whole = inside.pieces()
    inside.write("One dragon", 10, seed="3")
    inside.page.locator("#length").fill("14")
    inside.press("#go-on")
    assert inside.pieces() == whole
    for name, value in (("length", "4000"), ("temperature", "0"), ("prompt", "Once")):  # it does not end by itself
        inside.page.locator(f"#{name}").fill(value)
    inside.page.evaluate(STOP_AT_TOKEN_60)
    inside.press("#write")
    assert "you stopped it" in inside.page.locator("#status").text_content()
    assert 60 < len(inside.pieces()) < 4000
    inside.page.close()


def test_a_saved_text_is_without_the_model_and_shows_the_same(browser: Any, folder: Path, tmp_path: Path) -> None:
    inside = Inside(browser, (folder / "chat.html").as_uri())
    inside.write("A dr\u00e4gon \U0001f409", 15, seed="5")
    with inside.page.expect_download() as download:
        inside.page.locator("#save").click()
    download.value.save_as(tmp_path / "routing.html")
    assert (tmp_path / "routing.html").stat().st_size < 100_000
    saved = Watched(browser)
    saved.page.goto((tmp_path / "routing.html").as_uri())
    saved.page.locator(".turn.assistant .t").first.wait_for()
    saved.page.locator("#tokens:not(.writing)").wait_for()
    saved.page.wait_for_timeout(100)
    assert "A dr\u00e4gon \U0001f409" in inside.page.locator("#tokens").inner_text()
    for part in ("#tokens", "#loads"):
        assert saved.page.locator(part).inner_text() == inside.page.locator(part).inner_text()
    assert "seed 5" in saved.page.locator("#foot").inner_text()
    assert saved.page.locator("#composer, #switches").count() == 0
    assert saved.said == []
    saved.page.close()
    inside.page.close()


def test_a_conversation_a_dense_model_and_a_file_that_was_spoiled(browser: Any, folder: Path) -> None:
    inside = Inside(browser, (folder / "chat.html").as_uri())
    inside.write("Hi", 6, seed="5")
    assert inside.page.locator(".turn.assistant .t").count() == 6
    inside.page.locator("#edit").click()
    assert inside.page.locator("#prompt").input_value() == "Hi"
    assert inside.page.locator("#tokens > *").count() == 0
    inside.page.locator("#prompt").fill("a message that is longer than the context")
    inside.page.locator("#write").click()
    inside.page.locator("#error", has_text="and the model reads 32. Begin a new one.").wait_for()
    inside.page.close()
    inside = Inside(browser, (folder / "dense.html").as_uri())
    inside.write("Hi", 6, seed="5")
    assert not inside.page.locator("#switches").is_visible()
    inside.page.locator("#prompt").fill("a" * 50_000)  # one word, whose tokens are not even computed
    inside.page.locator("#write").click()
    inside.page.locator("#error", has_text="has more than 32 tokens, and the model reads 32. Shorten it.").wait_for()
    inside.page.close()
    data = bytearray(page_of("dense"))
    data[data.rindex(b'id="weights">') + 600] ^= 1
    (folder / "spoiled.html").write_bytes(data)
    spoiled = Watched(browser)
    spoiled.page.goto((folder / "spoiled.html").as_uri())
    spoiled.page.locator("#error", has_text="get the file once more").wait_for()
    spoiled.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_the_input_and_a_pressed_token_are_in_view(browser: Any, folder: Path, scheme: str) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "color_scheme": scheme, "reduced_motion": "reduce"}
    inside = Inside(browser, (folder / "story.html").as_uri(), **phone)
    inside.write("One dragon", 200, seed="1")
    page = inside.page
    page.locator("#settings").evaluate("(node) => { node.open = false; document.documentElement.scrollTop = 0; }")
    box = "(node) => { const b = node.getBoundingClientRect(); return [b.top, b.bottom]; }"
    for button in ("#prompt", "#write"):
        top, bottom = page.locator(button).evaluate(box)
        assert 0 <= top < bottom <= 844
        assert top - page.locator("#tokens").evaluate(box)[0] > 200  # of the text are in view above it
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.locator("#loads button").first.click()
    page.locator("#flip").click()
    assert page.evaluate(CONTRAST) == []
    chip = page.locator("#tokens .t").nth(-4)
    chip.click()
    sheet = page.locator("#card").evaluate(box)[0]
    top, bottom = chip.evaluate(box)
    assert page.locator("#bar").evaluate(box)[1] <= top < bottom <= sheet
    page.evaluate("document.documentElement.scrollTop = 100000")
    page.locator(".glossary summary").click()
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.close()


def test_the_page_is_small_and_an_int8_run_gives_the_same() -> None:
    run = made("story-cpu")
    rounded = dataclasses.replace(run, params=quantize(run.params, "int8"))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(rounded.params))
    assert len(page_of("story-cpu")) <= weights + 120_000
    assert html_page(rounded, "story-cpu", {"opening": "Once"}) == page_of("story-cpu")
    lines = [len(file.read_text().splitlines()) for file in Path(html.__file__).with_name("page").iterdir()]
    assert max(lines) <= 200
    assert sum(lines) <= 500
