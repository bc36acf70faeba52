"""The preset and the steps for a text: `plan --data` and `train.py --preset auto`. The memory of a step is invented."""

import json
import shlex
from pathlib import Path

import pytest

from moe_jax.cli.main import main, run_command
from moe_jax.cli.train import Train
from moe_jax.config import ConfigError, DataConfig, RunConfig, UserError
from moe_jax.config.presets import preset_for_text
from moe_jax.data.token_store import prepare_token_store
from moe_jax.planning import auto
from moe_jax.planning.auto import Choice, Limits, bytes_per_token, memory_bytes, text_bytes, too_small
from moe_jax.system import environment
from tests.cli.test_cli import make_held


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three bytes a token."""
    monkeypatch.setattr(auto, "bytes_per_token", lambda config: 3.0)


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


def choose(
    monkeypatch: pytest.MonkeyPatch, limits: Limits, needed: dict[tuple[str, bool, int], float], *typed: str
) -> tuple[Choice, list[tuple[str, bool, int]]]:
    """The choice for book.txt, where a step of (preset, remat, micro-batch) needs some MiB, or 1,000; and what was
    tried. `typed` are flags of `train.py`."""
    tried = []

    def invented(config: RunConfig) -> float:
        tried.append((config.preset, config.execution.remat, config.train.batch_size))
        return needed.get(tried[-1], 1000.0)

    monkeypatch.setattr(auto, "step_mib", invented)
    monkeypatch.setattr(Limits, "of", lambda *_: limits)
    made = Train.parse([*AUTO, *typed]).auto
    assert made is not None
    return made.choose()[1], tried


@pytest.fixture
def book(three: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A twentieth of its 4 MB is held out: 1.27 M tokens."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("a " * 2_000_000)
    monkeypatch.setattr("moe_jax.system.machine.matmul_rate", lambda dtype: 1e11)
    monkeypatch.setattr(auto, "step_mib", lambda config: {"story-cpu": 500.0}.get(config.preset, 100.0))
    return tmp_path / "book.txt"


AUTO = ("--preset", "auto", "--data", "book.txt")


@pytest.mark.usefixtures("book")
def test_the_first_that_fits_is_taken_and_a_smaller_preset_is_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times 1.27 M tokens, 4,096 a step."""
    choice, tried = choose(monkeypatch, Limits(500), {("story-cpu", True, 2): 400})
    assert tried == [("story-cpu", remat, size) for remat, size in ((False, 8), (True, 8), (True, 4), (True, 2))]
    assert (choice.config.train.steps, choice.config.train.grad_accum) == (1237, 4)
    choice, tried = choose(monkeypatch, Limits(500), {("nano", False, 8): 400})
    assert list(dict.fromkeys(name for name, *_ in tried)) == ["story-cpu", "story", "nano"]
    assert choice.fits
    nothing, _ = choose(monkeypatch, Limits(10), {})
    assert (nothing.fits, nothing.config.preset) == (False, "nano")


def test_a_preset_for_which_the_time_is_too_short_is_passed_over(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of story-cpu is 4.11e10 operations: at 0.3 x 1e11 a second, 43 end in 60 s. They read 0.18 M tokens.

    In 10 minutes 437 end, and read 1.79 M tokens, more than half of the 1.44 M active parameters. A step of nano is
    12.85e9 operations: 140 end in 60 s."""
    choice, tried = choose(monkeypatch, Limits(2000, 60, 1e11), {})
    assert tried == [("nano", False, 8)]
    assert choice.reasons == [
        "text: 3.80 MB, about 1.27 M tokens; the next larger preset, story-4gb, is for 200 MB or more, and for a GPU",
        "story-cpu: passed over, because in 60 s it would read 0.18 M tokens, fewer than 0.5 for each of its 1.4 M "
        "active parameters",
        choice.reasons[2],
        "steps: 140 of 2,048 tokens, which read the text about 0.2 times; more would not end in time",
        "time: 30 s to 60 s of 60 s, if training reaches 60% to 30% of 100 GFLOP/s; compiling, evaluations and "
        "checkpoints come on top",
        "memory: a training step takes 1,000 of 2,000 MiB",
    ]
    assert choice.reasons[2].startswith("story: passed over, because in 60 s")
    longer, _ = choose(monkeypatch, Limits(2000, 600, 1e11), {})
    assert (longer.config.preset, longer.config.train.steps) == ("story-cpu", 437)
    book.write_text("a " * 10_000)
    shortest, _ = choose(monkeypatch, Limits(2000, 1e-3, 1e9), {})
    assert (shortest.config.preset, shortest.config.train.steps, shortest.fits) == ("nano", 1, True)


def test_what_the_user_has_set_is_kept(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is not divided, and a preset that a flag does not fit is left out: nano's width is no multiple of 6."""
    flags = ("--model.heads", "6", "--model.kv-heads", "0", "--batch-size", "4")
    _, tried = choose(monkeypatch, Limits(500), {}, *flags)
    assert tried == [
        ("story-cpu", False, 4),
        ("story-cpu", True, 4),
        ("story", False, 4),
        ("story", True, 4),
    ]
    assert choose(monkeypatch, Limits(500), {}, "--no-execution.remat", "--batch-size=4", "--steps=9")[1][0][1:] == (
        (False, 4)
    )
    book.write_text("a " * 100_000)
    with pytest.raises(ConfigError, match=r"--model\.heads 6: must be a divisor of --model\.width 128"):
        choose(monkeypatch, Limits(500), {}, *flags)


@pytest.mark.usefixtures("three")
def test_a_small_text_is_told_how_small_it_is() -> None:
    """900 steps x 2,048 tokens x 3 bytes / 4 times = 1,382,400 bytes."""
    assert too_small(DataConfig(), 1_382_400) == []
    assert too_small(DataConfig(), 768_000) == [
        "warning: the text is too small for any preset. Its 0.77 MB, read 4 times, are 500 steps, and nano, the "
        "smallest preset, has 900. About 1.38 MB would be enough"
    ]


def test_sizes_as_people_write_them() -> None:
    sizes = {"8GB": 8e9, "8gb": 8e9, "8G": 8e9, "7.5GiB": 7.5 * 2**30, " 1TB ": 1e12, "512KiB": 2**19}
    assert {text: memory_bytes(text) for text in sizes} == sizes
    for text in ("8", "GB", "0GB", "-1GB", "8 GB", "8PB", "nan", ""):
        with pytest.raises(ConfigError, match="must be a size such as 8GB"):
            memory_bytes(text)


def config(path: Path, **data: object) -> RunConfig:
    return RunConfig(data=DataConfig(**{"source": str(path), "tokenizer": "byte", **data}))  # type: ignore[arg-type]


def test_bytes_and_separators_are_counted(tmp_path: Path) -> None:
    """20 documents of 4 bytes, one of them held out. A byte is a token, and so is a separator: 4 bytes, 5 tokens."""
    text = tmp_path / "a.txt"
    text.write_text("\n<|endoftext|>\n".join(["abcd"] * 20))
    assert text_bytes(str(text)) == 19 * 4  # the file has 36 bytes for each further document
    assert bytes_per_token(config(text)) == pytest.approx(4 / 5)


def test_a_text_smaller_than_the_sample_is_counted_as_the_run_counts_it(tmp_path: Path) -> None:
    """The stream of the run has one separator more, behind the last document."""
    text = tmp_path / "a.txt"
    text.write_text("<|endoftext|>".join(f"the cat {n} sat on the mat, and the dog {n} ran" for n in range(400)))
    asked = config(text, tokenizer="bpe", vocab_size=300)
    store = prepare_token_store(asked.data, cache=tmp_path / "cache", progress=False)
    size = text_bytes(str(text))
    assert size is not None
    assert round(size / bytes_per_token(asked)) == len(store.train.tokens) - 1


def chosen(*argv: str) -> RunConfig:
    command = Train.parse([*AUTO, *argv])
    assert command.auto is not None
    return command.auto.choose()[0].config


@pytest.mark.usefixtures("book")
@pytest.mark.parametrize(
    ("asked", "plain"),
    [
        ((), ("--preset", "story-cpu", "--steps", "1237")),
        (("--memory", "300MiB"), ("--preset", "story", "--steps", "1237")),
        (("--minutes", "1"), ("--preset", "nano", "--steps", "140")),
        (
            ("--memory", "1GB", "--seed", "3", "--steps", "7", "--set", "model.scaled_embedding=false", "--out", "x"),
            (
                "--preset",
                "story-cpu",
                "--seed",
                "3",
                "--steps",
                "7",
                "--set",
                "model.scaled_embedding=false",
                "--out",
                "x",
            ),
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


@pytest.mark.usefixtures("book")
def test_nothing_that_fits_is_an_error_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "prepare_environment", lambda *_: [])
    with pytest.raises(
        UserError,
        match="nothing fits; nano, 1 sequences x 8 with remat: a step takes 100 of 50 MiB; give more --memory",
    ):
        Train.parse([*AUTO, "--memory", "50MiB"]).execute()


@pytest.mark.usefixtures("book")
@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (("--minutes", "5"), "--minutes 5: works only with --preset auto; add that, or give --steps"),
        ((*AUTO, "--minutes", "-1"), "--minutes -1.0: must be between 0"),
        ((*AUTO, "--memory", "8"), "--memory 8: must be a size"),
        ((*AUTO, "--resume"), "leave it out with --resume, and name the run: --out runs/"),
        ((*AUTO, "--init-from", "x"), "leave it out with --init-from"),
        (("--preset", "auto", "--data", "absent.txt"), "--data absent.txt: must be an existing file"),
    ],
)
def test_wrong_arguments_are_refused(argv: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Train.parse(argv)
    assert problem in str(raised.value)


@pytest.mark.usefixtures("book")
def test_a_folder_that_holds_a_run_is_refused_before_the_choice() -> None:
    make_held(Path("runs"))
    Path("book.txt").rename("held.txt")
    with pytest.raises(ConfigError, match="--out runs/held: already holds a run"):
        Train.parse(["--preset", "auto", "--data", "held.txt"])


@pytest.mark.usefixtures("book")
@pytest.mark.parametrize(("memory", "status"), [("4GB", 0), ("50MiB", 1)])
def test_a_plan_for_a_text_has_a_command_only_if_it_fits(
    memory: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`train.py` reads the command as the plan means it, with the flags of the user."""
    monkeypatch.setattr(environment, "prepare_environment", list)
    (tmp_path / "book.txt").rename(tmp_path / "my book.txt")
    for name in ("my book", "my book-2"):  # a command that is printed must not be refused
        (tmp_path / "runs" / name / "checkpoints" / "step_00000001").mkdir(parents=True)
    flags = ["--data", "my book.txt", "--memory", memory, "--batch-size", "4", "--lr", "1e-3"]
    assert main(run_command, ["plan", *flags]) == status
    *_, command, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert (result["fits"], result["command"] is None) == (status == 0, status == 1)
    if status == 0:
        assert (
            command
            == result["command"]
            == (
                "uv run train.py --preset story-cpu --data 'my book.txt' --out 'runs/my book-3' --steps 2474 "
                "--batch-size 4 --lr=0.001"
            )
        )
        config = Train.parse(shlex.split(command)[3:]).settings.config
        assert (config.train.steps, config.train.batch_size, config.train.lr) == (2474, 4, 1e-3)
