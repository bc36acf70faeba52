"""What a trained model writes: stories at fixed prompts and seeds, and what of its own stories repeats and varies.

Measured are stories that the model tells from nothing, as the validation stories begin from nothing, beside draws of
validation stories cut to the same numbers of words. The spread of the draws says what a difference means.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np

from moe_jax.analysis.text_statistics import Words, distinct, draws_like, repetition, words
from moe_jax.data.token_store import prepare
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.storyteller import Storyteller
from moe_jax.training.run import Run

PROMPTS = (
    "Once upon a time, there was a little",
    "One day, a boy named Tim found a",
    "Lily was sad because",
    '"Can I help you?" asked the',
    "The dog and the cat wanted to",
    "It was raining, so",
)
SEEDS = (0, 1)
MEASURES: dict[str, Callable[[list[Words]], float]] = {
    "repetition_4": lambda texts: repetition(texts, 4),
    "distinct_1": lambda texts: distinct(texts, 1),
    "distinct_2": lambda texts: distinct(texts, 2),
    "distinct_3": lambda texts: distinct(texts, 3),
}
WORDS = 100
"""Of each story, the first, that are measured: of stories without an end few validation stories are as long."""
DRAWS = 20
"""Collections of validation stories that are measured beside the model's."""
POOL = 4000
"""Validation stories, the first, that they are drawn from."""


@dataclass(frozen=True)
class Measure:
    """One share of n-grams: of the model's stories, and of the draws of validation stories."""

    model: float
    text: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        mean = float(np.mean(self.text)) if self.text else None
        spread = [min(self.text), max(self.text)] if self.text else None
        model = self.model if math.isfinite(self.model) else None
        return {"model": model, "text_mean": mean, "text_range": spread, "draws": len(self.text)}


def tell(teller: Storyteller, prompt: str, settings: Sampling, *, seed: int, number: int = 0, limit: int) -> str:
    """A whole story, its prompt included."""
    return prompt + "".join(teller.pieces(prompt, settings, seed=seed, number=number, limit=limit))


def prompted(teller: Storyteller, settings: Sampling, limit: int) -> list[tuple[str, int, str]]:
    """(prompt, seed, story) for each prompt and seed: what `generate --prompt --seed` tells too."""
    return [(p, seed, tell(teller, p, settings, seed=seed, limit=limit)) for p in PROMPTS for seed in SEEDS]


def measure(told: list[str], stories: Iterator[str]) -> dict[str, Measure]:
    """Every measure of the beginnings of the model's stories, and of up to DRAWS collections of as long beginnings of
    validation stories."""
    texts: list[Words] = [words(text)[:WORDS] for text in told]
    draws = draws_like(texts, (words(story) for story in islice(stories, POOL)), DRAWS)
    return {name: Measure(of(texts), tuple(of(draw) for draw in draws)) for name, of in MEASURES.items()}


def validation_stories(run: Run) -> Iterator[str]:
    """The run's own validation stories, from the first on."""
    tokens = prepare(run.config.data, tokenizer=run.tokenizer).valid.tokens
    ends = np.flatnonzero(tokens == run.tokenizer.separator_id)
    for first, end in pairwise(ends):
        yield run.tokenizer.decode(tokens[first + 1 : end].tolist())


def to_markdown(title: str, about: list[str], measures: dict[str, Measure], stories: list[tuple[str, int, str]]) -> str:
    """A page: what was run, the measures as a table, the stories."""
    lines = [f"# {title}", "", *(f"- {line}" for line in about), ""]
    lines += ["| measure | model | validation text | its range |", "|---|---|---|---|"]
    for name, m in measures.items():
        text = "too short to say |"
        if m.text:
            text = f"{np.mean(m.text):.3f} | {min(m.text):.3f} to {max(m.text):.3f} in {len(m.text)} draws"
        lines.append(f"| {name.replace('_', '-')} | {m.model:.3f} | {text} |")
    for prompt, seed, story in stories:
        quoted = "\n".join(f"> {line}".rstrip() for line in story.strip().splitlines())
        lines += ["", f"## {prompt} … (seed {seed})", "", quoted]
    return "\n".join(lines) + "\n"
