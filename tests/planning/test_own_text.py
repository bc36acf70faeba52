"""The command line for a text and a memory. The memory of a step is invented here; `tests/reliability` compiles one."""

import dataclasses
import shlex
from pathlib import Path

import pytest

from moe_jax.cli.text_plan import memory_bytes
from moe_jax.cli.train import Train
from moe_jax.config import ConfigError, RunConfig, UserError
from moe_jax.config.presets import preset, preset_for_text
from moe_jax.planning import own_text
from moe_jax.planning.own_text import Limits, TextPlan


@pytest.fixture(autouse=True)
def _three_bytes_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_text, "bytes_per_token", lambda config: 3.0)


@pytest.mark.parametrize(
    ("size", "name"),
    [
        (1, "nano"),
        (2_999_999, "nano"),
        (3_000_000, "story-cpu"),
        (199_999_999, "story-cpu"),
        (2e8, "story-4gb"),
        (None, "story-4gb"),
    ],
)
def test_the_text_decides_the_preset(size: int | None, name: str) -> None:
    assert preset_for_text(size, on_cpu=False) == name
    assert preset_for_text(size, on_cpu=True) == name.replace("story-4gb", "story-cpu")


def test_steps_read_the_text_four_times_at_most() -> None:
    """nano reads 2,048 tokens a step. 1.536 MB are 512,000 tokens of 3 bytes: 1,000 steps are four passes."""
    for size, steps in ((1_536_000, 900), (768_000, 500), (1, 1), (None, 900)):
        assert own_text.with_steps(preset("nano"), size, Limits(1e9)).train.steps == steps


def plans(
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    limits: Limits,
    needed: dict[tuple[str, bool, int], float],
    change: own_text.Change = lambda config: config,
) -> list[TextPlan]:
    """The plans, where a step of (preset, remat, micro-batch) needs some MiB; 1,000 unless given."""

    def invented(config):
        return needed.get((config.preset, config.execution.remat, config.train.batch_size), 1000.0)

    monkeypatch.setattr(own_text, "step_mib", invented)
    return list(own_text.search(str(text), limits, change=change))


def test_the_first_that_fits_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A twentieth of the 4 MB is held out: 1.27 M tokens, four times, 4,096 a step."""
    text = tmp_path / "my book.txt"
    text.write_text("a " * 2_000_000)
    tried = plans(text, monkeypatch, Limits(500), {("story-cpu", True, 2): 400})
    assert [(p.config.preset, p.config.execution.remat, p.config.train.batch_size, p.fits) for p in tried] == [
        ("story-cpu", False, 8, False),
        ("story-cpu", True, 8, False),
        ("story-cpu", True, 4, False),
        ("story-cpu", True, 2, True),
    ]
    command = tried[-1].command()
    assert command == (
        f"uv run train.py --preset story-cpu --data {shlex.quote(str(text))} --out 'runs/my book' "
        "--steps 1237 --batch-size 2 --grad-accum 4 --execution.remat"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("my book", "my book-2"):  # a command that is printed must not be refused
        (tmp_path / "runs" / name / "checkpoints" / "step_00000001").mkdir(parents=True)
    assert "--out 'runs/my book-3' " in tried[-1].command()
    command = command.replace("my book' --steps", "my book-3' --steps")
    config = Train.parse(shlex.split(command)[3:]).settings.config
    assert (config.train, config.execution) == (tried[-1].config.train, tried[-1].config.execution)


def test_a_smaller_preset_is_the_last_resort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "book.txt"
    text.write_text("a " * 2_000_000)
    tried = plans(text, monkeypatch, Limits(500), {("nano", False, 8): 400})
    assert list(dict.fromkeys(p.config.preset for p in tried)) == ["story-cpu", "story", "nano"]
    assert tried[-1].fits
    assert not any(p.fits for p in plans(text, monkeypatch, Limits(10), {}))


def test_a_preset_for_which_the_time_is_too_short_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of story-cpu is 4.11e10 operations: at 0.3 x 1e11 a second, 43 end in 60 s. They read 0.18 M tokens.

    In 10 minutes 437 end, and read 1.79 M tokens, more than half of the 1.44 M active parameters."""
    text = tmp_path / "book.txt"
    text.write_text("a " * 2_000_000)
    tried = plans(text, monkeypatch, Limits(2000, 60, 1e11), {})
    assert [(p.config.preset, p.config.train.steps, p.step_mib) for p in tried[:1]] == [("story-cpu", 43, None)]
    assert tried[0].problem == (
        "in 60 s it would read 0.18 M tokens, fewer than 0.5 for each of its 1.4 M active parameters"
    )
    assert [(p.config.preset, p.fits) for p in tried] == [("story-cpu", False), ("story", False), ("nano", True)]
    (only,) = plans(text, monkeypatch, Limits(2000, 600, 1e11), {})
    assert (only.config.preset, only.config.train.steps) == ("story-cpu", 437)


def test_the_smallest_preset_is_taken_however_short_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "book.txt"
    text.write_text("a " * 10_000)
    (only,) = plans(text, monkeypatch, Limits(2000, 1e-3, 1e9), {})
    assert (only.config.preset, only.config.train.steps, only.fits) == ("nano", 1, True)


def test_what_the_user_has_set_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is not divided, and a preset that the change does not fit is left out: 128 is no multiple of 6."""

    def change(config: RunConfig) -> RunConfig:
        model = dataclasses.replace(config.model, heads=6)
        return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, batch_size=4))

    text = tmp_path / "book.txt"
    text.write_text("a " * 2_000_000)
    tried = plans(text, monkeypatch, Limits(500), {}, change)
    assert [(p.config.preset, p.config.execution.remat, p.config.train.batch_size) for p in tried] == [
        ("story-cpu", False, 4),
        ("story-cpu", True, 4),
        ("story", False, 4),
        ("story", True, 4),
    ]
    text.write_text("a " * 100_000)
    with pytest.raises(ConfigError, match=r"--model\.heads 6: must be a divisor of --model\.width 128"):
        plans(text, monkeypatch, Limits(500), {}, change)


def test_a_tiny_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("too short")
    with pytest.raises(UserError, match="are too little to train on"):
        next(own_text.search(str(tmp_path / "a.txt"), Limits(1e9)))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8e9),
        ("8gb", 8e9),
        ("8G", 8e9),
        ("7.5GiB", 7.5 * 2**30),
        ("900MB", 9e8),
        (" 1TB ", 1e12),
        ("512KiB", 2**19),
    ],
)
def test_sizes_as_people_write_them(text: str, size: float) -> None:
    assert memory_bytes(text) == size


@pytest.mark.parametrize("text", ["8", "GB", "0GB", "-1GB", "8 GB", "8PB", "1e9B", "nan", ""])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must be a size such as 8GB"):
        memory_bytes(text)


def test_the_embedded_stories_are_for_the_smallest_preset() -> None:
    assert own_text.presets_for("stories", None) == [preset("nano")]
