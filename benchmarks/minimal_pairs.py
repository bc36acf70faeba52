"""How often a model gives the right text of a minimal pair the higher probability, by kind and by distance.

    uv run python benchmarks/minimal_pairs.py --run runs/nano

A story of the embedded corpus draws its details once and mentions them again: the friend's name, the colour of the toy.
A pair is a story up to the end of a sentence that mentions a detail again, and the same text with another word of the
same kind in that place. Every other word is equal. A model that remembers the detail gives the first text the higher
probability. This is the method of BLiMP (Warstadt et al. 2020, section 3), with memory in place of grammar.

Guessing is right in half of the pairs. An n-gram model of the training text is scored beside the model: it cannot see
a detail that was mentioned more than n - 1 words before.
"""

import argparse
import dataclasses
import math
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import batched
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from moe_jax.cli.main import main
from moe_jax.config import ConfigError, DataConfig, UserError
from moe_jax.data.baselines import TRAIN_BYTES, NgramModel, first_documents, ngrams
from moe_jax.data.synthetic import stories
from moe_jax.data.synthetic.grammar import Derivation, Grammar, Memory, Options, Slot
from moe_jax.data.synthetic.stories import RULES, SLOTS
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.model.kernels.cross_entropy import blocked_token_losses
from moe_jax.model.moe.layer import Mode
from moe_jax.model.transformer import Params, merge
from moe_jax.runs.load import open_run
from moe_jax.system.files import json_text

PAIRS = 1_000
"""Minimal pairs that are scored. A row of n of them is uncertain by about 1 / sqrt(n), in 19 of 20 cases."""
KINDS = {
    "name": ("hero", "friend", "elder", "animal"),
    "object": ("toy", "prize", "treat", "spot", "clothes"),
    "quality": ("colour", "hue", "look", "texture", "trait", "pattern", "weather", "build"),
    "feeling": ("sad", "happy", "fright"),
    "place": ("place", "scary"),
    "activity": ("game", "skill"),
}
"""What a slot's plain word is."""
FORMS = {"he": "pronoun", "He": "pronoun", "his": "pronoun", "him": "pronoun", "child": "pronoun"}
"""Forms that agree with a word and do not repeat it. An animal's sound, home and food are "knowledge"."""
FROM_ONE_STORY = 4
"""Pairs of each story. They are of different kinds, so that rare kinds have pairs too."""
GRAMMAR = Grammar(RULES, SLOTS)
_SENTENCE_END = re.compile(r"[.!?]\"?")


class Mention(NamedTuple):
    """A place of a text where a slot's word stands: the characters [start, end)."""

    slot: Slot
    start: int
    end: int


def mentions_of(story: Derivation) -> list[Mention]:
    """The mentions of a story in order, from the choices that wrote it."""
    choices = iter(story.choices)
    memory: Memory = {}
    found: list[Mention] = []
    todo, length = list(reversed(GRAMMAR.template)), 0
    while todo:
        node = todo.pop()
        if isinstance(node, Options):
            todo.extend(reversed(node.templates[next(choices)[0]]))
            continue
        if isinstance(node, Slot):
            if node.name not in memory:
                memory[node.name] = GRAMMAR.words(node.name, memory)[next(choices)[0]]
            text = memory[node.name][node.form]
            found.append(Mention(node, length, length + len(text)))
        else:
            text = node
        length += len(text)
    assert length == len(story.text)
    return found


@dataclass(frozen=True)
class MinimalPair:
    """Two texts. `good` is the beginning of a story of the corpus."""

    kind: str
    good: str
    bad: str
    distance: int
    """Words from the last mention of the same detail to this one."""


def minimal_pairs(seed: int, count: int) -> Iterator[MinimalPair]:
    """`count` pairs from stories of the validation split, which no training run has seen. A function of both
    arguments."""
    made, i = 0, 0
    while made < count:
        draw = random.Random(f"{seed} pairs {i}")
        kinds: dict[str, list[MinimalPair]] = {}
        for pair in pairs_of(stories.sample(seed, "valid", i), draw):
            kinds.setdefault(pair.kind, []).append(pair)
        i += 1
        for kind in draw.sample(sorted(kinds), min(FROM_ONE_STORY, len(kinds), count - made)):
            made += 1
            yield draw.choice(kinds[kind])


def pairs_of(story: Derivation, draw: random.Random) -> Iterator[MinimalPair]:
    """A pair for each mention of a detail that was mentioned before. A word must have been there itself; a form that
    agrees with it, such as a pronoun, follows from any of its forms."""
    last: dict[tuple[str, bool], Mention] = {}
    mentions = mentions_of(story)
    # A wrong word that stands elsewhere in the story would be a harder pair.
    present = {story.text[m.start : m.end] for m in mentions if m.slot.form not in FORMS}
    for mention in mentions:
        slot, kind = mention.slot, kind_of(mention.slot)
        repeats = slot.form in ("", "a")
        before = last.get((slot.name, repeats))
        last[slot.name, False] = mention
        if repeats:
            last[slot.name, True] = mention
        if before is None or kind is None:
            continue
        right = story.text[mention.start : mention.end]
        others = sorted({word[slot.form] for word in SLOTS[slot.name]} - {right} - present)
        if not others:
            continue
        end = _SENTENCE_END.search(story.text, mention.end)
        rest = story.text[mention.end : end.end() if end else len(story.text)]
        start = story.text[: mention.start]
        distance = len(story.text[before.end : mention.start].split()) + 1
        yield MinimalPair(kind, start + right + rest, start + draw.choice(others) + rest, distance)


def kind_of(slot: Slot) -> str | None:
    """The kind of a mention. None for words that are not details, such as the food of a supper."""
    if slot.form in FORMS:
        return FORMS[slot.form]
    if slot.name == "animal" and slot.form not in ("", "a"):
        return "knowledge"
    return next((kind for kind, slots in KINDS.items() if slot.name in slots), None)


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
) -> np.ndarray:
    """float64 [N]: the log-probability of each text after a separator, in nats.

    Raises UserError for a text that is longer than the context.
    """
    scores: list[float] = []
    for rows in batched(texts, ROWS):
        tokens = np.full((ROWS, seq_len + 1), tokenizer.separator_id, np.int32)
        counts = np.zeros(ROWS, np.int32)
        for row, text in enumerate(rows):
            ids = tokenizer.encode(text)
            if len(ids) > seq_len:
                raise UserError(
                    f"a story has {len(ids)} tokens, and the context of this run {seq_len}; "
                    "name a run with a longer context"
                )
            tokens[row, 1 : len(ids) + 1], counts[row] = ids, len(ids)
        logs = np.asarray(step(params, tokens[:, :-1], tokens[:, 1:]), np.float64)
        counted = np.arange(seq_len) < counts[:, None]
        scores += list((logs * counted).sum(1)[: len(rows)])
    return np.array(scores)


def ngram_scores(train: Iterable[str], texts: Sequence[str]) -> np.ndarray:
    """float64 [N]: the log-probability of each text under an n-gram model of the training documents, in nats."""
    model = NgramModel(train, NGRAM)
    # The last word of a text is its end, which does not count.
    return np.array([sum(math.log(model.probability(n)) for n in [*ngrams(text, NGRAM)][:-1]) for text in texts])


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


def training_scores(trained: DataConfig, texts: list[str]) -> np.ndarray | None:
    """The scores of texts under an n-gram model of the run's training text. None if that text is not here, or if it is
    conversations."""
    from moe_jax.data.corpora import open_corpus

    if trained.format == "chat":
        return None
    try:
        return ngram_scores(first_documents(open_corpus(trained).documents("train"), TRAIN_BYTES), texts)
    except (ConfigError, UserError):  # it has moved, or needs a network
        return None


def run(argv: Sequence[str]) -> int:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--run", required=True, help="folder of a run")
    parser.add_argument("--step", type=int, help="step of the checkpoint; the best one unless given")
    asked = parser.parse_args(argv)
    loaded = open_run(asked.run, asked.step)
    config = loaded.config
    pairs = list(minimal_pairs(config.data.stories_seed, PAIRS))
    texts = [*(pair.good for pair in pairs), *(pair.bad for pair in pairs)]
    step = make_score_step(loaded.graphdef)
    scores = text_scores(step, loaded.params, texts, loaded.tokenizer, config.model.seq_len)
    rows = table(pairs, scores, training_scores(config.data, texts))
    print(f"{'right of two':<20} {'pairs':>6} {'model':>7} {'5-gram':>7}")
    for row in rows:
        beside = "" if row.ngram is None else f"{row.ngram:.1%}"
        print(f"{row.row:<20} {row.pairs:>6,} {row.model:>7.1%} {beside:>7}")
    print(f"checkpoint of step {loaded.checkpoint.step}; guessing is right in 50 %")
    print("of 100 pairs, 10 % either way may be chance")
    if config.data.source != "stories":
        print("the run was trained on another text than the embedded stories")
    print(json_text({"pairs": [dataclasses.asdict(row) for row in rows]}))
    return 0


if __name__ == "__main__":
    sys.exit(main(run))
