"""Checks of chapter 12: what may be cached."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from foundation import caching, latent_attention
from foundation.attention import multi_head_forward
from foundation.checks.inputs import Draws, answer, gradient
from foundation.parity import AnyCheck, compiled

KINDS = np.array([[5, 3, 2], [2, 7, 1], [1, 2, 6], [6, 1, 2], [3, 5, 2], [2, 3, 5]]) / 10.0
"""Six kinds of token, with the probabilities that they give to three experts: every pair of first and second choice."""
PASSES = {
    "none": (False, False),
    "token": (False, True),
    "token, growing": (False, False),
    "choice": (True, True),
    "batch": (True, True),
    "expert": (True, True),
}
"""(content, length): whether the rule leaks, as derived in caching.py."""


def checks() -> Iterator[AnyCheck]:
    """Decoding against attention at once; each rule against a queue that is served by hand; each rule's verdict."""
    for case, heads, prompt, length in (("after one token", 2, 1, 3), ("after a prompt of 3, one head", 1, 3, 5)):
        draws = Draws(f"decode/{case}")
        params = {"qkv": {"kernel": draws.normal(8, 24)}, "out": {"kernel": draws.normal(8, 8)}}
        yield answer(caching.decode, case, at_once, (draws.normal(2, length, 8), params), heads, prompt)
    draws = Draws("latent attention")
    shapes = {"c": (6, 3), "r": (6, 2), "q": (6, 8), "p": (6, 4), "k": (3, 8), "v": (3, 8), "out": (8, 6)}
    inputs = (draws.normal(2, 4, 6), {name: draws.normal(*shape) for name, shape in shapes.items()})
    yield gradient(latent_attention.latent_attention_forward, "two heads", inputs, 2)
    yield answer(latent_attention.absorbed, "two heads", at_once, inputs, 2)
    for window, sinks in ((3, 0), (2, 2), (9, 1)):
        case = f"{window} positions, {sinks} sinks"
        yield answer(caching.window_mask, case, place_by_place, (), 7, window, sinks)
    probs = Draws("kept_choices").generator.dirichlet([1.0] * 4, 9)
    for rule in caching.RULES:
        for factor in (0.5, 1.0):
            yield answer(caching.kept_choices, f"{rule}, factor {factor:g}", served, (probs,), 2, factor, rule)
        yield answer(caching.leaks, rule, lambda *_, v=PASSES[rule]: np.array(v), (KINDS,), 3, 2, 0.75, rule)


def place_by_place(positions: int, window: int, sinks: int) -> np.ndarray:
    """The places that are still in the cache when t is written."""
    mask, kept = np.zeros((positions, positions)), []
    for t in range(positions):
        kept = [s for s in [*kept, t] if s < sinks or t - s < window]
        mask[t, kept] = 1.0
    return mask


def at_once(x: Any, params: dict, heads: int, *prompt: int) -> Any:
    """The attention of chapter 5, with rotary positions; or the latent one, with every head's own keys and values."""
    forward = partial(multi_head_forward, rotary=True) if prompt else latent_attention.latent_attention_forward
    return compiled(lambda x, params: forward(x, params, heads)[0])(x, params)


def served(probs: Any, top_k: int, factor: float, rule: str) -> np.ndarray:
    """The requests of one text in the order in which they are served, and a counter for each expert."""
    p = np.asarray(probs)
    tokens, experts = p.shape
    choices = np.argsort(-p, axis=1)[:, : experts if rule == "expert" else top_k]
    requests = [(t, k, int(e)) for t in range(tokens) for k, e in enumerate(choices[t])]
    order = {
        "choice": lambda r: (r[1], r[0]),
        "batch": lambda r: (r[1], -p[r[0]].max(), r[0]),
        "expert": lambda r: -p[r[0], r[2]],
    }
    kept, given = np.zeros_like(p), np.zeros(experts)
    for t, _, e in sorted(requests, key=order.get(rule, lambda r: r[:2])):
        seen = t + 1 if rule == "token, growing" else tokens
        slots = tokens if rule == "none" else min(seen, max(1, int(np.ceil(factor * seen * top_k / experts))))
        kept[t, e] = given[e] < slots
        given[e] += 1
    return kept
