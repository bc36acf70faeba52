"""A tiny model that serves: byte tokenizer, T = 32, three slots, and the texts that `generate` writes with it."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from moe_jax.inference.decode import Decoder, TextGenerator
from moe_jax.inference.sampling import Sampling
from moe_jax.runs.load import LoadedRun
from moe_jax.serving.engine import Engine
from moe_jax.serving.texts import Event, TextRequest
from tests.support import tiny
from tests.support.saved_run import unsaved_run

SLOTS, T, SEPARATOR = 3, 32, 256
QUEUE = 5
PROMPT = [SEPARATOR, *b"One"]
GREEDY = Sampling(temperature=0.0)


@functools.lru_cache
def run(tuned: bool = False) -> LoadedRun:
    return unsaved_run(tiny.config(vocab_size=257, seq_len=T), tuned=tuned)


@functools.lru_cache
def decoder() -> Decoder:
    """Its programs are compiled once for all tests of a process."""
    return Decoder(run().graphdef, T, 257, SLOTS, short_prompts=True)


@functools.lru_cache
def generator() -> TextGenerator:
    return TextGenerator(run().graphdef, run().params, run().tokenizer, T)


@contextmanager
def engine(**options: Any) -> Iterator[Engine]:
    """A running engine, which is stopped at the end."""
    made = Engine(decoder(), run().params, run().tokenizer, **({"queue": QUEUE} | options))
    made.start()
    try:
        yield made
    finally:
        made.stop()


def generated(request: TextRequest) -> str:
    """The text that `generate` writes. Stop strings are for the caller."""
    pieces = generator().pieces(
        request.prompt, request.settings, seed=request.seed, number=request.number, limit=request.limit
    )
    return "".join(pieces)


def text(events: Sequence[Event]) -> str:
    return "".join(piece.text for event in events for piece in event.pieces)


def endless(**options: Any) -> TextRequest:
    """A text that goes on for thousands of steps: greedy, in a loop without the separator."""
    return TextRequest(PROMPT, GREEDY, 0, 0, 4000, **options)
