"""Help: grouped, within the terminal, and whatever else is typed."""

import pytest

from moe_jax.cli import main
from moe_jax.cli.command import COMMANDS, command
from moe_jax.cli.settings import COMMON
from moe_jax.cli.train import Train
from moe_jax.config import SECTIONS


def printed_help(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main.main(lambda argv: main.run_as(Train, argv, "train.py"), [*argv, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_the_usual_flags_fit_a_screen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = printed_help(capsys)
    assert text.count("\n") <= 50
    flags = [line.split()[0].rstrip(",") for line in text.splitlines() if line.startswith("  --")]
    assert flags == [*COMMON, "--dry-run"]
    assert "see --help all" in text


def test_all_flags_by_section(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed_help(capsys, "all")
    section = printed_help(capsys, "routing")
    assert [line for line in section.splitlines() if line.endswith(":")] == ["routing:"]
    assert all(f"  {a.flag}" in section for a in Train.arguments() if a.is_flag and a.section == "routing")
    titles = [text.index(f"\n{title}:") for title in ("common flags", *SECTIONS)]
    assert titles == sorted(titles)
    for a in Train.arguments():
        assert all(f"  {flag}" in text or f", {flag}" in text for flag in a.flags) == a.is_flag


def test_help_is_answered_whatever_the_other_arguments_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Defaults are those of the command's preset."""
    text = " ".join(printed_help(capsys, "--preset", "giant", "--experts", "x", "stray").split())
    assert "horizon of the learning-rate schedule. [default 900]" in text
    assert main.main(main.run_command, ["plan", "--help"]) == 0
    assert "horizon of the learning-rate schedule. [default 5000]" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_the_terminal(
    name: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No line is longer; a flag's names, which are not broken, may be on a line of their own."""
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main.main(main.run_command, [name, "--help"]) == 0
    for line in capsys.readouterr().out.splitlines():
        assert len(line) <= columns or line.startswith("  --"), line
    assert command(name).__doc__


def test_all_commands_have_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help"], ["-h"]):
        assert main.main(main.run_command, argv) == 0
        out = capsys.readouterr().out
        assert all(f"  {name:<14} {line}\n" in out for name, (_, _, line) in COMMANDS.items())
        assert all(len(line) <= 80 for line in out.splitlines())
