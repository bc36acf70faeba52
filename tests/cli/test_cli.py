"""The command line: what is wrong is said in one line, with status 2, before jax is imported and nothing is written.

A few command lines run in a process of their own, as a person would type them, with an import of jax made to fail. The
others are read in this process.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from moe_jax.cli.main import main, run_command
from moe_jax.cli.settings import Settings
from moe_jax.cli.train import Train
from moe_jax.config import ConfigError
from moe_jax.config.presets import preset
from moe_jax.config.section import SHORT_FLAGS

ROOT = Path(__file__).resolve().parents[2]

# (arguments of train.py, what the line must name). Other wrong values: tests/config, test_arguments.py, and of every
# flag `tests/reliability/test_flags.py`.
BAD_TRAIN = [
    (["--experts", "1"], ["--top-k", "2", "--experts 1"]),
    (["--model.width", "100", "--model.heads", "20"], ["--model.heads", "20", "RoPE"]),
    (["--set", "data.eval_tokens=65537"], ["--set data.eval_tokens=65537"]),
    (["--data", "no/such/path"], ["--data", "no/such/path", "tinystories"]),
    (["--train.beta2", "0.9"], ["--train.beta2", "perhaps --set train.beta2 was meant"]),
    (["--set", "train.beta3=0.9"], ["--set train.beta3=0.9", "perhaps train.beta2"]),
    (["--set", "a." * 25_000 + "b=1"], ["--set a.a.", "must be SECTION.NAME=VALUE"]),
    (["--set", "model.bias=maybe"], ["--set model.bias=maybe", "must be true or false"]),
    (["--model.top-k", "2"], ["--model.top-k", "perhaps --top-k"]),
    (["--upcycle", "no/such/run"], ["--upcycle no/such/run", "--model.dense active"]),
]

# (arguments of python -m moe_jax, what the line must name)
BAD_COMMANDS = [
    (["paint"], ["paint", "generate"]),
    (["--run"], ["--run", "command"]),
    (["train", "--steps", "0"], ["--steps 0"]),
    (["plan", "--gpu", "abacus"], ["--gpu abacus", "rtx3050-4gb"]),
    (["generate", "--run", "held", "--step", "0.5"], ["--step 0.5", "is not a whole number"]),
    (["generate", "--run", "no/such/run"], ["--run", "no/such/run"]),
    (["inspect", "--run", "held", "--file", "no/such/text"], ["--file", "no/such/text"]),
    (["inspect", "--run", "held", "--file", "held"], ["--file", "held"]),
    (["inspect", "--run", "held", "--file", "a", "--text", "b"], ["--file", "--text"]),
    (["inspect", "--run", "held", "--out", "held"], ["--out", "held"]),
    (["plot", "--run", "held", "--run", "no/such/run"], ["--run", "no/such/run"]),
    (["certify", "--mesh", "data=2"], ["--mesh", "no such flag"]),
]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that trains refuses a folder of the present one that holds a run."""
    monkeypatch.chdir(tmp_path)


def run_without_jax(folder: Path, program: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a program in `folder`, where importing jax raises."""
    (folder / "poison").mkdir(exist_ok=True)
    (folder / "poison" / "jax.py").write_text("raise SystemExit('jax was imported')\n")
    paths = [str(folder / "poison"), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "MOE_JAX_CACHE": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, *program], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def make_held(folder: Path, routing: dict[str, object] | None = None, **model_changes: object) -> None:
    """A folder that holds a run, as far as its names go."""
    (folder / "held" / "checkpoints" / "step_00000010").mkdir(parents=True)
    values = preset("nano").to_dict()
    values["model"] |= model_changes
    values["routing"] |= routing or {}
    (folder / "held" / "config.json").write_text(json.dumps(values))


def _settings(argv: list[str]) -> Settings:
    return Train.parse(argv).settings


def assert_refused(result: subprocess.CompletedProcess[str], names: list[str]) -> None:
    assert (result.returncode, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for name in names:
        assert name in lines[0]


def refused(argv: Sequence[str], capsys: pytest.CaptureFixture[str], names: Sequence[str] = ()) -> str:
    """The one line that refuses these arguments of `moe-jax`."""
    assert main(run_command, argv) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    for name in names:
        assert name in err
    return err


@pytest.mark.parametrize(("arguments", "names"), BAD_TRAIN, ids=lambda x: " ".join(x)[:40])
def test_bad_training_arguments(tmp_path: Path, capsys, arguments: list[str], names: list[str]) -> None:
    refused(["train", *arguments], capsys, names)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("arguments", "names"), BAD_COMMANDS, ids=lambda x: " ".join(x)[:40])
def test_bad_commands(tmp_path: Path, capsys, arguments: list[str], names: list[str]) -> None:
    make_held(tmp_path)
    refused(arguments, capsys, names)


@pytest.mark.parametrize(
    ("program", "names"),
    [
        (["train.py", "--top-k", "9"], ["--top-k", "9", "8"]),
        (["train.py", "--out", "held"], ["--out held", "already holds a run", "--resume"]),
        (["train.py", "--upcycle", "held"], ["--upcycle held", "has experts already"]),
        (["benchmark.py", "moe", "--rounds", "0"], ["--rounds", "0"]),
        (["-m", "moe_jax", "generate", "--run", "no/such/run"], ["--run", "no/such/run"]),
    ],
    ids=lambda x: " ".join(x)[:40],
)
def test_a_program_refuses_before_jax_is_imported(tmp_path: Path, program: list[str], names: list[str]) -> None:
    make_held(tmp_path)
    before = (tmp_path / "held" / "config.json").read_bytes()
    script = [str(ROOT / program[0])] if program[0].endswith(".py") else program[:1]
    assert_refused(run_without_jax(tmp_path, [*script, *program[1:]]), names)
    assert (tmp_path / "held" / "config.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["held", "poison"]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--model.expert-hidden", "128"], ["--model.expert-hidden 128", "259"]),
        (
            ["--set", "routing.renormalise_gates=false"],
            ["--set routing.renormalise_gates=False", "the gates must sum to 1"],
        ),
        (["--set", "model.norm_eps=1e-5"], ["--set model.norm_eps=1e-05", "has 0.0"]),
        (["--preset", "story"], ["--preset story", "has nano"]),
    ],
)
def test_what_a_dense_run_cannot_be_upcycled_to(tmp_path: Path, capsys, arguments: list[str], names: list[str]) -> None:
    """The hidden width of nano's dense baseline: 2 x 128 + 8 / 3, rounded."""
    make_held(tmp_path, dense="active")
    refused(["train", "--upcycle", "held", *arguments], capsys, names)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["held"]


def test_an_upcycled_run_starts_from_the_dense_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts as wide as the dense FFN; what is typed differs; once it is there, it is resumed as any run."""
    monkeypatch.chdir(tmp_path)
    make_held(tmp_path, dense="active", layers=2)
    config, start = _settings(["--upcycle", "held", "--experts", "4", "--lr", "1e-4"])
    assert start.saved is None
    assert (config.model.dense, config.model.layers, config.model.expert_hidden) == ("none", 2, 259)
    assert (config.model.experts, config.train.lr, config.run_dir) == (4, 1e-4, "runs/nano-upcycled")
    (tmp_path / "runs").mkdir()
    shutil.copytree(tmp_path / "held", tmp_path / config.run_dir)
    (tmp_path / config.run_dir / "config.json").write_text(json.dumps(config.to_dict()))
    placed = dataclasses.replace(config, out=config.run_dir)
    resumed = _settings(["--upcycle", "held", "--resume"])
    assert (resumed.config, resumed.start.saved) == (dataclasses.replace(placed, resume=True), placed)
    shutil.copytree(tmp_path / "held", tmp_path / "other")
    with pytest.raises(ConfigError, match="--upcycle other: the run in runs/nano-upcycled has held"):
        _settings(["--out", "runs/nano-upcycled", "--resume", "--upcycle", "other"])


def test_train_has_at_most_50_flags() -> None:
    assert sum(a.is_flag for a in Train.arguments()) <= 50


def test_short_names() -> None:
    """Each short name sets the field that its long name sets, in both spellings."""
    for short, long in SHORT_FLAGS.items():
        if "lora" in long or "router" in long:  # need a run to tune: tests/training/test_sft.py
            continue
        value = {"--data": "stories", "--tokenizer": "byte", "--optimizer": "adamw"}.get(short)
        value = value or {"--fit": "any", "--memory": "2GB"}.get(short)
        value = value or {"--precision": "float32", "--dispatch": "blocks", "--mesh": "data=2"}.get(short, "2")
        if short == "--deterministic":
            assert _settings([short]) == _settings([long]) != _settings([])
            assert _settings(["--no-deterministic"]) == _settings(["--no-execution.deterministic"]) == _settings([])
        else:
            asked = [[short, value], [f"{short}={value}"], [long, value], [f"{long}={value}"]]
            assert len({repr(_settings(argv)) for argv in asked}) == 1
    config, start = _settings(["--steps", "7", "--top-k=1", "--out", "nowhere"])
    assert (config.train.steps, config.model.routing.top_k, config.out, start.saved) == (7, 1, "nowhere", None)


def test_presets_are_where_settings_start_from() -> None:
    config, _ = _settings(["--preset", "seed-158m", "--lr", "1e-3", "--data", "stories"])
    assert config.model == preset("seed-158m").model
    assert config.train.lr == 1e-3
    assert config.train.beta2 == preset("seed-158m").train.beta2


def test_a_resumed_run_starts_from_its_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is typed differs from the saved configuration; an error in it still exits as a flag would."""
    monkeypatch.chdir(tmp_path)
    make_held(tmp_path)
    values = preset("nano").to_dict()
    values["model"]["experts"] = 4
    values["train"]["lr"] = 0.5
    (tmp_path / "held" / "config.json").write_text(json.dumps(values))
    config, start = _settings(["--out", "held", "--resume", "--steps", "4000"])
    assert start.saved is not None
    assert (config.model.experts, config.train.lr, config.train.steps) == (4, 0.5, 4000)
    assert start.saved.train.steps == preset("nano").train.steps
    with pytest.raises(ConfigError, match="--experts 8: the run in held has 4"):
        _settings(["--out", "held", "--resume", "--experts", "8"])


def test_flags_of_a_resumed_run_need_not_fit_the_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve of 16 experts; nano has 8. What does not fit the run itself is refused by the run's numbers."""
    monkeypatch.chdir(tmp_path)
    make_held(tmp_path, {"top_k": 12}, experts=16)
    config, _ = _settings(["--out", "held", "--resume", "--top-k", "12"])
    assert (config.model.experts, config.model.routing.top_k) == (16, 12)
    with pytest.raises(ConfigError, match="--top-k 17: must be between 1 and --experts 16"):
        _settings(["--out", "held", "--resume", "--top-k", "17"])


def test_a_copied_folder_is_resumed_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its config.json names the folder that it was copied from."""
    monkeypatch.chdir(tmp_path)
    make_held(tmp_path)
    values = preset("nano").to_dict() | {"out": "held"}
    (tmp_path / "held" / "config.json").write_text(json.dumps(values))
    shutil.copytree(tmp_path / "held", tmp_path / "copy")
    config, start = _settings(["--out", "copy", "--resume"])
    assert start.saved is not None
    assert (config.run_dir, start.saved.run_dir) == ("copy", "copy")


def test_of_a_flag_given_twice_the_last_counts() -> None:
    config, _ = _settings(["--preset", "seed-158m", "--preset=story-cpu", "--data", "stories", "--out", "nowhere"])
    assert config.model == preset("story-cpu").model
