"""The result of an experiment over seeds, ready to be printed and written: a table, sentences, a record, pictures."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from moe_jax.experiments.intervals import IN_BRACKETS

Figures = Callable[[], dict[str, Any]]
"""Draws pictures, by name. Raises UserError where matplotlib is missing."""


class Report(NamedTuple):
    """A result of `moe-jax compare`."""

    name: str
    """Name of the files, without their ending."""
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    """One row of cells for each model or budget. An empty cell has no number."""
    sentences: list[str]
    record: dict[str, Any]
    """All numbers, as JSON can hold them."""
    scores: dict[str, list[float]]
    """Bits per byte of each seed, by the name of the model. The intervals can be computed from them."""
    figures: Figures

    @property
    def seeds(self) -> int:
        return len(next(iter(self.scores.values())))

    @property
    def columns(self) -> tuple[str, ...]:
        """The headings. One seed gives no intervals, so then no heading names them."""
        return self.headings if self.seeds > 1 else tuple(name.removesuffix(IN_BRACKETS) for name in self.headings)

    def to_markdown(self) -> str:
        """The table, the sentences and the scores of the seeds."""
        sentences = "".join(f"- {sentence}\n" for sentence in self.sentences)
        headings = ("bits per byte", *(f"seed {seed}" for seed in range(self.seeds)))
        scores = [(name, *(f"{score:.4f}" for score in own)) for name, own in self.scores.items()]
        return f"{table(self.columns, self.rows)}\n{sentences}\n{table(headings, scores)}"


def table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
