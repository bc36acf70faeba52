"""The command line: what is wrong is said with status 2, before jax is imported, and nothing is written.

A few command lines run in a process of their own, as a person would type them, with an import of jax made to fail. The
others are read in this process.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.cli.main import COMMANDS, main, run_command
from moe_jax.config import SECTIONS, ConfigError, RunConfig
from moe_jax.config.presets import preset
from moe_jax.config.section import flag_of, long_flag, short_flags
from tests.support.commands import plain, refusal, refused, sft_settings, train_settings

ROOT = Path(__file__).resolve().parents[2]
SHORT = [
    *("--preset", "--data", "--tokenizer", "--out", "--resume", "--steps", "--batch-size", "--grad-accum", "--seq-len"),
    *("--lr", "--optimizer", "--precision", "--seed", "--eval-every", "--save-every", "--experts", "--top-k"),
    *("--capacity-factor", "--dispatch", "--minutes"),
]
"""The short names that everybody uses."""


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
    (folder / "held" / "checkpoints" / "step_00000010" / "arrays").mkdir(parents=True)
    values = preset("nano").to_dict()
    values["model"] |= model_changes
    values["routing"] |= routing or {}
    (folder / "held" / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps"], "--steps"),
        (["--stesp", "3"], "Perhaps you meant: --train.steps, --steps"),
        (["--experts", "1"], "--top-k 2: must be between 1 and --experts 1"),
        (
            ["--model.width", "100", "--model.heads", "20"],
            "--model.heads 20: head width 100 / 20 = 5 is odd; RoPE needs",
        ),
        (["--data", "no/such/path"], "no/such/path"),
        (["--run", "held"], "--run"),
        (["--num-processes", "2"], "--coordinator-address : must be HOST:PORT of process 0, such as 127.0.0.1:9876"),
    ],
    ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else "",
)
def test_bad_training_arguments(tmp_path: Path, capsys, arguments: list[str], said: str) -> None:
    """The flag is named, and what is allowed. Nothing is written."""
    assert said in refused(["train", *arguments], capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["paint"], "paint: must be one of train, sft,"),
        (["generate", "--run", "held", "--step", "0.5"], "--step"),
        (["generate", "--run", "held", "--step", "7"], "--step 7: held has no such checkpoint; it has 10"),
        (["generate", "--run", "held", "--temperature", "-1"], "--temperature -1.0: must be between 0 and 100"),
        (["inspect", "--run", "held", "--file", "no/such/text"], "--file no/such/text"),
        (["inspect", "--run", "held", "--file", "a", "--text", "b"], "--file a: --text is given too"),
        (["inspect", "--run", "held", "--out", "held"], "--out held: is a folder; name a file"),
        (["plot", "--run", "held", "--run", "no/such/run"], "--run no/such/run"),
        (["export", "--run", "held"], "--out"),
        (["export", "--run", "held", "--out", "held"], "--out held: is not empty; name a new folder"),
        (["sft", "--data", "x.jsonl"], "--run: must be given"),
        (["sft", "--run", "held"], "--data: must be given"),
        (["doctor"], "--run RUN: give either the folder of a run, or --gpu"),
    ],
    ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else "",
)
def test_bad_commands(tmp_path: Path, capsys, arguments: list[str], said: str) -> None:
    make_held(tmp_path)
    assert said in refused(arguments, capsys)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (["train.py", "--top-k", "9"], "--top-k 9: must be between 1 and --experts 8"),
        (["train.py", "--out", "held"], "--out held: already holds a run; add --resume"),
        (["train.py", "--upcycle", "held"], "--upcycle held: has experts already"),
        (["train.py", "--init-from", "held"], "--init-from held: is a run of moe-jax"),
        (["-m", "moe_jax", "generate", "--run", "no/such/run"], "--run no/such/run"),
    ],
    ids=lambda x: " ".join(x)[:40],
)
def test_a_program_refuses_before_jax_is_imported(tmp_path: Path, program: list[str], said: str) -> None:
    make_held(tmp_path)
    before = (tmp_path / "held" / "config.json").read_bytes()
    script = [str(ROOT / program[0])] if program[0].endswith(".py") else program[:1]
    result = run_without_jax(tmp_path, [*script, *program[1:]])
    assert (result.returncode, result.stdout) == (2, "")
    assert said in plain(result.stderr)
    assert (tmp_path / "held" / "config.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["held", "poison"]


# Help


def test_the_help_of_training_shows_the_usual_flags_without_jax(tmp_path: Path) -> None:
    """Each with its value in the preset. `--help-verbose` has every field of the configuration."""
    brief = run_without_jax(tmp_path, [str(ROOT / "train.py"), "--preset", "story-cpu", "--help"])
    assert brief.returncode == 0
    shown = re.findall(r"^│ (--[a-z-]+)", brief.stdout, re.MULTILINE)
    assert {*SHORT, "--dry-run"} <= {*shown}
    assert len(brief.stdout.splitlines()) <= 60
    assert "--steps INT (default: 4863)" in brief.stdout
    every = run_without_jax(tmp_path, [str(ROOT / "train.py"), "--help-verbose"]).stdout
    hidden = {"base", "format", "lora_rank", "lora_alpha", "train_router"}
    for section in map(RunConfig().section, ("", *SECTIONS)):
        for name in {name for name, _ in section.values()} - hidden:
            assert flag_of(section, name) in every


@pytest.mark.parametrize(
    ("words", "rate", "context"),
    [([], "0.001", 256), (["--lora", "4"], "0.003", 256), (["--run", "stories", "--lora=4"], "0.003", 512)],
)
def test_the_help_of_tuning_shows_the_values_of_a_tuning(
    words: list[str], rate: str, context: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """600 steps at a rate of its own, and the model of the run, if one is named."""
    with pytest.raises(SystemExit):
        main(run_command, ["sft", *words, "--help"])
    printed = plain(capsys.readouterr().out)
    for line in ("--steps INT (default: 600)", f"--lr FLOAT (default: {rate})", f"--seq-len INT (default: {context})"):
        assert line in printed


@pytest.mark.parametrize("name", COMMANDS)
def test_every_parameter_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Text stands between a flag and its default."""
    with pytest.raises(SystemExit) as leaving:
        main(run_command, [name, "--help-verbose" if name in ("train", "sft") else "--help"])
    assert leaving.value.code == 0
    printed = plain(capsys.readouterr().out)
    assert not re.findall(r"--[a-z.-]+ [A-Z|{}a-z,0-9-]+ \(default", printed)


def test_all_commands_have_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(run_command, ["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name:<14} {line}\n" in out for name, line in COMMANDS.items())
    assert all(len(line) <= 80 for line in out.splitlines())


# The settings of a run


def test_every_field_is_set_by_its_flag_and_by_its_long_flag() -> None:
    """All values of seed-158m, over nano."""
    config = preset("seed-158m")
    for flag in (flag_of, long_flag):
        words: list[str] = []
        for name, field, value in config.settings():
            typed = flag(config.section(name), field)
            if field in ("base", "format", "lora_rank", "lora_alpha", "train_router"):
                continue
            if isinstance(value, bool):
                head, _, last = typed.removeprefix("--").rpartition(".")
                words.append(typed if value else f"--{head}.no-{last}" if head else f"--no-{last}")
            else:
                words.append(f"{typed}={value}")
        assert train_settings(*words)[0] == config


def test_short_names() -> None:
    named = {flag for name in ("", *SECTIONS) for flag in short_flags(type(RunConfig().section(name))).values()}
    assert {*SHORT} <= named
    config, start = train_settings("--steps", "7", "--top-k=1", "--out", "nowhere")
    assert (config.train.steps, config.model.routing.top_k, config.out, start.saved) == (7, 1, "nowhere", None)
    assert train_settings("--deterministic", "--no-deterministic")[0] == train_settings()[0]


# What a run starts from


def test_a_resumed_run_starts_from_its_own_settings(tmp_path: Path) -> None:
    """Only what is typed differs from the saved configuration. The folder may have been copied: its config.json names
    another one."""
    make_held(tmp_path)
    values = preset("nano").to_dict() | {"out": "elsewhere"}
    values["model"]["experts"] = 4
    values["train"]["lr"] = 0.5
    (tmp_path / "held" / "config.json").write_text(json.dumps(values))
    config, start = train_settings("--out", "held", "--resume", "--steps", "4000")
    assert start.saved is not None
    assert (config.model.experts, config.train.lr, config.train.steps, config.run_dir) == (4, 0.5, 4000, "held")
    assert (start.saved.train.steps, start.saved.run_dir) == (preset("nano").train.steps, "held")
    with pytest.raises(ConfigError, match="--experts 8: must stay 4 with the run in held"):
        train_settings("--out", "held", "--resume", "--experts", "8")


def test_flags_of_a_resumed_run_need_not_fit_the_preset(tmp_path: Path) -> None:
    """Twelve of 16 experts; nano has 8. What does not fit the run itself is refused by the run's numbers."""
    make_held(tmp_path, {"top_k": 12}, experts=16)
    config, _ = train_settings("--out", "held", "--resume", "--top-k", "12")
    assert (config.model.experts, config.model.routing.top_k) == (16, 12)
    said = refusal(train_settings, "--out", "held", "--resume", "--top-k", "17")
    assert "--top-k 17: must be between 1 and --experts 16" in said


def test_a_run_without_state_of_training_is_not_resumed(tmp_path: Path) -> None:
    make_held(tmp_path)
    (tmp_path / "held" / "checkpoints" / "step_00000010" / "arrays").rmdir()
    with pytest.raises(ConfigError, match="--out held: has weights to read, and no state of training; train from"):
        train_settings("--out", "held", "--resume")


def test_without_a_checkpoint_a_new_run_starts_with_the_flags_alone(tmp_path: Path) -> None:
    """A config.json of a run that ended early is not read. A fine-tuning must be told what it tunes."""
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text("{")
    config, start = train_settings("--out", "begun", "--resume", "--steps", "7")
    assert (start.saved, config.train.steps, config.data.source) == (None, 7, "stories")
    with pytest.raises(ConfigError, match="--run: must be given"):
        sft_settings("--out", "begun", "--resume")


def test_a_run_of_a_small_text_may_be_resumed(tmp_path: Path) -> None:
    """Its tokenizer has fewer entries than were asked for, and its config.json says how many."""
    make_held(tmp_path, vocab_size=400)
    for more in ([], ["--model.vocab-size", "0"]):  # 0 is the tokenizer's number, which the run has by now
        assert train_settings("--out", "held", "--resume", *more)[0].model.vocab_size == 400


def test_an_upcycled_run_starts_from_the_dense_settings(tmp_path: Path) -> None:
    """Experts as wide as the dense FFN; what is typed differs; once it is there, it is resumed as any run."""
    make_held(tmp_path, dense="active", layers=2)
    config, start = train_settings("--upcycle", "held", "--experts", "4", "--lr", "1e-4")
    assert start.saved is None
    assert (config.model.dense, config.model.layers, config.model.expert_hidden) == ("none", 2, 259)
    assert (config.model.experts, config.train.lr, config.run_dir) == (4, 1e-4, "runs/nano-upcycled")
    shutil.copytree(tmp_path / "held", tmp_path / config.run_dir)
    (tmp_path / config.run_dir / "config.json").write_text(json.dumps(config.to_dict()))
    placed = dataclasses.replace(config, out=config.run_dir)
    resumed, again = train_settings("--upcycle", "held", "--resume")
    assert (resumed, again.saved) == (dataclasses.replace(placed, resume=True), placed)
    shutil.copytree(tmp_path / "held", tmp_path / "other")
    with pytest.raises(ConfigError, match="--upcycle other: must stay held with the run in runs/nano-upcycled"):
        train_settings("--out", "runs/nano-upcycled", "--resume", "--upcycle", "other")


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("taken", "is a file; name a folder"),
        ("taken/deep/below", "cannot be written"),
        ("closed/x", "cannot be written"),
    ],
)
def test_an_output_that_cannot_be_written(path: str, problem: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """A folder that refuses stands for one without permission: root may write anywhere."""
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "closed").mkdir()
    true = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: Path(p).name != "closed" and true(p, mode))
    said = refused(["train", "--out", path], capsys)
    assert f"--out {path}: " in said
    assert problem in said
