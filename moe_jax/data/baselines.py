"""Reference values for a loss: the scores of n-gram models, and the entropy floor of the embedded corpus."""

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass

from moe_jax.config import DataConfig
from moe_jax.data.corpora import open_corpus
from moe_jax.data.streams import stored_documents
from moe_jax.data.token_store import TokenStore
from moe_jax.system.console import working
from moe_jax.system.files import write_atomically
from moe_jax.system.json_text import json_text

TRAIN_BYTES, VALID_BYTES = 10_000_000, 1_000_000
"""The n-gram models count and score the beginning of a longer text only, to stay within seconds and 600 MB."""
ORDERS = (1, 3, 5)


@dataclass(frozen=True)
class CorpusBaselines:
    """Scores on the validation text, in bits per UTF-8 byte. Each n-gram model has counted the training text, and
    predicts words (`ngrams.py`)."""

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


def ngram_baselines(train: Iterable[str], valid: Iterable[str]) -> CorpusBaselines:
    """The scores of the n-gram models of some training documents on some validation documents."""
    from moe_jax.data.ngrams import ngram_bits_per_byte

    return CorpusBaselines(*ngram_bits_per_byte(train, list(valid), ORDERS))


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
            found = _embedded(data) if data.source == "stories" else _of_any_text(store)
        with suppress(OSError):  # a cache that cannot be written: they are computed again the next time
            write_atomically(path, json_text(asdict(found)))
        return found


def first_documents(documents: Iterable[str], most_bytes: int) -> Iterator[str]:
    """The documents, until they have `most_bytes` together. The first is given out whatever its size."""
    size = 0
    for document in documents:
        size += len(document.encode())
        if size > most_bytes and size > len(document.encode()):
            return
        yield document


def training_documents(data: DataConfig) -> Iterator[str]:
    """The training documents that the n-gram models count. Raises the errors of `open_corpus`."""
    return first_documents(open_corpus(data).documents("train"), TRAIN_BYTES)


def _embedded(data: DataConfig) -> CorpusBaselines:
    from moe_jax.data.ngrams import ngram_bits_per_byte
    from moe_jax.data.synthetic.stories import VALIDATION_STORIES, entropy_floor_bits_per_byte, generate

    valid = list(generate(data.stories_seed, "valid", VALIDATION_STORIES))
    train = generate(data.stories_seed, "train", data.stories)
    scores = ngram_bits_per_byte(train, valid, ORDERS)
    return CorpusBaselines(*scores, entropy_floor=entropy_floor_bits_per_byte(valid))


def _of_any_text(store: TokenStore) -> CorpusBaselines:
    """From the stored tokens: the source may need a network, and may have been edited."""
    train, valid = (
        first_documents(stored_documents(split.tokens[: 2 * most], store.tokenizer), most)  # a token has a byte or more
        for split, most in ((store.train, TRAIN_BYTES), (store.valid, VALID_BYTES))
    )
    return ngram_baselines(train, valid)
