"""What feeds a step: text that becomes tokens, and tokens that become batches."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from moe_jax.config import DataConfig, RunConfig, UserError
from moe_jax.data.batches import train_batch
from moe_jax.data.corpora import open_corpus
from moe_jax.data.tokenizers import Tokenizer, train_tokenizer

CORPUS = DataConfig(source="stories", tokenizer="bpe", vocab_size=2048, stories=4000)
"""The embedded corpus, so that nothing is downloaded; about 2 MB of it."""
STREAM = 2**24
"""Tokens of the stream that batches are cut from."""
GPT2 = "GPT-2"


def tokenizers() -> dict[str, Tokenizer]:
    """By name; that of GPT-2 only where its vocabulary can be had."""
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
    """Stories, and their bytes."""
    texts = list(open_corpus(CORPUS).stories("train"))
    return texts, sum(len(text.encode()) for text in texts)


def batch_call(config: RunConfig, batch_size: int) -> Callable[[], Any]:
    """The next batch of a training run at each call, each of an order that is drawn anew once an epoch."""
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, STREAM).astype(np.uint16)
    steps = itertools.count()
    return lambda: train_batch(tokens, seed=0, step=next(steps), batch_size=batch_size, seq_len=config.model.seq_len)
