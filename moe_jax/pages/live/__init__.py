"""The live page: type a beginning, and see each token as it comes, coloured by its expert.

`serve` sends it, and `export --to html` writes it with the model inside. The two differ in where the tokens come from,
a script of each (`events.js` says what it must have).

"Save as routing.html" writes the page itself with the text in its element `routing-data`, as one JSON object:

    schema     1
    at         the day
    model      the entry of v1/models
    settings   temperature, seed
    view       layer (counted among those with experts), colour, numbers
    turns      role; text (of a user); finish; tokens: id, piece, logprob, others, experts, gates, given: see `state.js`
"""

from typing import Any

from moe_jax.config import RunConfig
from moe_jax.pages import (
    ascii_script,
    ascii_style,
    filled,
    page_file,
    page_script,
    page_style,
    security_policy,
)

SCRIPTS = ("state", "loads", "text", "card", "glance", "events", "write", "actions", "save", "main")
MAX_TOKENS = 4096
"""Most tokens of one text."""


def live_page(transport: str, *policy: str, charset: str = "utf-8", data: str = "") -> tuple[str, str]:
    """The page in ASCII, and its content security policy.

    `transport` is the script that brings the tokens, `policy` the directives that it needs, and `data` further elements
    before the script.
    """
    own = [page_file("moe_jax.pages", f"live/{name}.js") for name in SCRIPTS]
    script = ascii_script(page_script([transport, *own]))
    style = ascii_style(page_style(page_file("moe_jax.pages", "live/style.css")))
    allowed = security_policy(style, script, *policy)
    markup = page_file("moe_jax.pages", "live/index.html").encode("ascii", "xmlcharrefreplace").decode()
    parts = {"charset": charset, "policy": allowed, "style": style, "data": data, "script": script}
    return filled(markup, parts), allowed


def model_entry(name: str, config: RunConfig, vocab_size: int, summary: dict[str, Any]) -> dict[str, Any]:
    """What the page must know of a model: the entry of /v1/models. `summary` is that of the run."""
    model, opening = config.model, summary.get("opening")  # earlier runs have only one
    routed = model.dense == "none"
    about = {
        "layers": model.layers,
        "expert_layers": list(range(model.layers)) if routed else [],
        "experts": model.experts if routed else 0,
        "experts_per_token": model.routing.top_k if routed else 0,
        "context": model.seq_len,
        "vocab_size": vocab_size,
        "chat": config.data.format == "chat",
        "prompts": summary.get("openings") or ([opening] if opening else []),
        "val_bits_per_byte": summary.get("val_bits_per_byte"),
        "max_tokens": MAX_TOKENS,
    }
    return {"id": name, "moe_jax": about}
