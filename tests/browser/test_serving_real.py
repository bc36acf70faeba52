"""The server's page against the real server, with a tiny model of random parameters: it shows what the API says.

The model writes bytes, so most tokens are parts of characters, and its context is 32 tokens.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")
pytest.importorskip("uvicorn", reason="needs the extra `serve`")

from tests.browser.served import SEED, Real
from tests.serving import made
from tests.serving.site import Site, site


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("run")) as running:
        yield running


def asked(api: Site, prompt: Any, length: int) -> dict[str, Any]:
    """What the API says of a text, in one object, the prompt included."""
    fields = {"echo": True, "logprobs": 5, "return_token_ids": True, "routed_experts": True}
    answer = api.complete(prompt=prompt, max_tokens=length, seed=SEED, temperature=1.0, **fields)
    assert answer.status == 200, answer.text
    return answer.json["choices"][0]


def assert_shows(real: Real, said: dict[str, Any]) -> None:
    """The chips are the tokens after the separator, each with the expert and the probabilities that the API says."""
    names = said["logprobs"]["tokens"][1:]
    for layer in range(2):
        experts = [row[layer][0] if row else None for row in said["routed_experts"][1:]]
        assert real.first_choices(layer) == experts
    for i in (0, len(names) - 2):
        chip = real.page.locator(f'.t[data-i="{i}"]')
        chip.click()
        ids = real.page.locator("#card button.other").evaluate_all("(all) => all.map((n) => Number(n.dataset.id))")
        token = said["token_ids"][i + 1]
        assert ids == [other for other in said["logprobs"]["top_token_ids"][i + 1] if other != token]
        for e, gate in zip(said["routed_experts"][i + 1][0], said["gates"][i + 1][0], strict=True):
            name = real.page.locator("#card .layers button").first.get_attribute("aria-label")
            assert f"expert {e}, gate {gate:.3f}" in name
    real.page.keyboard.press("Escape")


def test_the_page_shows_what_the_api_says_and_goes_on_beyond_the_context(browser: Any, api: Site) -> None:
    real = Real(browser, api.port)
    real.write("One", 12)
    said = asked(api, "One", 12)
    assert real.page.locator("#tokens .t").count() == len(said["token_ids"]) - 1
    assert_shows(real, said)
    real.page.locator('.t[data-i="6"]').click()
    other = real.page.locator("#card button.other").nth(1)
    token = int(other.get_attribute("data-id"))
    real.press("#card button.other >> nth=1")
    assert_shows(real, asked(api, [*said["token_ids"][:7], token], 12))
    real.press("#go-on")
    real.press("#go-on")
    assert real.page.locator("#tokens .t").count() == 3 + 3 + 1 + 12 * 3 > made.T
    assert not real.page.locator("#error").is_visible()
    assert real.said == []
    real.page.close()


def test_a_conversation_with_the_real_server(browser: Any, tmp_path: Path) -> None:
    """A refusal of the server is said in its words, and the message can be sent again."""
    with site(tmp_path, tuned=True) as api:
        real = Real(browser, api.port)
        real.write("Hi", 6)
        assert real.page.locator(".turn.assistant .t").count() == 6
        assert real.page.locator("#write").inner_text() == "Send"
        real.page.locator('.t[data-i="3"]').click()
        real.press("#card button.other >> nth=0")
        assert real.page.locator(".turn.assistant .t").count() == 4 + 6
        real.page.locator("#prompt").fill("A message that is much longer than the context")
        real.page.locator("#write").click()
        real.page.locator("#error", has_text="shorten them").wait_for()
        assert real.page.locator(".said").all_inner_texts() == ["Hi"]
        assert real.page.locator("#prompt").input_value() == "A message that is much longer than the context"
        real.page.close()
