"""How much texts repeat themselves and each other, counted on words, so that vocabularies do not matter.

Shares of n-grams depend on how much text there is: more text repeats more. So two collections are compared only where
text by text they have as many words (`draws_like`).
"""

import re
from collections.abc import Iterable, Sequence

type Words = Sequence[str]

_WORD = re.compile(r"\w+(?:['’]\w+)*")


def words(text: str) -> list[str]:
    """The words in lower case, without punctuation: "Don't, Tim!" gives don't and tim."""
    return _WORD.findall(text.lower())


def repetition(texts: Iterable[Words], n: int) -> float:
    """Share of the n-grams that stood in the same text before: 1 - distinct / all, by text (seq-rep-n of Welleck et
    al. 2020), all texts' n-grams together. NaN where there is none."""
    grams = [_grams(text, n) for text in texts]
    return 1 - _share(sum(len(set(g)) for g in grams), sum(map(len, grams)))


def distinct(texts: Iterable[Words], n: int) -> float:
    """Different n-grams of all texts over all their n-grams (distinct-n of Li et al. 2016). NaN where
    there is none."""
    grams = [gram for text in texts for gram in _grams(text, n)]
    return _share(len(set(grams)), len(grams))


def draws_like(texts: Sequence[Words], stories: Iterable[Words], most: int) -> list[list[Words]]:
    """Up to `most` collections with as many words as `texts`, text by text: each a story, cut to that length. No
    story is used twice; fewer collections, down to none, where the stories run out."""
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
