"""Checks of chapter 5: dropout, attention, and heads."""

from collections.abc import Iterator

import numpy as np

from foundation import attention, caching, dropout, grouped_heads
from foundation.checks.inputs import Draws, gradient, projection
from foundation.parity import Check


def checks() -> Iterator[Check]:
    """Dropout with given masks; one head under masks, and with dropout; heads with every option; shared key heads."""
    draws = Draws("dropout")
    for case, keep in (("mask", draws.keep(4, 5)), ("all dropped", np.zeros((4, 5), bool)), ("no mask", None)):
        yield gradient(dropout.dropout_forward, case, (draws.normal(4, 5),), keep, 0.25)
    draws = Draws("attention")
    causal, padding = attention.causal_mask(4), np.ones((2, 4, 4), bool)
    padding[0, 2] = padding[1, :, 0] = False
    for case, queries, keys, mask, scale in (
        ("no mask", (2, 4, 3), 4, None, 1.0),
        ("causal", (2, 4, 3), 4, causal, 1.0),
        ("a row sees nothing", (2, 4, 3), 4, padding, 1.0),
        ("a window of 2 and a sink", (2, 5, 3), 5, caching.window_mask(5, 2, 1), 1.0),
        ("one position", (1, 3), 1, attention.causal_mask(1), 1.0),
        ("saturated", (2, 4, 3), 4, causal, 6.0),
        ("fewer queries than keys", (2, 3, 4), 5, None, 1.0),
    ):
        q, (k, v) = draws.normal(*queries, std=scale), draws.normal(2, *queries[:-2], keys, queries[-1], std=scale)
        yield gradient(attention.attention_forward, case, (q, k, v), mask)
    qkv, keep = tuple(draws.normal(3, 2, 4, 3)), draws.keep(2, 4, 4)
    yield gradient(attention.attention_forward, "dropout of the weights", qkv, causal, keep, 0.25)
    yield from multi_head_checks()
    draws = Draws("grouped heads")
    for case, shared, heads in (("groups of two", 2, 4), ("one for all", 1, 3), ("one each", 2, 2)):
        yield gradient(grouped_heads.share_heads_forward, case, (draws.normal(2, shared, 3, 4),), heads)


def multi_head_checks() -> Iterator[Check]:
    """Several heads and one; with biases, rotated, with dropout; key heads that are shared, and normalised."""
    draws, forward = Draws("multi-head attention"), attention.multi_head_forward
    for case, heads, bias, rotary, length in (
        ("plain", 2, False, False, 4),
        ("biases", 2, True, False, 4),
        ("rotary", 2, True, True, 4),
        ("one head", 1, False, True, 3),
        ("one position", 2, True, True, 1),
    ):
        params = attention_params(draws, bias=bias)
        yield gradient(forward, case, (draws.normal(2, length, 8), params), heads, rotary)
    inputs = (draws.normal(2, 3, 8), attention_params(draws, bias=True))
    yield gradient(forward, "dropout of the weights", inputs, 2, False, draws.keep(2, 2, 3, 3), 0.25)
    for case, heads, shared, width, lengths, base in (
        ("grouped keys", 4, 2, 2, (), 10_000.0),
        ("one key head, normalised, base 7", 2, 1, 6, (6, 6), 7.0),
        ("grouped keys normalised together", 4, 2, 4, (16, 8), 10_000.0),
    ):
        params = attention_params(draws, heads * width, shared * width)
        for name, length in zip(("query_norm", "key_norm"), lengths, strict=False):
            params[name] = {"scale": 1.0 + draws.normal(length, std=0.3)}
        yield gradient(forward, case, (draws.normal(2, 4, 8), params), heads, True, None, 0.0, base)


def attention_params(draws: Draws, queries: int = 8, keys: int = 8, bias: bool = False) -> dict:
    """Projections of one layer of width 8, with columns of queries and of keys, of standard deviation 1/2."""
    return {"qkv": projection(draws, 8, queries + 2 * keys, bias), "out": projection(draws, queries, 8, bias)}
