"""How much texts repeat themselves and each other. Words are counted, so tokenizers do not matter.

Shares of n-grams depend on the amount of text: more text repeats more. So two collections are compared only if their
texts have the same numbers of words, text by text (`matched_draws`).
"""

import re
from collections.abc import Iterable, Sequence

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
