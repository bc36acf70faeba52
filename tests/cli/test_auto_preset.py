"""--preset auto: accepted before jax, then replaced by the settings of a plain preset. Memory is invented here."""

from pathlib import Path

import pytest

from moe_jax.cli.train import Train
from moe_jax.config import ConfigError, RunConfig, UserError
from moe_jax.config.presets import folder_for_text
from moe_jax.planning import own_text, plan_in_words
from tests.cli.test_cli import ROOT, assert_refused, make_held, run_without_jax

AUTO = ("--preset", "auto", "--data", "book.txt")


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("a " * 2_000_000)
    for module in (own_text, plan_in_words):
        monkeypatch.setattr(module, "bytes_per_token", lambda config: 3.0)
    monkeypatch.setattr(own_text, "step_mib", lambda config: {"story-cpu": 500.0}.get(config.preset, 100.0))


def chosen(*argv: str) -> RunConfig:
    auto = Train.parse([*AUTO, *argv]).auto
    assert auto is not None
    return auto.choose().settings.config


@pytest.mark.parametrize(
    ("asked", "plain"),
    [
        ((), ("--preset", "story-cpu", "--steps", "1237")),
        (("--memory", "300MiB"), ("--preset", "story", "--steps", "1237")),
        (("--minutes", "1", "--gflops", "100"), ("--preset", "nano", "--steps", "140")),
        (
            ("--memory", "1GB", "--seed", "3", "--steps", "7", "--model.no-scaled-embedding", "--out", "x"),
            ("--preset", "story-cpu", "--seed", "3", "--steps", "7", "--model.no-scaled-embedding", "--out", "x"),
        ),
    ],
    ids=["text", "memory", "time", "changes"],
)
def test_the_choice_is_a_plain_preset_with_plain_settings(
    asked: tuple[str, ...], plain: tuple[str, ...], capsys: pytest.CaptureFixture
) -> None:
    """1.27 M tokens, four times, 4,096 a step: 1,237 steps. nano's 12.85e9 operations a step: 140 in a minute at 0.3 of
    100 GFLOP/s."""
    config = chosen(*asked)
    same = Train.parse(["--data", "book.txt", "--out", "runs/book", *plain])
    assert same.auto is None
    assert config == same.settings.config
    assert RunConfig.from_dict(config.to_dict()) == config
    said = capsys.readouterr().out
    assert said.startswith(f"--preset auto: {config.preset}, {config.train.steps:,} steps\ntext: 3.80 MB")


def test_a_settings_file_may_ask_for_it() -> None:
    Path("my.toml").write_text('preset = "auto"\n[train]\nseed = 5\n')
    auto = Train.parse(["--config", "my.toml", "--data", "book.txt"]).auto
    assert auto is not None
    config = auto.choose().settings.config
    assert (config.preset, config.train.seed) == ("story-cpu", 5)


def test_nothing_that_fits_is_an_error_with_the_numbers() -> None:
    with pytest.raises(UserError, match="nothing fits; nano: a step takes 100 of 50 MiB; give more --memory"):
        chosen("--memory", "50MiB")


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (("--minutes", "5"), "--minutes 5: works only with --preset auto; add that, or give --steps"),
        (("--memory", "8GB"), "--memory 8GB: works only with --preset auto; add that, or leave it out"),
        ((*AUTO, "--minutes", "-1"), "--minutes -1.0: must be between 0"),
        ((*AUTO, "--gflops", "5"), "--gflops 5: says how long steps take; give --minutes too"),
        ((*AUTO, "--memory", "8"), "--memory 8: must be a size"),
        ((*AUTO, "--resume"), "leave it out with --resume, and name the run: --out runs/"),
        ((*AUTO, "--upcycle", "x"), "leave it out with --upcycle"),
        ((*AUTO, "--init-from", "x"), "leave it out with --init-from"),
        ((*AUTO, "--model.heads", "7"), "--model.heads 7: must be a divisor"),
        (("--preset", "auto", "--data", "absent.txt"), "--data absent.txt: must be an existing file"),
    ],
)
def test_wrong_arguments_are_refused(argv: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Train.parse(argv)
    assert problem in str(raised.value)


def test_a_folder_that_holds_a_run_is_refused_before_the_choice() -> None:
    make_held(Path("runs"))
    Path("book.txt").rename("held.txt")
    with pytest.raises(ConfigError, match="--out runs/held: already holds a run"):
        Train.parse(["--preset", "auto", "--data", "held.txt"])


def test_wrong_arguments_are_refused_before_jax(tmp_path: Path) -> None:
    assert_refused(
        run_without_jax(tmp_path, [str(ROOT / "train.py"), *AUTO, "--steps", "0"]),
        ["--steps 0: must be between 1 and 1,000,000,000"],
    )


@pytest.mark.parametrize(("source", "folder"), [("book.txt", "book"), (".", "shelf"), ("..", "above"), ("/", "text")])
def test_the_folder_of_a_run_has_the_name_of_its_text(
    source: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = tmp_path / "above" / "shelf"
    shelf.mkdir(parents=True)
    monkeypatch.chdir(shelf)
    assert folder_for_text(source) == f"runs/{folder}"
