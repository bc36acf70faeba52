"""What is said before training where settings and text do not fit."""

import dataclasses

from moe_jax.config.presets import preset, with_vocabulary
from moe_jax.training.header import advice


def said(name: str, tokens: int, size: int, **train: int) -> list[str]:
    config = with_vocabulary(preset(name))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **train))
    return advice(config, tokens, size)


def test_a_text_that_fits_needs_no_advice() -> None:
    """Of nano, 900 steps of 2,048 tokens: 1.84 M tokens, read 3.9 times."""
    assert said("nano", 475_000, 1_500_000) == []


def test_a_short_text_is_read_too_often() -> None:
    (line,) = said("nano", 400_000, 1_600_000)
    assert line.startswith("900 steps read this text 4.6 times")
    assert "--steps 781 reads it 4 times" in line  # 4 x 400,000 / 2,048


def test_conversations_are_read_more_often() -> None:
    """Four passes over forty of them are a handful of steps, which teach nothing."""
    config = with_vocabulary(preset("nano"))
    assert advice(config, 3_000, 9_000)
    assert advice(dataclasses.replace(config, data=dataclasses.replace(config.data, format="chat")), 3_000, 9_000) == []


def test_a_model_larger_than_its_text() -> None:
    """story-cpu has 3.6 M parameters; two steps read nothing twice."""
    (line,) = said("story-cpu", 400_000, 1_000_000, steps=2)
    assert "3.6 M parameters and the text 1.0 MB" in line
    assert "--preset nano" in line
    assert said("nano", 400_000, 1_000_000, steps=2) == []  # it is the smallest already
