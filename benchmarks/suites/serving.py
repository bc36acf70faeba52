"""What the engine of `serve` does for many texts at once, and for one that comes late."""

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from rich.console import Console

from moe_jax.config import ModelConfig
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.inference.decode import Decoder
from moe_jax.inference.sampling import Sampling
from moe_jax.model.transformer import Params, abstract_model, create, split
from moe_jax.serving.engine import Engine
from moe_jax.serving.texts import Event, TextRequest
from moe_jax.system.machine import Measured, Times, alternate

from .request import BenchmarkRequest, print_numbers, times_table

STREAMS = 16
TOKENS = 64
"""Tokens of each text."""
PROMPT_TOKENS = 8
LATE = 5
"""Late requests in a round."""


def in_parallel(engine: Engine, requests: Sequence[TextRequest]) -> list[list[Event]]:
    """The events of texts that are submitted at once. Waits until all have ended."""
    events: list[list[Event]] = [[] for _ in requests]
    left = itertools.count(len(requests) - 1, -1)
    done = threading.Event()

    def listen(own: list[Event], event: Event) -> None:
        own.append(event)
        if event.finish is not None and next(left) == 0:
            done.set()

    for request, own in zip(requests, events, strict=True):
        request.listener = partial(listen, own)
    engine.submit(requests)
    done.wait()
    return events


class Bench:
    """Two engines over one model: with STREAMS slots, and with one."""

    def __init__(self, model: ModelConfig, params: Params, seq_len: int) -> None:
        graphdef = abstract_model(model)[0]
        merges = [[n // 256, n % 256] for n in range(model.vocab_size - 257)]  # the texts do not matter
        tokenizer = Tokenizer({"kind": "bpe", "merges": merges})
        self._decoder = Decoder(graphdef, seq_len, model.vocab_size, STREAMS, short_prompts=True)
        self._params, self._number, self._vocab_size = params, 0, model.vocab_size
        self.many = Engine(self._decoder, params, tokenizer, queue=STREAMS)
        lone = Decoder(graphdef, seq_len, model.vocab_size, short_prompts=True)
        self.one = Engine(lone, params, tokenizer, queue=1)
        for engine in (self.many, self.one):
            engine.compile()
            engine.start()

    def texts(self, count: int, limit: int | None = None) -> list[TextRequest]:
        """Requests of new texts, of TOKENS tokens unless a limit is given. Each has a prompt of its own."""
        self._number += count
        most = TOKENS if limit is None else limit
        prompts = [[(self._number + n) % self._vocab_size, *range(1, PROMPT_TOKENS)] for n in range(count)]
        return [TextRequest(prompt, Sampling(1.0), 0, self._number + n, most) for n, prompt in enumerate(prompts)]

    def seconds_per_token(self, engine: Engine, count: int) -> Callable[[], Measured]:
        """A call that writes texts at once. A text may end early, so the tokens are counted."""

        def run() -> Measured:
            begin = time.perf_counter()
            events = in_parallel(engine, self.texts(count))
            tokens = sum(len(event.pieces) for text in events for event in text)
            return Measured((time.perf_counter() - begin) / max(1, tokens))

        return run

    def prefill(self) -> Any:
        """Read a prompt, as the engine does it."""
        return self._decoder.read(self._params, list(range(PROMPT_TOKENS))).logits

    def late(self) -> Measured:
        """Seconds from a request to its first token, while all other slots write. The median of LATE requests."""
        running = self.texts(STREAMS - 1, limit=100_000)
        begun = [threading.Event() for _ in running]
        for text, first in zip(running, begun, strict=True):
            text.listener = lambda event, first=first: first.set()
        self.many.submit(running)
        for first in begun:
            first.wait()
        taken = []
        for _ in range(LATE):
            first, (text,) = threading.Event(), self.texts(1, limit=1)
            text.listener = lambda event, first=first: first.set()
            begin = time.perf_counter()
            self.many.submit([text])
            first.wait()
            taken.append(time.perf_counter() - begin)
        self.many.cancel(running)
        return Measured(float(np.median(taken)))

    def stop(self) -> None:
        """End both threads."""
        self.many.stop()
        self.one.stop()


def serve(console: Console, request: BenchmarkRequest) -> dict[str, Any]:
    """The engine of `serve`, in float32: tokens per second of many texts, and the wait of a late one."""
    model = request.config.model
    _, params = split(create(model, jax.random.key(0)))
    bench = Bench(model, params, model.seq_len)
    one, same, many = "1 text, 1 slot", f"1 text, {STREAMS} slots", f"{STREAMS} texts, {STREAMS} slots"
    calls = {
        one: bench.seconds_per_token(bench.one, 1),
        same: bench.seconds_per_token(bench.many, 1),
        many: bench.seconds_per_token(bench.many, STREAMS),
        "prefill": bench.prefill,
        "first token of a late text": bench.late,
    }
    times = alternate(calls, request.rounds)
    numbers = serving_numbers(times[one], times[same], times[many])
    own = times["prefill"].median + STREAMS * times[many].median  # a step writes a token for each of the texts
    numbers["late_first_token_over_prefill_and_step"] = times["first token of a late text"].median / own
    bench.stop()
    console.print(times_table(f"seconds a token; {PROMPT_TOKENS} tokens of prompt, {TOKENS} of text", times))
    print_numbers(console, numbers)
    return numbers


def serving_numbers(one: Times, same: Times, many: Times) -> dict[str, Any]:
    """Tokens per second, and how much faster many texts are than one: with one slot, and in the same server."""
    return {
        "one_text_tokens_per_second": 1 / one.median,
        f"{STREAMS}_texts_tokens_per_second": 1 / many.median,
        f"{STREAMS}_texts_over_one": one.median / many.median,
        f"{STREAMS}_texts_over_one_of_the_same_server": same.median / many.median,
    }
