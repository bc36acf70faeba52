"""The sentences that explain a plan. Numbers are worked by hand."""

import dataclasses

import pytest

from moe_jax.config import DataConfig
from moe_jax.config.presets import preset
from moe_jax.planning import own_text, plan_in_words
from moe_jax.planning.own_text import Limits, TextPlan
from moe_jax.planning.plan_in_words import reasons, warning


@pytest.fixture(autouse=True)
def _three_bytes_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (own_text, plan_in_words):
        monkeypatch.setattr(module, "bytes_per_token", lambda config: 3.0)


def planned(name: str, steps: int, step_mib: float | None, problem: str = "") -> TextPlan:
    start = preset(name)
    return TextPlan(dataclasses.replace(start, train=dataclasses.replace(start.train, steps=steps)), step_mib, problem)


def test_a_plan_says_what_bounds_it() -> None:
    """nano: 12.85e9 operations a step. 100 steps at 0.3 and 0.6 of 10 GFLOP/s take 428 and 214 s."""
    short = planned("story-cpu", 6, None, "it has too little time")
    said = list(reasons(planned("nano", 100, 110.2), [short], 9_000_000, Limits(500, 430, 1e10)))
    assert said == [
        "text: 9.00 MB, about 3.00 M tokens; the next larger preset, story-4gb, is for 200 MB or more, and for a GPU",
        "story-cpu: passed over, because it has too little time",
        "steps: 100 of 2,048 tokens, which read the text about 0.1 times; more would not end in time",
        "time: 3.6 min to 7.1 min of 7.2 min, if training reaches 60% to 30% of 10 GFLOP/s; compiling, evaluations and "
        "checkpoints come on top",
        "memory: a training step takes 110 of 500 MiB",
    ]


def test_steps_that_the_text_or_the_preset_bounds() -> None:
    """768,000 bytes are 256,000 tokens; four times, 2,048 a step: 500 steps."""
    assert list(reasons(planned("nano", 500, 1.0), [], 768_000, Limits(500)))[1] == (
        "steps: 500 of 2,048 tokens, which read the text about 4.0 times; more than 4 times teaches little"
    )
    assert list(reasons(planned("nano", 900, 1.0), [], None, Limits(500)))[:2] == [
        "text: its size is not known before it is read",
        "steps: 900 of 2,048 tokens, as preset nano has",
    ]


@pytest.mark.parametrize("size", [1_382_400, 2e9])
def test_a_text_that_fills_the_steps_of_nano_is_large_enough(size: int) -> None:
    """900 steps x 2,048 tokens x 3 bytes / 4 times = 1,382,400 bytes."""
    assert list(warning(DataConfig(), size)) == []


def test_a_small_text_is_told_how_small_it_is() -> None:
    assert list(warning(DataConfig(), 768_000)) == [
        "warning: the text is too small for any preset. Its 0.77 MB, read 4 times, are 500 steps, and nano, the "
        "smallest preset, has 900. About 1.38 MB would be enough"
    ]
    assert len(list(warning(DataConfig(), 1_380_000))) == 1  # 898 steps
