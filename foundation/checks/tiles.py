"""Checks of chapters 11 and 12: attention in tiles, and what may be cached."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from foundation import attention, caching, latent_attention
from foundation import flash_attention as flash
from foundation.checks.inputs import Draws, filled_with
from foundation.parity import COMPILER_OPTIONS, AnyCheck, Check, OracleCheck


def tile_checks() -> Iterator[AnyCheck]:
    """The merge against long arithmetic and against one softmax; tiles of 2 and of 3 of 5 keys, with dropout."""
    draws = Draws("merge_parts")
    ordinary = [draws.normal(5), 0.5 + draws.normal(5) ** 2, draws.normal(5, 3)]
    other = [draws.normal(5), 0.5 + draws.normal(5) ** 2, draws.normal(5, 3)]
    nothing = [np.full(5, -np.inf), np.zeros(5), np.zeros((5, 3))]
    for case, first, second in (
        ("two parts", ordinary, other),
        ("scores beyond e^709", [ordinary[0] + 2000.0, *ordinary[1:]], [other[0] + 1999.0, *other[1:]]),
        ("nothing, then a part", nothing, ordinary),
        ("a part, then nothing", ordinary, nothing),
    ):
        yield OracleCheck("merge_parts", case, flash.merge_parts, unshifted, (*first, *second))
    scores, v = 3.0 * draws.normal(4, 6), draws.normal(6, 2)
    for case, pieces in (
        ("from left to right", ((0, 1), (2, 3, 4), (5,))),
        ("in any order", ((5, 2), (0,), (4, 1, 3))),
    ):
        yield OracleCheck("merged_output", case, flash.merged_output, one_softmax, (scores, v), (pieces,))
    for tile, causal, masked in ((2, True, True), (3, False, False)):
        case = f"tiles of {tile}, {'causal, dropout' if causal else 'no mask'}"
        draws = Draws(f"flash_attention/{case}")
        inputs = tuple(draws.normal(2, 5, 3) for _ in range(3))
        keep = draws.keep(2, 5, 5) if masked else None
        forward = filled_with(flash.flash_attention_forward, keep, 0.25, causal, tile)
        yield Check("flash_attention", case, forward, flash.flash_attention_backward, inputs)


def unshifted(*parts: Any) -> tuple:
    """The same in numbers of 80 bits, which hold e^2000: no piece is shifted before the sum."""
    m1, l1, o1, m2, l2, o2 = (np.asarray(part, np.longdouble) for part in parts)
    largest = np.maximum(m1, m2)
    totals, outputs = (
        np.exp(m1).reshape(-1, *(1,) * (a.ndim - 1)) * a + np.exp(m2).reshape(-1, *(1,) * (a.ndim - 1)) * b
        for a, b in ((l1, l2), (o1, o2))
    )
    scale = np.exp(-largest)
    return tuple(np.asarray(x, np.float64) for x in (largest, totals * scale, outputs * scale[:, None]))


def one_softmax(scores: Any, v: Any, pieces: Any) -> np.ndarray:
    """All keys at once."""
    weights = np.exp(np.asarray(scores) - np.max(scores, axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ np.asarray(v)


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


def cache_checks() -> Iterator[AnyCheck]:
    """Decoding against attention at once; each rule against a queue that is served by hand; each rule's verdict."""
    for case, heads, prompt, length in (("after one token", 2, 1, 3), ("after a prompt of 3, one head", 1, 3, 5)):
        draws = Draws(f"decode/{case}")
        params = {"qkv": {"kernel": draws.normal(8, 24)}, "out": {"kernel": draws.normal(8, 8)}}
        inputs = (draws.normal(2, length, 8), params)
        yield OracleCheck("decode", case, caching.decode, at_once, inputs, (heads, prompt))
    draws = Draws("latent attention")
    shapes = {"c": (6, 3), "r": (6, 2), "q": (6, 8), "p": (6, 4), "k": (3, 8), "v": (3, 8), "out": (8, 6)}
    inputs = (draws.normal(2, 4, 6), {name: draws.normal(*shape) for name, shape in shapes.items()})
    forward = filled_with(latent_attention.latent_attention_forward, 2)
    yield Check("latent_attention", "two heads", forward, latent_attention.latent_attention_backward, inputs)
    yield OracleCheck("absorbed", "two heads", latent_attention.absorbed, with_keys, inputs, (2,))
    for window, sinks in ((3, 0), (2, 2), (9, 1)):
        case = f"{window} positions, {sinks} sinks"
        yield OracleCheck("window_mask", case, caching.window_mask, place_by_place, (), (7, window, sinks))
    probs = Draws("kept_choices").generator.dirichlet([1.0] * 4, 9)
    for rule in caching.RULES:
        for factor in (0.5, 1.0):
            case = f"{rule}, factor {factor:g}"
            yield OracleCheck("kept_choices", case, caching.kept_choices, served, (probs,), (2, factor, rule))
        verdict = np.array(PASSES[rule])
        yield OracleCheck("leaks", rule, caching.leaks, lambda *_, v=verdict: v, (KINDS,), (3, 2, 0.75, rule))


def with_keys(x: Any, params: dict, heads: int) -> Any:
    """Every head's own keys and values, made from the latent."""
    return latent_attention.latent_attention_forward(x, params, heads)[0]


def place_by_place(positions: int, window: int, sinks: int) -> np.ndarray:
    """The places that are still in the cache when t is written."""
    mask, kept = np.zeros((positions, positions)), []
    for t in range(positions):
        kept = [s for s in [*kept, t] if s < sinks or t - s < window]
        mask[t, kept] = 1.0
    return mask


def at_once(x: Any, params: dict, heads: int, prompt: int) -> Any:
    """The attention of chapter 5, with rotary positions."""

    @partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def whole(x: Any, params: dict) -> Any:
        return attention.multi_head_forward(x, params, heads, rotary=True)[0]

    return whole(x, params)


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
