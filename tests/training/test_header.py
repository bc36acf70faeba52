"""The lines before and after training, with numbers that can be divided by hand."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from moe_jax.config import TrainConfig
from moe_jax.training.header import plan_line, print_result

RESULT: dict[str, Any] = {
    "entropy_floor_bits_per_byte": 0.5,
    "trigram_bits_per_byte": 0.75,
    "opening": "it's a day",
    "val_bits_per_byte": 0.6,
    "train_drop_fraction": 0.125,
    "best_step": 40,
    "val_loss": 1.5,
    "val_tokens": 12_345,
    "tokens_seen": 67_890,
    "wall_seconds": 12.4,
}


def said(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> list[str]:
    print_result(Path("runs/my x"), result)
    return capsys.readouterr().out.splitlines()


def test_the_result_in_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    score, cost = said(RESULT, capsys)
    assert score == (
        "best checkpoint: step 40, validation loss 1.5000 nats/token, 0.6000 bits/byte, 1.200 x the floor of 0.5000 "
        "(trigram model 1.50 x), on the whole validation stream, 12,345 tokens"
    )
    assert cost == ("67,890 tokens in 12 s; dropped in training 12.5% (mean of the steps); everything is in runs/my x")


# The lines before training


def test_the_plan_of_a_run() -> None:
    """50 steps of 600 tokens in a corpus of 20,000 are one and a half epochs."""
    train = TrainConfig(steps=50, batch_size=3, lr=0.25, final_lr_ratio=0.1, warmup_steps=2)
    assert plan_line(train, 600, 20_000) == (
        "50 steps of 3 sequences = 600 tokens a step, 1.50 epochs; adamw, learning rate 0.25 after 2 steps of warm-up, "
        "then a cosine to 10% of that"
    )
    muon = dataclasses.replace(train, optimizer="muon", muon_lr=0.5, grad_accum=2, lr_schedule="linear")
    line = plan_line(muon, 600, 20_000)
    assert "50 steps of 3 x 2 accumulated sequences" in line
    assert "muon, learning rate 0.5 (AdamW part 0.25) after" in line
    assert line.endswith("then a straight line to 10% of that")


def test_a_model_that_is_worse_than_a_trigram_model_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(RESULT | {"val_bits_per_byte": 0.76, "entropy_floor_bits_per_byte": None}, capsys)
    assert lines[2].startswith("this is worse than a trigram model")
    assert not any("worse" in line for line in said(RESULT | {"val_bits_per_byte": 0.75}, capsys))
