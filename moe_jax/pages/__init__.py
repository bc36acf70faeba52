"""Pages of one file: what the routing report, the page of the server and the page with a model inside share.

    parts/        style and scripts of all: colours of experts, chips of tokens, bars, builders of elements
    live/         the page on which a text is written, of `serve` and of `export --to html`

A page is written as separate files in a folder of its package, and joined here into one document that loads nothing.
The style and the script stand inside the document. Its content security policy allows these two by their digests and
no other, so text that slipped into the markup could not run.
"""

import base64
import hashlib
from collections.abc import Callable, Iterable, Mapping
from importlib import resources

SHARED_STYLE = "shared.css"
SHARED_SCRIPTS = ("build", "colours", "chips")


def page_file(package: str, name: str) -> str:
    """The text of a file in a folder of a package, such as `moe_jax.inspection` and `page/index.html`."""
    return (resources.files(package) / name).read_text(encoding="utf-8")


def page_style(own: str) -> str:
    """The shared style, then that of a page, whose rules win."""
    return page_file("moe_jax.pages", f"parts/{SHARED_STYLE}") + own


def page_script(own: Iterable[str]) -> str:
    """One strict script in a scope of its own: the shared scripts, then those of a page in this order."""
    shared = [page_file("moe_jax.pages", f"parts/{name}.js") for name in SHARED_SCRIPTS]
    return '"use strict";\n(() => {\n' + "\n".join([*shared, *own]) + "})();\n"


def ascii_script(script: str) -> str:
    """The same script in ASCII. Its other characters may stand in strings, patterns and comments."""
    return _in_ascii(script, lambda code: f"\\u{code:04x}")


def ascii_style(style: str) -> str:
    """The same style in ASCII. Its other characters may stand in strings and comments."""
    return _in_ascii(style, lambda code: f"\\{code:06x}")


def _in_ascii(text: str, escaped: Callable[[int], str]) -> str:
    """The text with each UTF-16 unit beyond ASCII as `escaped` writes it."""
    units = text.encode("utf-16-be")
    codes = (int.from_bytes(units[i : i + 2]) for i in range(0, len(units), 2))
    return "".join(chr(code) if code < 128 else escaped(code) for code in codes)


def security_policy(style: str, script: str, *more: str) -> str:
    """The content security policy of a document with this inline style and script: nothing else, and no network.

    `more` are further directives, such as `connect-src 'self'`.
    """
    directives = ("default-src 'none'", f"style-src '{digest(style)}'", f"script-src '{digest(script)}'")
    return "; ".join((*directives, "img-src data:", "base-uri 'none'", "form-action 'none'", *more))


def digest(content: str) -> str:
    """The name that a content security policy gives to the content of an inline element."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def filled(markup: str, parts: Mapping[str, str]) -> str:
    """The markup with each `{{name}}` replaced by `parts[name]`. What is put in is not searched again."""
    before, *rest = markup.split("{{")
    joined = [before]
    for piece in rest:
        name, _, after = piece.partition("}}")
        joined += [parts[name], after]
    return "".join(joined)
