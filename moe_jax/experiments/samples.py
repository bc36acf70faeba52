"""What a trained model writes: texts at fixed prompts and seeds, and how much its texts repeat and vary.

The measured texts are written without a prompt, so they begin like validation texts. They are compared with draws of
validation texts that are cut to the same numbers of words. The spread of the draws shows how large a difference is
chance.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from moe_jax.experiments.text_statistics import Words, distinct, matched_draws, repetition, words
from moe_jax.inference.generate import TextGenerator
from moe_jax.inference.sampling import Sampling

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
"""Only the first words of each text are measured. A model's text may be very long, and few validation texts are."""
DRAWS = 20
"""Most draws of validation texts. Each draw has as many texts as the model has written."""
POOL = 4000
"""The draws are taken from this many first validation texts."""


@dataclass(frozen=True)
class Measure:
    """One share of n-grams: of the model's texts, and of each draw of validation texts."""

    model: float
    text: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        mean = float(np.mean(self.text)) if self.text else None
        spread = [min(self.text), max(self.text)] if self.text else None
        model = self.model if math.isfinite(self.model) else None
        return {"model": model, "text_mean": mean, "text_range": spread, "draws": len(self.text)}


def write_text(
    generator: TextGenerator, prompt: str, settings: Sampling, *, seed: int, number: int = 0, limit: int
) -> str:
    """A whole text, its prompt included."""
    return prompt + "".join(generator.pieces(prompt, settings, seed=seed, number=number, limit=limit))


def prompted(generator: TextGenerator, settings: Sampling, limit: int) -> list[tuple[str, int, str]]:
    """(prompt, seed, text) for each prompt and seed. `generate --prompt --seed` writes the same text."""
    return [(p, seed, write_text(generator, p, settings, seed=seed, limit=limit)) for p in PROMPTS for seed in SEEDS]


def measure(told: list[str], stories: Iterator[str]) -> dict[str, Measure]:
    """Every measure of the first WORDS words of the model's texts, and of at most DRAWS draws of validation texts.

    The texts of a draw are cut to the lengths of the model's texts. A draw without n-grams has no share.
    """
    texts: list[Words] = [words(text)[:WORDS] for text in told]
    draws = matched_draws(texts, (words(story) for story in islice(stories, POOL)), DRAWS)
    shares = {name: (of(texts), [of(draw) for draw in draws]) for name, of in MEASURES.items()}
    return {name: Measure(own, tuple(filter(math.isfinite, drawn))) for name, (own, drawn) in shares.items()}


def to_markdown(title: str, about: list[str], measures: dict[str, Measure], stories: list[tuple[str, int, str]]) -> str:
    """A Markdown page: what was run, the measures as a table, the texts."""
    lines = [f"# {title}", "", *(f"- {line}" for line in about), ""]
    lines += ["| measure | model | validation text, mean | range of the draws |", "|---|---|---|---|"]
    for name, m in measures.items():
        text = "too short to say |"
        if m.text:
            text = f"{np.mean(m.text):.3f} | {min(m.text):.3f} to {max(m.text):.3f} in {len(m.text)} draws"
        lines.append(f"| {name.replace('_', '-')} | {m.model:.3f} | {text} |")
    for prompt, seed, story in stories:
        quoted = "\n".join(f"> {line}".rstrip() for line in story.strip().splitlines())
        lines += ["", f"## {prompt} … (seed {seed})", "", quoted]
    return "\n".join(lines) + "\n"
