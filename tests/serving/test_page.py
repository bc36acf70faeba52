"""The page as one document, without a browser: what its policy allows, and that it holds its files."""

import re
from importlib import resources

from moe_jax.pages import ascii_script, digest
from moe_jax.pages.live import SCRIPTS
from moe_jax.serving.page import document


def inline(name: str) -> str:
    """The content of the last element of this name without attributes, found as a browser does."""
    page = document()[0].decode()
    begin = page.rindex(f"<{name}>") + len(f"<{name}>")
    return page[begin : page.index(f"</{name}", begin)]


def test_the_policy_allows_one_style_one_script_and_the_own_server() -> None:
    assert dict(part.split(" ", 1) for part in document()[1].split("; ")) == {
        "default-src": "'none'",
        "style-src": f"'{digest(inline('style'))}'",
        "script-src": f"'{digest(inline('script'))}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "connect-src": "'self'",
        "frame-ancestors": "'none'",
    }


def test_the_document_holds_the_same_policy_for_the_file_that_is_saved() -> None:
    """But for the directive that browsers refuse in a document."""
    page = document()[0].decode()
    (inside,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert f"{inside}; frame-ancestors 'none'" == document()[1]


def test_nothing_is_loaded_and_no_event_is_written_in_the_markup() -> None:
    page = document()[0].decode()
    assert "https://" not in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    markup = page.replace(inline("script"), "").replace(inline("style"), "")
    assert not re.search(r"\s(on\w+|src|style)=", markup)
    assert re.findall(r"<script[^>]*>", markup) == ['<script type="application/json" id="routing-data">', "<script>"]
    assert "innerHTML" not in inline("script")


def test_every_file_of_the_page_is_in_it() -> None:
    live, own = resources.files("moe_jax.pages") / "live", resources.files("moe_jax.serving") / "page"
    scripts = {file.name: file.read_text() for folder in (live, own) for file in folder.iterdir() if "js" in file.name}
    assert set(scripts) == {f"{name}.js" for name in (*SCRIPTS, "stream")}
    for name, text in scripts.items():
        assert ascii_script(text) in inline("script"), name
    assert (live / "style.css").read_text() in inline("style")
