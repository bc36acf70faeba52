"""Random settings of a run: refused in one line, or trained, killed and resumed to equal bits by `verify_resume.py`.

The settings and their types come from the configuration, so a new field is drawn without a change here. A line is a
function of its number, so one that fails can be repeated alone: `-k "random_settings and 17"`.
"""

import os
import random
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from moe_jax.config.presets import preset
from tests.reliability import runs
from tests.reliability.test_flags import NAMES, settings_of_a_run
from tests.support import short_form

pytestmark = pytest.mark.reliability
FEW, MANY = 1, 300
FIXED = {"data.source", "data.format", "train.lora_rank", "train.lora_alpha", "train.train_router", "train.param_dtype"}
"""Fields that need a text, a run to start from or a certain optimizer beside them; other tests have these."""
FIXED |= set(runs.MODEL) | {"train.steps", "data.tokenizer", "data.vocab_size", "model.vocab_size", *NAMES}
DRAWN = {name: kind for name, kind in settings_of_a_run().items() if "." in name and name not in FIXED}
WRONG_SHARE = 0.25
WRONG = ("x", "-1", "nan", "1e999", "", "9" * 400, "\u0663", "\x1b[2J")


def settings_of(number: int) -> dict[str, str]:
    """One to four settings, and in a quarter of the lines a value that most fields cannot have."""
    rng = random.Random(number)
    drawn = {name: typical_value(rng, name, DRAWN[name]) for name in rng.sample(sorted(DRAWN), rng.randint(1, 4))}
    if rng.random() < WRONG_SHARE:
        drawn[rng.choice(sorted(DRAWN))] = rng.choice(WRONG)
    return drawn


def typical_value(rng: random.Random, name: str, kind: Any) -> str:
    """A value of the field's type, near its default."""
    section, _, field = name.partition(".")
    default = getattr(preset("nano").section(section), field)
    if get_origin(kind) is Literal:
        return rng.choice(get_args(kind))
    if kind is bool:
        return rng.choice(("true", "false"))
    if kind is float:
        return str(rng.choice((0.0, 0.5, 1.0, default, default / 2, 2 * default)))
    return str(rng.choice((0, 1, 2, 3, 5, default)))


@pytest.mark.parametrize("number", short_form(range(FEW + MANY), range(FEW)))
def test_random_settings(number: int, text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    drawn = settings_of(number)
    words = [word for name, value in drawn.items() for word in ("--set", f"{name}={value}")]
    command = [*runs.flags(text, tmp_path / "unused"), *words]
    ended = runs.complete(command, cache, runs.VERIFY_RESUME)
    if "before it was killed" in ended.stderr:  # the machine was so fast that the run had ended
        ended = runs.complete(command, cache, runs.VERIFY_RESUME)
    told = f"{drawn}: status {ended.returncode}\n{ended.stdout}{ended.stderr}"
    assert "Traceback" not in ended.stdout + ended.stderr, told
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    if ended.returncode == 2:
        assert (ended.stdout, ended.stderr) == ("", errors[0] + "\n"), told
    else:
        assert ended.returncode in (0, 1), told
        assert len(errors) == ended.returncode, told  # bits that differ are status 1 without an error
        assert ("PASS" in ended.stdout) == (ended.returncode == 0), told
    assert os.listdir(tmp_path) == []
