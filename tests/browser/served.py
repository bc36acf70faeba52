"""The server's page opened in a real browser: that of a stand-in server, and that of the real one."""

from typing import Any

from tests.browser.opened import Watched
from tests.support.stand_in_server import StandIn, experts_of

SEED = 5
"""Of the texts of a real server."""


class Served(Watched):
    """A page of the server, with everything that it said and asked for."""

    def __init__(self, browser: Any, says: StandIn, **options: Any) -> None:
        super().__init__(browser, **options)
        self.says = says
        self.page.goto(says.url)

    def ready(self) -> "Served":
        """Waits until the page knows the model."""
        self.page.locator("#model-name", has_text="dragons").wait_for(state="attached")
        return self

    def write(self, beginning: str = "Once upon a time", length: int = 9) -> "Served":
        """Writes a text, and waits for its end."""
        self.page.locator("#settings").evaluate("(node) => { node.open = true; }")  # closed on a narrow window
        self.page.locator("#length").fill(str(length))
        self.page.locator("#prompt").fill(beginning)
        self.page.locator("#write").click()
        return self.finished()

    def finished(self) -> "Served":
        self.page.locator("#tokens:not(.writing)").wait_for()
        self.page.locator("#status", has_text="Finished").wait_for(state="attached")
        return self

    def press(self, button: str) -> "Served":
        super().press(button)
        return self.finished()

    def pieces(self) -> list[str]:
        return self.page.locator("#tokens .t").all_inner_texts()

    def ids(self) -> list[int]:
        """The ids of all chips, from what they show."""
        return [self.says.id_of(piece) for piece in self.shown_pieces()]

    def shown_pieces(self) -> list[str]:
        """The chips with the space before them, as the stand-in's vocabulary has them."""
        return self.page.locator("#tokens .t").evaluate_all(
            "(nodes) => nodes.map((t) => (t.previousSibling?.nodeType === 3 ? ' ' : '') + t.textContent)"
        )

    def assert_coloured(self, layer: int, ids: list[int | None]) -> None:
        """Fill and line of every chip are those of its first and second choice; None: its experts are not known."""
        tint = float(self.page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--tint')")[:-1])
        tokens = self.tokens()
        assert len(tokens) == len(ids)
        for i, (token, chip) in enumerate(zip(ids, tokens, strict=True)):
            if token is None:
                assert chip["fill"] == "rgba(0, 0, 0, 0)", i
                continue
            first, second = experts_of(token)[layer]
            fill = self.colour(f"var(--e{first})").replace("rgb(", "rgba(").replace(")", f", {tint / 100:g})")
            assert (chip["fill"], chip["line"]) == (fill, self.colour(f"var(--e{second})")), (i, chip)

    def card(self) -> str:
        return self.page.locator("#card").inner_text()


class Real(Watched):
    """The page of a real server."""

    def __init__(self, browser: Any, port: int) -> None:
        super().__init__(browser)
        self.page.goto(f"http://127.0.0.1:{port}/")
        self.page.locator("#model-name", has_text="tiny").wait_for(state="attached")
        self.page.locator("#seed").fill(str(SEED))
        self.page.locator("#temperature").fill("1")

    def write(self, text: str, length: int) -> None:
        self.page.locator("#length").fill(str(length))
        self.page.locator("#prompt").fill(text)
        self.press("#write")

    def first_choices(self, layer: int) -> list[int | None]:
        """The number below each chip."""
        self.page.locator("#layer").fill(str(layer))
        numbers = "(all) => all.map((t) => ('expert' in t.dataset ? Number(t.dataset.expert) : null))"
        return self.page.locator("#tokens .t").evaluate_all(numbers)
