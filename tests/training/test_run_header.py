"""The lines at the end of a run, with numbers that can be divided by hand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_jax.training.run_header import print_result

RESULT: dict[str, Any] = {
    "entropy_floor_bits_per_byte": 0.5,
    "kneser_ney_5gram_bits_per_byte": 0.625,
    "trigram_bits_per_byte": 0.75,
    "unigram_bits_per_byte": 1.25,
    "opening": "it's a day",
    "val_bits_per_byte": 0.6,
    "train_drop_fraction": 0.125,
    "train_drop_fraction_worst": 0.25,
    "train_drop_fraction_last": 0.0625,
    "best_step": 40,
    "val_loss": 1.5,
    "val_tokens": 12_345,
    "tokens_seen": 67_890,
    "wall_seconds": 12.4,
}


def said(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> list[str]:
    session: Any = SimpleNamespace(folder=SimpleNamespace(path=Path("runs/x")))
    print_result(session, result)
    return capsys.readouterr().out.splitlines()


def test_the_result_in_three_lines(capsys: pytest.CaptureFixture[str]) -> None:
    score, cost, following = said(RESULT, capsys)
    assert score == (
        "best checkpoint: step 40, validation loss 1.5000 nats/token, 0.6000 bits/byte, 1.200 x the floor of 0.5000 "
        "(5-gram 1.25 x, trigram 1.50 x), on the whole validation stream, 12,345 tokens"
    )
    assert cost == (
        "67,890 tokens in 12 s; dropped in training 12.5% (mean of the steps), 25.0% (worst), 6.2% (last); "
        "everything is in runs/x"
    )
    assert following == "next: uv run python -m moe_jax generate --run runs/x --prompt 'it'\"'\"'s a day'"


def test_without_a_floor_and_without_drops(capsys: pytest.CaptureFixture[str]) -> None:
    score, cost, _ = said(RESULT | {"entropy_floor_bits_per_byte": None, "train_drop_fraction": 0.0}, capsys)
    assert "0.6000 bits/byte (word unigram 1.2500, trigram 0.7500, 5-gram 0.6250), on the whole" in score
    assert cost == "67,890 tokens in 12 s; everything is in runs/x"
