"""Checks of chapter 15: laws of the next token, and of texts that are written with a draft, all by enumeration."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from foundation import sampling
from foundation.checks.inputs import Draws, answer
from foundation.parity import AnyCheck


def checks() -> Iterator[AnyCheck]:
    """Filters against a walk down the sorted tokens; the law with a draft against p; a round against its outcomes."""
    draws = Draws("filtered_law")
    logits = draws.normal(7, std=1.5)
    for case, settings in (
        ("temperature alone", (0.7, 0, 1.0, 0.0)),
        ("top-k", (1.0, 3, 1.0, 0.0)),
        ("top-p", (1.0, 0, 0.8, 0.0)),
        ("min-p", (1.3, 0, 1.0, 0.2)),
        ("all filters", (0.9, 5, 0.9, 0.05)),
        ("temperature 0", (0.0, 0, 1.0, 0.0)),
        ("top-p below the first", (1.0, 0, 1e-9, 0.0)),
    ):
        yield answer(sampling.filtered_law, case, walked, (logits,), *settings)
    p, q = (draws.generator.dirichlet([0.6] * 6, 4) for _ in range(2))
    narrow = np.where(np.arange(6) < 3, q, 0.0)
    for case, draft in (
        ("any draft", q),
        ("the same law", p),
        ("a narrow draft", narrow / np.sum(narrow, axis=1, keepdims=True)),
        ("a sure draft", np.eye(6)[:4]),
    ):
        yield answer(sampling.speculative_law, case, lambda p, q: p, (p, draft))
        yield answer(sampling.accepted_mass, case, np.minimum, (p, draft))
    target, draft = (draws.generator.dirichlet([0.6] * 3, 3) for _ in range(2))
    for drafted in (1, 2, 4):
        case = f"texts of 4, {drafted} drafted"
        yield answer(sampling.speculative_texts, case, chain, (target, draft), drafted, 4)
    for drafted in (0, 3):
        yield answer(sampling.tokens_per_round, f"{drafted} drafted", outcomes, (np.array(0.7),), drafted)


def walked(logits: Any, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Down the sorted tokens, one after another."""
    z = np.asarray(logits)
    order = np.argsort(-z)
    kept = np.zeros_like(z)
    if temperature == 0.0:
        kept[order[0]] = 1.0
        return kept
    p = np.exp(z / temperature) / np.sum(np.exp(z / temperature))
    mass = 0.0
    for n, token in enumerate(order):
        if n > 0 and (n == (top_k or len(z)) or mass >= top_p or p[token] < min_p * p[order[0]]):
            break  # no later token passes either
        kept[token] = p[token]
        mass += p[token]
    return kept / kept.sum()


def chain(target: Any, draft: Any, drafted: int, length: int) -> np.ndarray:
    """The law of all texts by the large model alone: a product for each."""
    law = np.asarray(target)
    texts = np.zeros([len(law)] * (length + 1))
    for text in itertools.product(range(len(law)), repeat=length + 1):
        texts[text] = np.prod([law[s, x] for s, x in itertools.pairwise(text)])
    return texts


def outcomes(acceptance: Any, drafted: int) -> float:
    """Each number of accepted proposals, times its probability, plus the token that follows."""
    a = float(acceptance)
    ways = [(accepted + 1) * a**accepted * (1.0 - a if accepted < drafted else 1.0) for accepted in range(drafted + 1)]
    return sum(ways)
