"""The page of the server: type a beginning, and see each token as it comes, coloured by its expert.

It is the live page of `moe_jax.pages.live`. Its transport, `stream.js`, asks the page's own server only:

    GET  v1/models             the model: layers, experts, suggested beginnings, whether it holds conversations
    POST v1/completions        a text, streamed: ids, experts, gates and the likeliest others of every token
    POST v1/chat/completions   an answer in a conversation, streamed alike
"""

from functools import cache

from moe_jax.pages import page_file
from moe_jax.pages.live import live_page


@cache
def document() -> tuple[bytes, str]:
    """The page in one file, and its header Content-Security-Policy: its own inline script and style, by their digests,
    and requests to its own server."""
    html, policy = live_page(page_file("moe_jax.serving", "page/stream.js"), "connect-src 'self'")
    return html.encode("ascii"), f"{policy}; frame-ancestors 'none'"  # browsers ignore the latter in a document
