"""Training by hand follows training by autodiff, and would part from it where a gradient is wrong."""

import math

import pytest

from foundation import train_by_hand
from foundation.transformer import ModelSize, loss_and_gradient
from moe_jax.data.synthetic.stories import generate, sample


@pytest.mark.runs
def test_trained_by_hand_follows_autodiff() -> None:
    lesson = train_by_hand
    size = ModelSize(vocabulary=0, width=16, layers=2, experts=4, hidden=8)
    ours = lesson.train(loss_and_gradient, 50, size, positions=24)
    theirs = lesson.train(lesson.by_autodiff, 50, size, positions=24)
    assert lesson.largest_difference(ours, theirs) < 1e-9
    assert ours.losses[-1] < ours.losses[0] - 0.2
    assert len(ours.losses) == 50


def test_a_curve_has_at_least_two_losses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train_by_hand.main(["--steps", "1"])
    assert caught.value.code == 2
    assert "--steps 1: must be at least 2" in capsys.readouterr().err


def test_the_stories_are_of_the_embedded_grammar_and_chapter_7_names_the_cost_of_its_dice() -> None:
    count = train_by_hand.VALIDATION_STORIES
    text, unseen = train_by_hand.stories()
    assert text.splitlines() == list(generate(0, "train", len(text.splitlines())))
    assert unseen.splitlines() == list(generate(0, "valid", count))
    bits = sum(sample(0, "valid", i).bits for i in range(count))
    chapter = (train_by_hand.STORIES.parent / "notebooks/07_a_transformer_that_writes.py").read_text()
    assert f"GRAMMAR = {bits * math.log(2) / len(unseen):.3f} *" in chapter
