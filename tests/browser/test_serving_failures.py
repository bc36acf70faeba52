"""What the page says when something fails: one plain line with what to do, and a field only where a key is needed."""

from typing import Any

import pytest

from tests.browser.served import Served
from tests.support.stand_in_server import StandIn

BUSY = "The server is busy and its queue is full. Wait a little, then press Write again."


def line(served: Served) -> str:
    error = served.page.locator("#error")
    error.wait_for()
    assert error.get_attribute("role") == "alert"
    return error.inner_text()


@pytest.mark.parametrize(
    ("status", "message", "said"),
    [
        (503, "the queue is full: 256 texts wait", BUSY),
        (429, "too many requests", BUSY),
        (503, "the server is stopping", "The server is being stopped. Start it again, then press Write."),
        (400, "prompt: token\n<b>9</b> is outside", "The server refused this: prompt: token <b>9</b> is outside"),
        (500, "", "The server failed. Its terminal says more. Press Write to try again."),
    ],
)
def test_a_refusal_is_one_line_and_the_next_try_takes_it_away(
    served: Served, status: int, message: str, said: str
) -> None:
    served.says.refuse = (status, message)
    served.page.locator("#write").click()
    assert line(served) == said
    assert not served.page.locator("#key-row").is_visible()
    assert served.page.locator("#write").inner_text() == "Write"
    served.says.refuse = None
    served.write()
    assert not served.page.locator("#error").is_visible()
    assert len(served.pieces()) == 13


def test_the_end_of_the_connection_keeps_the_text_and_it_can_go_on(served: Served) -> None:
    served.says.cut_after = 4
    served.page.locator("#prompt").fill("Once")
    served.page.locator("#write").click()
    assert line(served) == "The connection ended before the text did. Press Go on to write further from here."
    assert len(served.pieces()) == 5
    served.says.cut_after = None
    served.page.locator("#length").fill("3")
    served.press("#go-on")
    assert len(served.pieces()) == 8


def test_a_failure_within_the_stream_is_said_in_its_words(served: Served) -> None:
    served.says.fail_after = 2
    served.page.locator("#write").click()
    assert line(served).startswith("The server ended the text: the cache is gone. Press Go on")


def test_a_server_that_is_gone(browser: Any, says: StandIn) -> None:
    served = Served(browser, says).ready()
    served.page.route("**/v1/**", lambda route: route.abort())
    served.page.locator("#write").click()
    assert line(served).startswith("The server does not answer. See whether it still runs")
    served.page.unroute("**/v1/**")
    served.write()
    assert not served.page.locator("#error").is_visible()
    served.page.close()


def test_the_key_is_asked_for_once_and_kept_for_this_tab(browser: Any, says: StandIn) -> None:
    says.key = "open sesame"
    served = Served(browser, says)
    assert line(served) == "This server asks for a key. Enter the one that it was started with (--api-key)."
    served.page.locator("#key").fill("wrong")
    served.page.locator("#use-key").click()
    served.page.locator("#error", has_text="does not accept this key").wait_for()
    served.page.locator("#key").fill("open sesame")
    served.page.locator("#key").press("Enter")
    served.ready()
    assert not served.page.locator("#key-row").is_visible()
    served.write()
    served.page.reload()
    served.ready()
    assert not served.page.locator("#key-row").is_visible()
    served.page.close()
