"""A report opened in a real browser, for the tests beside this file."""

import json
from pathlib import Path
from typing import Any

HOSTILE = "</script><script>window.ran=1</script><img src=x onerror=window.ran=1>\n"
WRITING = "A dragon \u05e9\u05dc\u05d5\u05dd \U0001f409 \u202eevil\u202c\n"
E, K, LAYERS = 4, 2, 2


class Watched:
    """A page, with everything that it said and asked for."""

    def __init__(self, browser: Any, **options: Any) -> None:
        self.page = browser.new_page(**({"viewport": {"width": 1280, "height": 900}} | options))
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def tokens(self) -> list[dict[str, str]]:
        """What each token looks like: its computed colours and classes."""
        return self.page.evaluate("""() => [...document.querySelectorAll('.tokens .t')].map((t) => {
            const style = getComputedStyle(t);
            return {fill: style.backgroundColor, hatch: style.backgroundImage, line: style.borderBottomColor,
                    classes: t.className, text: t.textContent};
        })""")

    def press(self, button: str) -> None:
        """Presses a button that writes, and waits for the end of the text."""
        self.page.locator("#status").evaluate("(node) => { node.textContent = ''; }")
        self.page.locator(button).click()
        self.page.locator("#status", has_text="Finished").wait_for(state="attached")

    def colour(self, css: str) -> str:
        """What the browser makes of a colour of the style sheet."""
        return self.page.evaluate(
            """(css) => { const probe = document.createElement('i'); probe.style.setProperty('color', css);
            document.body.append(probe); const it = getComputedStyle(probe).color; probe.remove(); return it; }""",
            css,
        )


class Opened(Watched):
    """A report."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        super().__init__(browser, **options)
        self.page.goto(path.as_uri())
        self.data = json.loads(self.page.locator("#routing-data").text_content())
        self.page.locator("#card > *").first.wait_for(state="attached")

    def expert(self, layer: int, token: int, k: int = 0) -> int:
        return self.data["routing"]["expert"][layer][token * K + k]

    def draw_everything(self) -> None:
        for name in ("experts", "ablation", "flow", "capacity", "training", "attention", "heads"):
            self.page.locator(f"#{name}").scroll_into_view_if_needed()
            self.page.wait_for_timeout(50)


def page_data(path: Path) -> str:
    page = path.read_text(encoding="utf-8")
    begin = page.index('id="routing-data">') + len('id="routing-data">')
    return page[begin : page.index("</script", begin)]
