"""`moe-jax completion`: the script is one that the shell can read, and it completes commands, flags and choices."""

import shutil
import subprocess
from pathlib import Path

import pytest

from moe_jax.cli.command import COMMANDS, command
from moe_jax.cli.help import Completion
from tests.cli.test_cli import run_without_jax


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For bash, printed by the program without jax."""
    folder = tmp_path_factory.mktemp("completion")
    result = run_without_jax(folder, ["-m", "moe_jax", "completion", "bash"])
    assert (result.returncode, result.stderr) == (0, "")
    (folder / "script").write_text(result.stdout)
    return folder / "script"


def completed(script: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    line = " ".join(f"'{word}'" for word in ("moe-jax", *words))
    ask = f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; _shtab_moe_jax"
    code = f"source {script}; {ask}; printf '%s\\n' ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True, cwd=script.parent)
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["verify"], {"verify-resume"}),
        (["train", "--model.exp"], {"--model.experts", "--model.expert-hidden"}),
        (["train", "--no-model.di"], set()),
        (["train", "--steps", "3", "--optimizer", "adamw-"], {"adamw-bf16", "adamw-8bit"}),
        (["train", "--routing.disp"], {"--routing.dispatch"}),
        (["train", "--resume", "--dispatch", ""], {"capacity", "blocks"}),
        (["benchmark", "se"], {"serve"}),
        (["train", "--config", "scr"], {"script"}),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bash_completes(script: Path, words: list[str], offered: set[str]) -> None:
    assert set(completed(script, *words)) == offered


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_knows_every_command(script: Path) -> None:
    assert set(completed(script, "")) >= set(COMMANDS)


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_every_flag(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert Completion.parse([shell]).execute() == 0
    printed = capsys.readouterr().out
    for a in command("train").arguments():
        if a.is_flag:
            assert all(flag.removeprefix("--") in printed for flag in [*a.flags, *a.off_flags])
    if shutil.which(shell):
        done = subprocess.run([shell, "-n"], input=printed, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
