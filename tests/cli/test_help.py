"""Help: grouped, with the defaults of the preset that is typed, within the terminal, and whatever else is typed."""

import itertools

import pytest

from moe_jax.cli import main
from moe_jax.cli.command import COMMANDS, command
from moe_jax.cli.settings import COMMON
from moe_jax.cli.train import Train
from moe_jax.config import SECTIONS
from moe_jax.config.flags import SHORT_FLAGS


def printed_help(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main.main(lambda argv: main.run_as(Train, argv, "train.py"), [*argv, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_usual_flags_first_then_short_ones_then_sections(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed_help(capsys)
    titles = [text.index(f"\n{title}:") for title in ("flags that everybody uses", "more flags", *SECTIONS)]
    assert titles == sorted(titles)
    first, more = text[titles[0] : titles[1]], text[titles[1] : titles[2]]
    assert [line.split()[0].rstrip(",") for line in first.splitlines() if line.startswith("  --")] == list(COMMON)
    for short in [*SHORT_FLAGS, "--config", "--dry-run", "--upcycle"]:
        assert f"  {short}" in (first if short in COMMON else more)
    places = [*titles[2:], len(text)]
    for section, (begin, end) in zip(SECTIONS, itertools.pairwise(places), strict=True):
        flags = [line.strip() for line in text[begin:end].splitlines() if line.startswith("  --")]
        assert flags
        assert all(flag.startswith((f"--{section}.", f"--no-{section}.")) for flag in flags)


@pytest.mark.parametrize(
    ("argv", "default"),
    [
        ([], "[default 900]"),
        (["--preset", "seed-158m"], "[default 5000]"),
        (["--preset=story"], "[default 4000]"),
        (["--preset", "giant", "--experts", "x", "stray"], "[default 900]"),
        (["--preset"], "[default 900]"),
    ],
)
def test_defaults_are_those_of_the_preset(argv: list[str], default: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And help is answered whatever the other arguments are."""
    text = " ".join(printed_help(capsys, *argv).split())
    assert "horizon of the learning-rate schedule. " + default in text


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
        assert all(f"  {name:<14} {line}\n" in out for name, (_, line) in COMMANDS.items())
        assert all(len(line) <= 80 for line in out.splitlines())
