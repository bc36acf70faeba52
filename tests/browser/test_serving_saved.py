"""The file that "Save as routing.html" writes: it opens without a server and shows the same."""

import re
from pathlib import Path
from typing import Any

from moe_jax.pages import digest
from tests.browser.opened import Watched
from tests.browser.served import Served

HOSTILE = "</script><script>window.ran=1</script>"


class Saved(Watched):
    """A saved text, opened from the disk. Requests are refused by the browser, as without a network."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        super().__init__(browser, **options)
        self.page.context.set_offline(True)
        self.page.goto(path.as_uri())
        self.page.locator("#tokens .t").first.wait_for(state="attached")
        self.page.locator("#tokens:not(.writing)").wait_for()


def save(served: Served, folder: Path) -> Path:
    with served.page.expect_download() as download:
        served.page.locator("#save").click()
    assert download.value.suggested_filename == "routing.html"
    download.value.save_as(folder / "routing.html")
    return folder / "routing.html"


def look(page: Any) -> list[Any]:
    """What a reader sees of the text, of the bars, and of the card of each of some tokens."""
    page.locator("#layer").fill("1")
    seen: list[Any] = [page.locator("#tokens").inner_text()]
    seen.append(page.locator("#tokens .t").evaluate_all("(all) => all.map((t) => getComputedStyle(t).backgroundColor)"))
    seen.append(page.locator("#loads").inner_text())
    for i in (0, 5, 9):
        page.locator(f'.t[data-i="{i}"]').click()
        seen.append(page.locator("#card").inner_text().replace(": press one to go on from there", ""))
    page.keyboard.press("Escape")
    return seen


def test_a_saved_text_opens_offline_and_shows_the_same(served: Served, browser: Any, tmp_path: Path) -> None:
    served.says.writes = [" a", HOSTILE, " dragon", "\u202e", " kite"]
    served.write(length=12)
    path = save(served, tmp_path)
    served.page.locator("#layer").focus()
    saved = Saved(browser, path)
    served.page.wait_for_timeout(100)
    assert look(saved.page) == look(served.page)
    assert saved.asked == [path.as_uri()]
    assert saved.said == []
    assert saved.page.evaluate("window.ran") is None
    saved.page.close()


def test_the_policy_of_the_saved_file_is_its_own_script_and_no_network(served: Served, tmp_path: Path) -> None:
    text = save(served.write(), tmp_path).read_text(encoding="utf-8")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    script = text[text.rindex("<script>") + len("<script>") : text.rindex("</script>")]
    assert f"script-src '{digest(script)}'" in policy
    assert "connect-src 'none'" in policy
    assert "unsafe" not in policy
    assert text.count("<script") == text.count("</script") == 2
