"""What a trained model writes: texts at fixed prompts and seeds, and how much its texts repeat and vary.

    uv run python benchmarks/write_samples.py --run runs/nano

The measured texts are written without a prompt, so they begin like validation texts. They are compared with draws of
validation texts that are cut to the same numbers of words, text by text, because more text repeats more. The spread of
the draws shows how large a difference is chance. Words are counted, so tokenizers do not matter.
"""

import argparse
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_jax.cli.main import main
from moe_jax.config import ConfigError
from moe_jax.system import environment
from moe_jax.system.files import json_text

if TYPE_CHECKING:
    from moe_jax.inference.decode import TextGenerator
    from moe_jax.inference.sampling import Sampling
    from moe_jax.runs.load import LoadedRun

type Words = Sequence[str]

_WORD = re.compile(r"\w+(?:['’]\w+)*")


def words(text: str) -> list[str]:
    """The words in lower case, without punctuation: "Don't, Tim!" gives don't and tim."""
    return _WORD.findall(text.lower())


def repetition(texts: Iterable[Words], n: int) -> float:
    """Share of the n-grams that occurred earlier in the same text (seq-rep-n of Welleck et al. 2020).

    It is 1 - distinct / all. Both counts are taken in each text and summed over the texts. NaN without n-grams.
    """
    grams = [_grams(text, n) for text in texts]
    return 1 - _share(sum(len(set(g)) for g in grams), sum(map(len, grams)))


def distinct(texts: Iterable[Words], n: int) -> float:
    """Number of different n-grams of all texts, divided by the number of all n-grams (distinct-n of Li et al. 2016).

    NaN without n-grams.
    """
    grams = [gram for text in texts for gram in _grams(text, n)]
    return _share(len(set(grams)), len(grams))


def matched_draws(texts: Sequence[Words], stories: Iterable[Words], most: int) -> list[list[Words]]:
    """At most `most` draws of stories. In each draw, story i is cut to the number of words of `texts[i]`.

    No story is used twice. There are fewer draws, or none, if not enough stories are long enough.
    """
    pool = list(stories)
    draws: list[list[Words]] = []
    while len(draws) < most:
        draw: list[Words] = []
        for text in texts:
            found = next((i for i, story in enumerate(pool) if len(story) >= len(text)), None)
            if found is None:
                return draws
            draw.append(pool.pop(found)[: len(text)])
        draws.append(draw)
    return draws


def _grams(text: Words, n: int) -> list[tuple[str, ...]]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


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
    generator: "TextGenerator", prompt: str, settings: "Sampling", *, seed: int, number: int = 0, limit: int
) -> str:
    """A whole text, its prompt included. `generate --prompt --seed` writes the same text."""
    return prompt + "".join(generator.pieces(prompt, settings, seed=seed, number=number, limit=limit))


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


def open_writer(folder: str, step: int | None) -> "tuple[LoadedRun, TextGenerator]":
    """A run, and what writes with its model. Raises ConfigError for a run that was trained on conversations."""
    from moe_jax.inference.decode import TextGenerator
    from moe_jax.runs.load import open_run

    run = open_run(folder, step)
    if run.config.data.format == "chat":
        raise ConfigError(f"--run {folder}: was trained on conversations; name the run that it was tuned from")
    return run, TextGenerator(run.writer, run.params, run.tokenizer, run.config.model.seq_len)


def run(argv: Sequence[str]) -> int:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--run", required=True, help="folder of a run")
    parser.add_argument("--step", type=int, help="step of the checkpoint; the best one unless given")
    parser.add_argument("--out", type=Path, help="page to write; benchmarks/samples/NAME.md of the run unless given")
    parser.add_argument("--texts", type=int, default=32, help="texts without a prompt, for the measures")
    parser.add_argument("--temperature", type=float, default=0.8, help="sampling temperature of all texts")
    parser.add_argument("--max-tokens", type=int, default=400, help="longest text, in tokens")
    asked = parser.parse_args(argv)
    environment.prepare_environment()
    from moe_jax.data.token_store import stored_documents
    from moe_jax.inference.sampling import Sampling

    loaded, generator = open_writer(asked.run, asked.step)
    settings, limit = Sampling(temperature=asked.temperature), asked.max_tokens
    own = [write_text(generator, "", settings, seed=0, number=n, limit=limit) for n in range(asked.texts)]
    store, changed = loaded.validation_text()
    measures = measure(own, stored_documents(store.valid.tokens, loaded.tokenizer))
    texts = [
        (prompt, seed, write_text(generator, prompt, settings, seed=seed, limit=limit))
        for prompt in PROMPTS
        for seed in SEEDS
    ]
    name = Path(asked.run).resolve().name
    about_page = [
        f"`uv run python benchmarks/write_samples.py --run {shlex.quote(asked.run)} --texts {asked.texts} "
        f"--temperature {asked.temperature:g} --max-tokens {limit}`",
        f"checkpoint of step {loaded.checkpoint.step}, preset {loaded.config.preset}; each text below is the text that "
        "`generate` writes for its prompt, seed, temperature and longest length",
        f"measured: the first {WORDS} words of {asked.texts} texts written without a prompt, compared with draws of "
        "validation texts of the same numbers of words. repetition-4 is the share of four-word sequences that occurred "
        "earlier in the same text. distinct-n is the number of different n-word sequences divided by the number of all "
        "n-word sequences of all texts",
        *([f"the validation text: {changed}"] if changed else []),
    ]
    path = asked.out or Path(__file__).parent / "samples" / f"{name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_markdown(f"Samples of {name}", about_page, measures, texts), encoding="utf-8")
    print(path.read_text(encoding="utf-8"))
    print(json_text({name: m.to_json() for name, m in measures.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(run))
