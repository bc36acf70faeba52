"""Modified Kneser-Ney over words: the strongest n-gram baseline for the embedded corpus.

Interpolated modified Kneser-Ney (Chen and Goodman 1998, section 3). With h the n - 1 words before w, h' all of them but
the first, and c the count of an n-gram,

    P(w | h) = (max(c(h w) - D(c(h w)), 0) + (D1 N1(h) + D2 N2(h) + D3 N3(h)) P(w | h')) / c(h)

c is the number of occurrences for the longest n-grams. For the shorter ones it is the number of different words that
stand before them. c(h) is the sum of c(h w) over w. N1, N2 and N3 count the words w with c(h w) = 1, = 2 and >= 3; the
discounts D1, D2, D3 belong to the same counts, and each length has its own. Below the single words stands the
probability of spelling a word. Words, the end of a story, and a context that was never seen are as in `trigram.py`.

The counts are arrays, not dictionaries, so that five words of 20,000 stories take about two seconds.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from moe_jax.data.synthetic.trigram import END, spelling_probability, words_of

ORDER = 5


def kneser_ney_bits_per_byte(train_stories: Iterable[str], valid_stories: Sequence[str], order: int = ORDER) -> float:
    """Code length of the validation stories and their ends under a model of the training stories, in bits, divided by
    the UTF-8 bytes of the validation stories."""
    probabilities = kneser_ney_probabilities(train_stories, valid_stories, order)
    return float(-np.log2(probabilities).sum()) / sum(len(story.encode()) for story in valid_stories)


def kneser_ney_probabilities(train_stories: Iterable[str], valid_stories: Iterable[str], order: int) -> np.ndarray:
    """float64 [words of the validation stories, ends included]: the probability of each word after those before it."""
    number: dict[str, int] = {END: 0}
    seen, asked = (_ngrams(stories, order, number) for stories in (train_stories, valid_stories))
    spelling = np.array([spelling_probability(word) for word in number])
    rows, counts = _distinct(seen, len(number))
    levels = [(rows, counts)]
    while rows.shape[1] > 1:
        rows, counts = _distinct(rows[:, 1:], len(number))  # each different word before it counts once
        levels.append((rows, counts))
    p = spelling[asked[:, -1]]
    for rows, counts in reversed(levels):
        p = _interpolate(rows, counts, asked[:, -rows.shape[1] :], p, len(number))
    return p


def _ngrams(stories: Iterable[str], order: int, number: dict[str, int]) -> np.ndarray:
    """int64 [N, order]: every word with the words before it, as numbers. New words are added to `number`. A story
    begins after `order` - 1 ends, and ends with an end."""
    ids: list[int] = []
    is_word: list[bool] = []
    for story in stories:
        words = [number.setdefault(word, len(number)) for word in words_of(story)]
        ids += [0] * (order - 1) + words + [0]
        is_word += [False] * (order - 1) + [True] * (len(words) + 1)
    if not ids:
        return np.zeros((0, order), np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(np.array(ids, np.int64), order)
    return windows[np.array(is_word[order - 1 :])]


def _packed(rows: np.ndarray, words: int) -> np.ndarray:
    """One number for each row, equal exactly for equal rows."""
    key = np.zeros(len(rows), np.int64)
    for column in rows.T:
        if len(key) and int(key.max()) > np.iinfo(np.int64).max // words - 1:
            key = np.unique(key, return_inverse=True)[1].astype(np.int64)
        key = key * words + column
    return key


def _distinct(rows: np.ndarray, words: int) -> tuple[np.ndarray, np.ndarray]:
    """The different rows, and how often each occurs."""
    _, first, counts = np.unique(_packed(rows, words), return_index=True, return_counts=True)
    return rows[first], counts


def _discounts(counts: np.ndarray) -> np.ndarray:
    """D1, D2 and D3 of n-grams of one length (Chen and Goodman 1998, equation 26).

    With n1 to n4 the numbers of n-grams that occur 1 to 4 times, Y = n1 / (n1 + 2 n2) and Dk = k - (k + 1) Y n(k+1) /
    nk. If nk is 0 or Dk is not positive, Dk is Y: with a discount of 0 a word that is new after a context would have
    probability 0. If n1 is 0, Y is 1/2.
    """
    n = [int((counts == times).sum()) for times in range(5)]
    y = n[1] / (n[1] + 2 * n[2]) if n[1] else 0.5
    found = [k - (k + 1) * y * n[k + 1] / n[k] if n[k] else 0.0 for k in (1, 2, 3)]
    return np.array([d if d > 0 else y for d in found])


def _interpolate(rows: np.ndarray, counts: np.ndarray, asked: np.ndarray, lower: np.ndarray, words: int) -> np.ndarray:
    """P(w | h) of the `asked` n-grams by one line of the formula. `lower` is P(w | h')."""
    both = np.concatenate([rows, asked])
    _, ngram = np.unique(_packed(both, words), return_inverse=True)
    _, context = np.unique(_packed(both[:, :-1], words), return_inverse=True)
    here, there = slice(None, len(rows)), slice(len(rows), None)
    count = np.bincount(ngram[here], counts, minlength=ngram.max() + 1)[ngram[there]]
    discounts, kind = _discounts(counts), np.minimum(counts, 3) - 1
    size = context.max() + 1
    total = np.bincount(context[here], counts, minlength=size)[context[there]]
    saved = np.bincount(context[here], discounts[kind], minlength=size)[context[there]]
    kept = np.where(count > 0, count - discounts[np.minimum(count, 3).astype(int) - 1], 0)
    known = total > 0
    return np.where(known, (kept + saved * lower) / np.where(known, total, 1), lower)
