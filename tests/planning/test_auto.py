"""The preset and the steps for a text: `train.py --preset auto`."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_jax.cli.settings import choose_preset
from moe_jax.cli.train import Train
from moe_jax.config import ConfigError, DataConfig, RunConfig
from moe_jax.config.presets import preset_for_text
from moe_jax.data.token_store import prepare_token_store
from moe_jax.data.tokenizers import TRAINING_BYTES
from moe_jax.planning import auto
from moe_jax.planning.auto import bytes_per_token, text_bytes
from tests.cli.test_cli import make_held


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three bytes a token."""
    monkeypatch.setattr(auto, "bytes_per_token", lambda data: 3.0)


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


@pytest.fixture
def book(three: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A twentieth of its 4 MB is held out: 1.27 M tokens."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("a " * 2_000_000)
    monkeypatch.setattr("moe_jax.system.machine.matmul_rate", lambda dtype: 1e11)
    return tmp_path / "book.txt"


AUTO = ("--preset", "auto", "--data", "book.txt")


def choose(*typed: str) -> tuple[RunConfig, list[str]]:
    """The choice for book.txt, and the reasons. `typed` are flags of `train.py`."""
    command = Train.parse([*AUTO, *typed])
    assert command.auto is not None
    settings, reasons = choose_preset(command.auto, command.minutes)
    return settings.config, reasons


def test_a_preset_for_which_the_time_is_too_short_is_passed_over(book: Path) -> None:
    """A step of story-cpu is 4.11e10 operations: at 0.3 x 1e11 a second, 43 end in 60 s. They read 0.18 M tokens.

    In 10 minutes 437 end, and read 1.79 M tokens, more than half of the 1.44 M active parameters. A step of nano is
    12.85e9 operations: 140 end in 60 s."""
    config, reasons = choose("--minutes", "1")
    assert config.preset == "nano"
    assert reasons == [
        "text: 3.80 MB, about 1.27 M tokens",
        "story-cpu: passed over, because in 60 s it would read 0.18 M tokens, fewer than 0.5 for each of its 1.4 M "
        "active parameters",
        reasons[2],
        "steps: 140 of 2,048 tokens, which read the text about 0.2 times",
        "time: 30 s to 60 s of 60 s, if training reaches 60% to 30% of 100 GFLOP/s; compiling, evaluations and "
        "checkpoints come on top",
    ]
    assert reasons[2].startswith("story: passed over, because in 60 s")
    longer, _ = choose("--minutes", "10")
    assert (longer.preset, longer.train.steps) == ("story-cpu", 437)
    book.write_text("a " * 10_000)
    shortest, _ = choose("--minutes", "0.0001")
    assert (shortest.preset, shortest.train.steps) == ("nano", 1)


def test_what_the_user_has_set_is_kept(book: Path) -> None:
    """A preset that a flag does not fit is left out: nano's width is no multiple of 6."""
    flags = ("--model.heads", "6", "--model.kv-heads", "0", "--batch-size", "4")
    config, _ = choose(*flags)
    assert (config.preset, config.train.batch_size, config.model.heads) == ("story-cpu", 4, 6)
    assert choose("--steps", "9")[0].train.steps == 9
    book.write_text("a " * 100_000)
    with pytest.raises(ConfigError, match=r"--model\.heads 6: must be a divisor of --model\.width 128"):
        choose(*flags)


def config(path: Path, **data: object) -> RunConfig:
    return RunConfig(data=DataConfig(**{"source": str(path), "tokenizer": "byte", **data}))  # type: ignore[arg-type]


def test_bytes_and_separators_are_counted(tmp_path: Path) -> None:
    """20 documents of 4 bytes, one of them held out. A byte is a token, and so is a separator: 4 bytes, 5 tokens."""
    text = tmp_path / "a.txt"
    text.write_text("\n<|endoftext|>\n".join(["abcd"] * 20))
    assert text_bytes(str(text)) == 19 * 4  # the file has 36 bytes for each further document
    assert bytes_per_token(config(text).data) == pytest.approx(4 / 5)


def test_a_text_smaller_than_the_sample_is_counted_as_the_run_counts_it(tmp_path: Path) -> None:
    """The stream of the run has one separator more, behind the last document."""
    text = tmp_path / "a.txt"
    text.write_text("<|endoftext|>".join(f"the cat {n} sat on the mat, and the dog {n} ran" for n in range(400)))
    asked = config(text, tokenizer="bpe", vocab_size=300)
    store = prepare_token_store(asked.data, cache=tmp_path / "cache", progress=False)
    size = text_bytes(str(text))
    assert size is not None
    assert round(size / bytes_per_token(asked.data)) == len(store.train.tokens) - 1


@pytest.mark.usefixtures("book")
@pytest.mark.parametrize(
    ("asked", "plain"),
    [
        ((), ("--preset", "story-cpu", "--steps", "1237")),
        (("--minutes", "1"), ("--preset", "nano", "--steps", "140")),
        (
            ("--seed", "3", "--steps", "7", "--out", "x"),
            ("--preset", "story-cpu", *["--seed", "3", "--steps", "7", "--out", "x"]),
        ),
    ],
    ids=["text", "time", "changes"],
)
def test_the_choice_is_a_plain_preset_with_plain_settings(
    asked: tuple[str, ...], plain: tuple[str, ...], capsys: pytest.CaptureFixture
) -> None:
    """1.27 M tokens, four times, 4,096 a step: 1,237 steps. nano's 12.85e9 operations a step: 140 in a minute at 0.3 of
    100 GFLOP/s."""
    config, _ = choose(*asked)
    same = Train.parse(["--data", "book.txt", "--out", "runs/book", *plain])
    assert same.auto is None
    assert config == same.settings.config
    assert RunConfig.from_dict(config.to_dict()) == config


@pytest.mark.usefixtures("book")
@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (("--minutes", "5"), "--minutes 5: works only with --preset auto; add that, or give --steps"),
        ((*AUTO, "--minutes", "-1"), "--minutes -1.0: must be between 0"),
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


def test_a_large_text_is_not_read_to_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size is that of the file. A smaller one is counted without its separators."""
    sizes = iter([None, TRAINING_BYTES + 1, TRAINING_BYTES])
    corpus = SimpleNamespace(size=lambda split: next(sizes), documents=lambda split: iter(["ab", "é"]))
    monkeypatch.setattr(auto, "open_corpus", lambda data: corpus)
    assert [text_bytes("x") for _ in range(3)] == [None, TRAINING_BYTES + 1, 4]


def test_the_tokenizer_is_tried_on_the_first_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until they have SAMPLE_BYTES: of documents of 4 bytes, the third completes 10. Each ends with a separator."""
    read: list[str] = []

    def documents(split: str) -> Iterator[str]:
        assert split == "train"
        for number in range(9):
            read.append(str(number))
            yield "abcd"

    monkeypatch.setattr(auto, "SAMPLE_BYTES", 10)
    monkeypatch.setattr(auto, "open_corpus", lambda data: SimpleNamespace(documents=documents))
    assert bytes_per_token(DataConfig(source="a name of its own", tokenizer="byte")) == 12 / 15
    assert len(read) == 3
