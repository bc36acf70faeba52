"""The server's page in a real browser: what streams in, how it is coloured, what a card says, and going on from it."""

import pytest

from tests.browser.served import Served
from tests.support.stand_in_server import LAYERS, experts_of, gates_of, logprob_of, probability

READ = ["Once", " upon", " a", " time"]
WRITTEN = [" there", " was", " a", " dragon", ".", " It", " had", " 7", " hats"]
HOSTILE = [
    "</script><b>x",
    "<img src=x onerror=window.ran=1>",
    "\u202eevil",
    "\x07",
    "<F0 9F>",
    " שלום",
    "&amp;",
    "{{style}}",
    "\n",
]


def test_tokens_stream_in_with_the_colours_of_the_experts_that_were_sent(served: Served) -> None:
    """In every layer, by the slider and by the keys; the expert of the last token is not known yet."""
    served.write()
    assert served.shown_pieces() == READ + WRITTEN
    ids: list[int | None] = [*served.ids()[:-1], None]
    served.assert_coloured(0, ids)
    served.page.locator("#layer").fill("2")
    served.assert_coloured(2, ids)
    served.page.locator("#layer").press("[")
    served.assert_coloured(1, ids)
    given = served.page.locator("#tokens .t.given").count()
    assert given == len(READ)
    path, body = served.says.asked[-1]
    assert path == "/v1/completions"
    assert {k: body[k] for k in ("prompt", "stream", "echo", "return_token_ids", "routed_experts", "max_tokens")} == {
        "prompt": "Once upon a time",
        "stream": True,
        "echo": True,
        "return_token_ids": True,
        "routed_experts": True,
        "max_tokens": 9,
    }
    assert served.said == []
    assert {url.split("/v1")[0].rstrip("/") + "/" for url in served.asked} == {served.says.url}


@pytest.mark.parametrize("reach", ["hover", "focus"])
def test_a_card_says_experts_gates_probability_and_the_likeliest_others(served: Served, reach: str) -> None:
    served.write()
    ids = served.ids()
    beside = next(i for i in range(len(READ), len(ids) - 1) if ids[i] % 5 == 0)  # not among its five likeliest
    among = next(i for i in range(len(READ), len(ids) - 1) if ids[i] % 5)
    for i in (0, among, beside):
        getattr(served.page.locator(f'#tokens .t[data-i="{i}"]'), reach)()
        shown, token = served.card(), ids[i]
        assert f"token {i + 1} of {len(ids)}, {'given to' if i < len(READ) else 'written by'} the model" in shown
        assert f"probability {probability(logprob_of(token))}" in shown
        others = served.says.others_of(token)
        expected = [(other, p) for other, p in others] + ([(token, logprob_of(token))] if i == beside else [])
        rows = served.page.locator("#card .other")
        assert rows.count() == len(expected)
        for row, (other, p) in zip(rows.all(), expected, strict=True):
            word, chance = row.locator(".word").inner_text(), row.locator(".number").inner_text()
            assert (word.replace("␣", " "), chance) == (served.says.vocabulary[other], probability(p))
            assert ("own" in row.get_attribute("class")) == (other == token)
            assert (row.evaluate("(n) => n.tagName") == "BUTTON") == (other != token)
        for layer in range(LAYERS):
            row = served.page.locator("#card .layers button").nth(layer)
            pairs = zip(experts_of(token)[layer], gates_of(token)[layer], strict=True)
            said = "; ".join(f"expert {e}, gate {gate:.3f}" for e, gate in pairs)
            assert row.get_attribute("aria-label") == f"Layer {layer}: {said}"
            assert row.locator(".dot").all_inner_texts() == [str(e) for e in experts_of(token)[layer]]


def test_going_on_from_another_token_sends_the_ids_up_to_it_and_keeps_the_former_text(served: Served) -> None:
    served.write()
    ids, before = served.ids(), served.shown_pieces()
    served.page.locator('.t[data-i="7"]').click()
    served.press("#card button.other[data-id='4'] >> nth=0")
    (_, first), (path, body) = served.says.asked
    assert (path, body["prompt"]) == ("/v1/completions", [0, *ids[:7], 4])
    assert body["seed"] == first["seed"]
    assert served.shown_pieces() == [*before[:7], " kite", *WRITTEN]
    served.assert_coloured(0, [*served.ids()[:-1], None])
    assert served.page.evaluate("document.activeElement.dataset.i") == "7"
    assert served.page.locator("#former li").count() == 1
    former = served.page.locator("#former button")
    assert "Text 1" in former.inner_text()
    assert "13 tokens" in former.inner_text()
    former.click()
    served.page.locator("#status", has_text="Text 1 is back").wait_for(state="attached")
    assert served.shown_pieces() == before
    served.assert_coloured(0, [*ids[:-1], None])
    assert "17 tokens" in former.inner_text()  # the other one can be had back, too


def test_stop_ends_the_request_and_keeps_what_was_written(served: Served) -> None:
    served.says.pause = 0.05
    served.page.locator("#length").fill("4000")
    served.page.locator("#prompt").fill("Once")
    served.page.locator("#write").click()
    served.page.locator('.t[data-i="5"]').wait_for()
    assert served.page.locator("#write").inner_text() == "Stop"
    served.page.locator("#write").click()
    served.finished()
    assert served.says.aborted.wait(10)
    count = len(served.pieces())
    assert 6 <= count < 200
    served.page.wait_for_timeout(300)
    assert len(served.pieces()) == count
    assert "you stopped it" in served.page.locator("#status").text_content()
    served.says.pause = 0
    served.press("#go-on >> visible=true")
    assert len(served.pieces()) == count + 4000


def test_no_text_becomes_markup(served: Served) -> None:
    served.says.writes = HOSTILE
    served.says.vocabulary[1] = "<i>other</i>"
    served.write("</textarea><b>hi</b>\u202e", length=len(HOSTILE))
    shown = "".join(served.shown_pieces())
    assert shown.startswith("</textarea><b>hi</b>⟨202E⟩")
    assert "</script><b>x<img src=x onerror=window.ran=1>⟨202E⟩evil⟨0007⟩<F0 9F> שלום&amp;{{style}}" in shown
    served.page.locator("#tokens .t").first.click()
    assert "<i>other</i>" in served.card()
    assert served.page.locator("#tokens b, #tokens img, #card i, script:not(body > script)").count() == 0
    assert served.page.evaluate("window.ran") is None
    marks = served.page.locator("#tokens .t.mark").all_inner_texts()
    assert marks == ["<F0 9F>"]
    assert served.said == []
