"""The page of the server: type a beginning, and see each token as it comes, coloured by its expert.

`document` joins markup, style and scripts of this folder with the parts that the routing report has too
(`moe_jax/pages/`). The page asks its own server only:

    GET  v1/models             the model: layers, experts, suggested beginnings, whether it holds conversations
    POST v1/completions        a text, streamed: ids, experts, gates and the likeliest others of every token
    POST v1/chat/completions   an answer in a conversation, streamed alike

"Save as routing.html" writes the page itself with the text in its element `routing-data`, as one JSON object:

    schema     1
    at         the day
    model      the entry of v1/models
    settings   temperature, seed
    view       layer (counted among those with experts), colour, numbers
    turns      role; text (of a user); finish; tokens: id, piece, logprob, others, experts, gates, given: see `state.js`
"""

from dataclasses import dataclass
from functools import cache

from moe_jax.pages.assembly import filled, page_file, page_script, page_style, security_policy

SCRIPTS = ("state", "loads", "text", "card", "glance", "stream", "write", "actions", "save", "main")
CONNECT = "connect-src 'self'"
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
    style, script = page_style("moe_jax.serving"), page_script("moe_jax.serving", SCRIPTS)
    policy = security_policy(style, script, CONNECT)
    parts = {"policy": policy, "style": style, "script": script}
    html = filled(page_file("moe_jax.serving", "page/index.html"), parts)
    return Page(html.encode(), f"{policy}; {FRAME}")
