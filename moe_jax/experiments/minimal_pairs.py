"""How often a model gives the right text of a minimal pair the higher probability, by kind and by distance.

Guessing is right in half of the pairs. An n-gram model of the training text is scored beside the model: it cannot see
a detail that was mentioned more than n - 1 words before.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import batched

import jax
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from moe_jax.config import UserError
from moe_jax.data.ngrams import ngram_probabilities, words_of
from moe_jax.data.synthetic.minimal_pairs import MinimalPair
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.model.kernels.cross_entropy import blocked_token_losses
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import Params, merge

ROWS = 16
"""Texts of one batch."""
NGRAM = 5
DISTANCES = ((1, 8), (9, 16), (17, 32), (33, 1000))
"""First and last distance of each row of the table, in words."""


@dataclass(frozen=True)
class Accuracy:
    """Of the pairs of one row: how many there are, and the share that was judged rightly."""

    row: str
    pairs: int
    model: float
    ngram: float | None
    """None if the training text is not at hand."""


type ScoreStep = Callable[[Params, Int[ArrayLike, "B T"], Int[ArrayLike, "B T"]], Float[Array, "B T"]]


def make_score_step(graphdef: nnx.GraphDef) -> ScoreStep:
    """The jitted (params, inputs, targets) -> log-probability of each target, in nats."""

    def step(params: Params, inputs: Array, targets: Array) -> Array:
        model = merge(graphdef, params)
        hidden, _, _ = model(inputs, Mode.EVALUATE)
        losses = blocked_token_losses(hidden.reshape(-1, hidden.shape[-1]), model.head_matrix(), targets.reshape(-1))
        return -losses.reshape(targets.shape)

    return jax.jit(step)


def text_scores(
    step: ScoreStep,
    params: Params,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    seq_len: int,
    progress: Callable[[int], AbstractContextManager[Callable[[], None]]],
) -> np.ndarray:
    """float64 [N]: the log-probability of each text after a separator, in nats.

    Raises UserError for a text that is longer than the context.
    """
    scores: list[float] = []
    with progress(-(-len(texts) // ROWS)) as advance:
        for rows in batched(texts, ROWS):
            tokens = np.full((ROWS, seq_len + 1), tokenizer.separator_id, np.int32)
            counts = np.zeros(ROWS, np.int32)
            for row, text in enumerate(rows):
                ids = tokenizer.encode(text)
                if len(ids) > seq_len:
                    raise UserError(
                        f"--pairs: a story has {len(ids)} tokens, and the context of this run {seq_len}; "
                        "name a run with a longer context"
                    )
                tokens[row, 1 : len(ids) + 1], counts[row] = ids, len(ids)
            found = np.asarray(step(params, tokens[:, :-1], tokens[:, 1:]), np.float64)
            counted = np.arange(seq_len) < counts[:, None]
            scores += list((found * counted).sum(1)[: len(rows)])
            advance()
    return np.array(scores)


def ngram_scores(train: Iterable[str], texts: Sequence[str]) -> np.ndarray:
    """float64 [N]: the log-probability of each text under an n-gram model of the training documents, in nats."""
    logs = np.log(ngram_probabilities(train, texts, NGRAM))
    ends = np.cumsum([len(words_of(text)) + 1 for text in texts])  # of each text, whose last word is its end
    return np.array([part[:-1].sum() for part in np.split(logs, ends[:-1])])


def table(pairs: Sequence[MinimalPair], model: np.ndarray, ngram: np.ndarray | None) -> list[Accuracy]:
    """The rows: all pairs, then by kind, then by distance. `model` and `ngram` hold the scores of the good texts, then
    those of the bad ones. Equal scores count as half right."""
    right = _right(model)
    beside = None if ngram is None else _right(ngram)

    def row(name: str, chosen: np.ndarray) -> Accuracy:
        other = None if beside is None else float(beside[chosen].mean())
        return Accuracy(name, int(chosen.sum()), float(right[chosen].mean()), other)

    return [row(name, chosen) for name, chosen in _groups(pairs) if chosen.any()]


def _right(scores: np.ndarray) -> np.ndarray:
    good, bad = np.split(scores, 2)
    return np.where(good == bad, 0.5, good > bad)


def _groups(pairs: Sequence[MinimalPair]) -> Iterator[tuple[str, np.ndarray]]:
    kinds, distances = [pair.kind for pair in pairs], np.array([pair.distance for pair in pairs])
    yield "all", np.ones(len(pairs), bool)
    for kind in sorted(set(kinds)):
        yield kind, np.array([kind == other for other in kinds])
    for low, high in DISTANCES:
        name = f"{low} to {high} words" if high < DISTANCES[-1][1] else f"{low} words or more"
        yield name, (distances >= low) & (distances <= high)
