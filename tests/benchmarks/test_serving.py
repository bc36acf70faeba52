"""`benchmark.py serve`: the ratios by hand, and the suite on a tiny model."""

import dataclasses
import io

import pytest
from rich.console import Console

from moe_jax.benchmarks import serving
from moe_jax.benchmarks.request import BenchmarkRequest
from moe_jax.config import RunConfig
from moe_jax.system.machine import Times
from tests.support import tiny


def test_the_ratios() -> None:
    """One text: 4 ms a token with one slot, 10 ms in the server of 16; 16 texts: 1 ms a token."""
    found = serving.serving_numbers(Times((0.004,)), Times((0.010,)), Times((0.001,)))
    assert list(found.values()) == pytest.approx([250, 1000, 4, 10])


def test_the_suite_counts_the_tokens_and_leaves_no_text_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "STREAMS", 2)
    monkeypatch.setattr(serving, "TOKENS", 6)
    made: list[serving.Bench] = []
    true = serving.Bench
    monkeypatch.setattr(serving, "Bench", lambda *given: made.append(true(*given)) or made[0])
    config = dataclasses.replace(RunConfig(), model=tiny.config(vocab_size=300, seq_len=16))
    numbers = serving.serve(Console(file=io.StringIO()), BenchmarkRequest(config, 1, 1))
    assert all(value > 0 for value in numbers.values())
    assert not made[0].many.running
    assert not made[0].one.running
    prompts = made[0].many.counts.prompt_tokens
    assert (prompts > 0, prompts % serving.PROMPT_TOKENS) == (True, 0)
    one = made[0].one.counts
    assert 0 < one.generated_tokens <= 6 * one.texts, "a text has at most TOKENS tokens"
