"""Stopped anywhere and resumed: every bit as if never stopped, whatever keeps the state and in whatever precision."""

from pathlib import Path
from typing import Any

import pytest

from moe_jax.training.session import Session
from tests.reliability.figures import Record, figure
from tests.support import tiny
from tests.training.test_run import configuration, quick, run, text, timeless, uninterrupted  # noqa: F401

pytestmark = pytest.mark.reliability

SETTINGS: list[dict[str, Any]] = [
    {"optimizer": "muon"},
    {"optimizer": "adamw-bf16"},
    {"optimizer": "adamw-8bit"},
    {"optimizer": "adafactor", "param_dtype": "bfloat16"},  # rounded at random, by keys of the step
    {"compute_dtype": "float16"},  # a loss scale
]
"""Beside AdamW in float32, which the kills and `test_run` have."""


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: " ".join(s.values()))
def test_every_kind_of_state(settings: dict[str, Any], text: Path, tmp_path: Path, record_property: Record) -> None:  # noqa: F811
    whole = run(configuration(text, tmp_path / "whole", **settings))
    config = configuration(text, tmp_path / "resumed", **settings)
    run(config, die_at=7)
    resumed = run(config)
    assert resumed.progress.resumed_from == 6
    tiny.assert_same_bits(resumed.state, whole.state)
    assert timeless(tmp_path / "resumed") == timeless(tmp_path / "whole")
    figure(record_property, "interrupted runs compared bit for bit", 1)


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 12))
def test_dead_before_every_step(
    step: int,
    text: Path,  # noqa: F811
    tmp_path: Path,
    uninterrupted: tuple[Session, dict[str, Any]],  # noqa: F811
    record_property: Record,
) -> None:
    config = configuration(text, tmp_path / "run", save_every=1 + step % 3)
    run(config, die_at=step)
    tiny.assert_same_bits(run(config).state, uninterrupted[0].state)
    assert timeless(tmp_path / "run") == timeless(uninterrupted[0].folder.path)
    figure(record_property, "interrupted runs compared bit for bit", 1)
