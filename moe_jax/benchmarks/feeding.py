"""Calls to time: text becomes tokens, tokens become batches."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from moe_jax.config import DataConfig, RunConfig, UserError
from moe_jax.data.batches import train_positions
from moe_jax.data.corpora import open_corpus
from moe_jax.data.tokenizers import Tokenizer, train_tokenizer

CORPUS = DataConfig(source="stories", tokenizer="bpe", vocab_size=2048, stories=4000)
"""About 2 MB of the embedded stories, so that nothing is downloaded."""
STREAM = 2**24
"""Length in tokens of the stream from which batches are taken."""
GPT2 = "GPT-2"


def tokenizers() -> dict[str, Tokenizer]:
    """The tokenizers by name. GPT-2 is left out if its vocabulary cannot be loaded."""
    corpus = open_corpus(CORPUS)
    found = {
        "bytes": train_tokenizer(DataConfig(tokenizer="byte"), corpus),
        f"BPE of {CORPUS.vocab_size}": train_tokenizer(CORPUS, corpus),
    }
    try:
        return found | {GPT2: train_tokenizer(DataConfig(tokenizer="gpt2"), corpus)}
    except UserError:
        return found


def stories() -> tuple[list[str], int]:
    """The training stories, and their size in bytes."""
    texts = list(open_corpus(CORPUS).documents("train"))
    return texts, sum(len(text.encode()) for text in texts)


def batch_call(config: RunConfig, batch_size: int) -> Callable[[], Any]:
    """Each call makes the next batch of a training run. The order of the windows is new in each epoch."""
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, STREAM).astype(np.uint16)
    steps = itertools.count()

    def call() -> np.ndarray:
        where = train_positions(STREAM, seed=0, step=next(steps), batch_size=batch_size, seq_len=config.model.seq_len)
        return tokens[where].astype(np.int32)

    return call
