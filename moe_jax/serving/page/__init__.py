"""The page of the server: type a beginning, and see each token as it comes, coloured by its expert.

It is the live page of `moe_jax.pages.live`. Its transport, `stream.js`, asks the page's own server only:

    GET  v1/models             the model: layers, experts, suggested beginnings, whether it holds conversations
    POST v1/completions        a text, streamed: ids, experts, gates and the likeliest others of every token
    POST v1/chat/completions   an answer in a conversation, streamed alike
"""

from dataclasses import dataclass
from functools import cache

from moe_jax.pages import page_file
from moe_jax.pages.live import live_page

FRAME = "frame-ancestors 'none'"
"""Counts in a header only: browsers ignore it in the document."""


@dataclass(frozen=True)
class Page:
    """What the server answers at `/`."""

    html: bytes
    policy: str
    """The header Content-Security-Policy."""


@cache
def document() -> Page:
    """The page in one file: its own inline script and style, by their digests, and requests to its own server."""
    html, policy = live_page(page_file("moe_jax.serving", "page/stream.js"), "connect-src 'self'")
    return Page(html.encode("ascii"), f"{policy}; {FRAME}")
