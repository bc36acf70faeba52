"""Reference values for a loss: the scores of n-gram models over words, and the entropy floor of the embedded corpus.

Each n-gram model is an interpolated modified Kneser-Ney model (Chen and Goodman 1998, section 3). With h the n - 1
words before w, h' all of them but the first, and c the count of an n-gram,

    P(w | h) = (max(c(h w) - D(c(h w)), 0) + (D1 N1(h) + D2 N2(h) + D3 N3(h)) P(w | h')) / c(h)

c is the number of occurrences for the longest n-grams. For the shorter ones it is the number of different words that
stand before them. c(h) is the sum of c(h w) over w. N1, N2 and N3 count the words w with c(h w) = 1, = 2 and >= 3; the
discounts D1, D2, D3 belong to the same counts, and each length has its own. After a context that was never seen,
P(w | h) = P(w | h'). Single words back off to the probability S(w) of spelling a word: each of its bytes, and its end,
has probability 1/257. So S sums to 1 over all byte strings, and a word that was never seen has a probability.

A word is a run of letters with the space before it, or any other single character. So the words of a text, joined, are
the text, byte for byte. The empty word ends a document.

The counts are arrays, not dictionaries, so that five words of 20,000 stories take about two seconds.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass

import numpy as np

from moe_jax.config import DataConfig
from moe_jax.data.token_store import Split, TokenStore, stored_documents
from moe_jax.system.files import json_text, write_atomically
from moe_jax.system.terminal import working

END = ""
"""The word that ends a document. It also stands before the first word, as context."""

_WORD = re.compile(r" ?[^\W\d_]+|.", re.DOTALL)

TRAIN_BYTES, VALID_BYTES = 10_000_000, 1_000_000
"""The n-gram models count and score the beginning of a longer text only, to stay within seconds and 600 MB."""
ORDERS = (1, 3, 5)


@dataclass(frozen=True)
class CorpusBaselines:
    """Scores on the validation text, in bits per UTF-8 byte. Each n-gram model has counted the training text, and
    predicts words."""

    unigram: float
    """The score of a model that knows how often each word occurs, and nothing else."""
    trigram: float
    """The score of a model that sees the two words before."""
    kneser_ney_5gram: float
    """The score of a model that sees the four words before."""
    entropy_floor: float | None = None
    """Exact code length of the embedded stories under the grammar that wrote them. On average no model scores lower.
    None for any other text."""

    def describe(self) -> str:
        """The scores in one sentence."""
        ngrams = (
            f"n-gram models of the training text score {self.unigram:.4f} bits/byte by counting words, "
            f"{self.trigram:.4f} with two words before, {self.kneser_ney_5gram:.4f} with four"
        )
        return ngrams if self.entropy_floor is None else f"the best possible is {self.entropy_floor:.4f}; {ngrams}"


def corpus_baselines(
    data: DataConfig, store: TokenStore, meanwhile: Callable[[], object] | None = None
) -> CorpusBaselines | None:
    """The scores for a corpus, cached in `references.json` beside its tokens. None for conversations.

    If they are not cached, they take some seconds of one core. `meanwhile` is called in a thread then. Its errors are
    ignored.
    """
    if store.valid.answers is not None:
        return None
    path = store.folder / "references.json"
    try:
        return CorpusBaselines(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        with working("scoring n-gram models of the text, to compare with"), ThreadPoolExecutor(1) as thread:
            if meanwhile is not None:
                thread.submit(meanwhile)
            scores = _scores(data, store)
        with suppress(OSError):  # a cache that cannot be written: they are computed again the next time
            write_atomically(path, json_text(asdict(scores)))
        return scores


def _scores(data: DataConfig, store: TokenStore) -> CorpusBaselines:
    """From the stored tokens: the source may need a network, and may have been edited."""
    embedded, floor = data.source == "stories", None

    def documents(split: Split, most: int) -> Iterator[str]:
        if embedded:
            return stored_documents(split.tokens, store.tokenizer)
        tokens = split.tokens[: 2 * most]  # a token has a byte or more
        return first_documents(stored_documents(tokens, store.tokenizer), most)

    if embedded:
        from moe_jax.data.synthetic.stories import VALIDATION_STORIES, entropy_floor_bits_per_byte

        floor = entropy_floor_bits_per_byte(data.stories_seed, "valid", VALIDATION_STORIES)
    return ngram_baselines(documents(store.train, TRAIN_BYTES), list(documents(store.valid, VALID_BYTES)), floor)


def first_documents(documents: Iterable[str], most_bytes: int) -> Iterator[str]:
    """The documents, until they have `most_bytes` together. The first is given out whatever its size."""
    size = 0
    for document in documents:
        size += len(document.encode())
        if size > most_bytes and size > len(document.encode()):
            return
        yield document


def ngram_baselines(train: Iterable[str], valid: Sequence[str], floor: float | None = None) -> CorpusBaselines:
    """The scores of the n-gram models of some training documents on some validation documents: the code length of the
    documents and their ends in bits, divided by the UTF-8 bytes of the documents."""
    size = sum(len(document.encode()) for document in valid)
    bits = [float(-np.log2(p).sum()) for p in ngram_probabilities(train, valid, ORDERS)]
    return CorpusBaselines(*(score / size for score in bits), entropy_floor=floor)


def words_of(text: str) -> list[str]:
    """The words of a text. Joined, they give the text."""
    return _WORD.findall(text)


def spelling_probability(word: str) -> float:
    """S(w), which sums to 1 over all byte strings: uniform over 256 bytes and the end of the word."""
    return 257.0 ** -(len(word.encode()) + 1)


def ngram_probabilities(train: Iterable[str], valid: Iterable[str], orders: Sequence[int]) -> list[np.ndarray]:
    """For each order n, float64 [words of the validation documents, ends included]: the probability of each word under
    a model that sees the n - 1 words before."""
    longest, number = max(orders), {END: 0}
    counted, scored = (_ngrams(documents, longest, number) for documents in (train, valid))
    spelling = np.array([spelling_probability(word) for word in number])
    return [_probabilities(counted[:, -n:], scored[:, -n:], spelling) for n in orders]


def _probabilities(counted: np.ndarray, scored: np.ndarray, spelling: np.ndarray) -> np.ndarray:
    """float64 [Q]: the probability of the last word of each n-gram of `scored` int64 [Q, n], by the model that has
    counted the n-grams `counted` int64 [N, n]. `spelling` float64 [W] is S of each word."""
    words = len(spelling)
    rows, counts = _distinct(counted, words)
    levels = [(rows, counts)]
    while rows.shape[1] > 1:
        rows, counts = _distinct(rows[:, 1:], words)  # each different word before it counts once
        levels.append((rows, counts))
    p = spelling[scored[:, -1]]
    for rows, counts in reversed(levels):
        p = _interpolate(rows, counts, scored[:, -rows.shape[1] :], p, words)
    return p


def _ngrams(documents: Iterable[str], order: int, number: dict[str, int]) -> np.ndarray:
    """int64 [N, order]: every word with the words before it, as numbers. New words are added to `number`. A document
    begins after `order` - 1 ends, and ends with an end."""
    ids: list[int] = []
    is_word: list[bool] = []
    for document in documents:
        words = [number.setdefault(word, len(number)) for word in words_of(document)]
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
    discounts = [k - (k + 1) * y * n[k + 1] / n[k] if n[k] else 0.0 for k in (1, 2, 3)]
    return np.array([d if d > 0 else y for d in discounts])


def _interpolate(rows: np.ndarray, counts: np.ndarray, scored: np.ndarray, lower: np.ndarray, words: int) -> np.ndarray:
    """P(w | h) of the `scored` n-grams by one line of the formula. `lower` is P(w | h')."""
    both = np.concatenate([rows, scored])
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
