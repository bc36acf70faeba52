"""What `plan` accepts: the settings of `train.py`, near names of cards, and no flag that it would ignore."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_jax.cli.main import main, run_command
from moe_jax.cli.text_plan import TextPlans
from moe_jax.cli.train import Train
from moe_jax.config import RunConfig
from moe_jax.config.presets import preset, with_vocabulary
from moe_jax.planning import search
from moe_jax.planning.device_memory import Bound, Memory
from moe_jax.planning.own_text import Limits, TextPlan
from moe_jax.planning.target import Target
from moe_jax.system import environment


def memory(total: float) -> Memory:
    return Memory(arguments=total - 30, outputs=10, temporary=20, warned=False)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The settings of each step that is planned. All fit."""
    found: list[RunConfig] = []

    def step(config: RunConfig, target: Target) -> search.Row:
        found.append(config)
        return search.Row(config, "bfloat16", 0, 4, Bound({"cublas": memory(100)}), True, "cuDNN's")

    monkeypatch.setattr(search, "plan_step", step)
    monkeypatch.setattr(search, "plan_inference", lambda config, target: {"evaluation": 100.0})
    monkeypatch.setattr(environment, "prepare_environment", list)
    return found


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        ("t1000", "perhaps quadro-t1000-4gb was meant"),
        ("RTX 3060", "perhaps rtx3060-12gb was meant"),
        ("rtx30", "perhaps rtx3050-4gb or rtx3060-12gb was meant"),
        ("nothere.json", "--gpu nothere.json: there is no such file; the names are h100-80gb, "),
        ("no/folder", "--gpu no/folder: there is no such file; "),
    ],
)
def test_a_near_card_and_a_file_that_is_not_there_are_named(
    gpu: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run_command, ["plan", "--gpu", gpu]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory", "4GB", "--gpu", "rtx3050-4gb"], "--gpu rtx3050-4gb: plans for a GPU; leave --data and --memory"),
        (["--memory", "4GB", "--verify"], "--verify: plans for a GPU; leave --data and --memory out"),
        (["--data", "stories", "--every-optimizer"], "--every-optimizer: plans for a GPU; leave --data and --memory"),
        (["--data", "stories", "--seq-len", "64"], "--seq-len 64: is for a plan of a GPU; with a text give it to"),
        (["--verify", "--gpu", "rtx3050-4gb"], "--gpu rtx3050-4gb: --verify plans for the card in this machine"),
        (["--gpu", "rtx3050-4gb", "--tpu", "v5e-8"], "--tpu v5e-8: is for plans of several devices"),
    ],
)
def test_a_flag_that_would_be_ignored_is_refused(
    arguments: list[str], said: str, planned: list[RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run_command, ["plan", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert planned == []


def test_the_settings_of_train_py_are_planned(
    planned: list[RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From its settings file, and by its flags, which override the file. The printed command repeats both, and
    `train.py` then has the settings that were planned. What plan does not read, such as `out`, it ignores."""
    file = tmp_path / "lean.toml"
    file.write_text('preset = "seed-158m"\nout = "runs/x"\n[model]\nseq_len = 128\nlayers = 5\n[train]\nlr = 1e-3\n')
    given = ["--config", str(file), "--model.layers", "4", "--no-model.bias", "--batch-size", "6", "--optimizer"]
    assert main(run_command, ["plan", *given, "adafactor"]) == 0
    (config,) = planned
    assert (config.preset, config.model.seq_len, config.model.layers, config.model.bias) == ("seed-158m", 128, 4, False)
    assert (config.train.batch_size, config.train.grad_accum, config.train.optimizer) == (48, 1, "adafactor")
    command = capsys.readouterr().out.splitlines()[-2]
    assert command == (
        f"uv run --extra cuda12 train.py --preset seed-158m --config {file} --model.layers 4 --no-model.bias "
        "--batch-size 48 --grad-accum 1 --optimizer adafactor"
    )
    trained = Train.parse([*command.split()[5:], "--out", str(tmp_path / "run")]).settings.config
    assert (with_vocabulary(trained).model, trained.train) == (config.model, config.train)


def test_a_plan_without_settings_is_of_the_preset(planned: list[RunConfig]) -> None:
    assert main(run_command, ["plan", "--preset", "nano"]) == 0
    (config,) = planned
    assert config.model == with_vocabulary(preset("nano")).model
    assert config.train == preset("nano").train


def test_wrong_settings_are_refused_as_by_train_py(
    planned: list[RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text("[routing]\ntop_k = 99\n")
    assert main(run_command, ["plan", "--config", str(file)]) == 2
    assert "wrong.toml: [routing] top_k = 99: must be" in capsys.readouterr().err
    assert main(run_command, ["plan", "--experts", "many"]) == 2
    assert "--experts many: is not a whole number" in capsys.readouterr().err
    assert planned == []


def test_what_is_compiled_is_named_before_it_is_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The spinner's words: each setting with its number, then each program between the steps."""
    shown: list[str] = []

    @contextlib.contextmanager
    def working(what: str) -> Iterator[None]:
        shown.append(what)
        yield

    def bound(target: Target, *program: Any) -> Bound:
        shown.append("compiled")
        return Bound({"cublas": memory(3000 if len(shown) < 4 else 1000)})

    monkeypatch.setattr(search, "working", working)
    monkeypatch.setattr(search, "bound", bound)
    monkeypatch.setattr(environment, "prepare_environment", list)
    assert main(run_command, ["plan", "--preset", "nano", "--optimizer", "adamw-8bit", "--batch-size", "1"]) == 0
    assert shown[1::2] == ["compiled"] * 5
    assert shown[::2] == [
        "compiling the training step, adamw-8bit: setting 1 of at most 4",
        "compiling the training step, adamw-8bit with remat: setting 2 of at most 4",
        "compiling evaluation, 1 of 3 programs that run between the steps",
        "compiling prefill, 2 of 3 programs that run between the steps",
        "compiling decoding, 3 of 3 programs that run between the steps",
    ]


@pytest.mark.parametrize(("problem", "status"), [("", 0), ("too much", 1)])
def test_a_plan_for_a_text_has_a_command_only_if_it_fits(
    problem: str, status: int, planned: list[RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    plan = TextPlan(preset("nano"), 100.0, problem)
    monkeypatch.setattr("moe_jax.cli.plan.plan_for_text", lambda *_: TextPlans([plan], Limits(50), []))
    assert main(run_command, ["plan", "--memory", "4GB"]) == status
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["fits"], result["command"] is None) == (not problem, bool(problem))
