"""Arguments from a dataclass, on one small enough to read whole."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from moe_jax.cli.arguments import POSITIONAL, arguments_of, read, require
from moe_jax.cli.command import COMMANDS, Command, command
from moe_jax.cli.help import print_help
from moe_jax.config import ConfigError


@dataclass(frozen=True)
class Bake(Command):
    """Bake a cake."""

    cake: Literal["apple", "plum"] = field(metadata=POSITIONAL)
    """What to bake."""
    eggs: int = 3
    """How many eggs, 100 % of them fresh."""
    sugar_cups: float = 0.5
    """Cups of sugar."""
    step: int | None = None
    """Where to begin."""
    name: str = ""
    """Whose cake it is."""
    guest: list[str] = field(default_factory=list)
    """Who comes."""
    icing: bool = False
    """Put icing on it."""
    candles: bool = True
    """Light candles."""

    def execute(self) -> int:
        return 0


def values(*argv: str) -> dict[str, Any]:
    return {name: value for (_, name), value in read(list(arguments_of(Bake)), argv).items()}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["apple"], {"cake": "apple"}),
        (["--eggs", "4"], {"eggs": 4}),
        (["--eggs", "-4"], {"eggs": -4}),
        (["--sugar-cups", "-1e-3"], {"sugar_cups": -1e-3}),
        (["--sugar-cups", "2"], {"sugar_cups": 2.0}),
        (["--sugar_cups=1E3"], {"sugar_cups": 1000.0}),
        (["--step", "7"], {"step": 7}),
        (["--name="], {"name": ""}),
        (["--name=a=b c"], {"name": "a=b c"}),
        (["--name", "-x"], {"name": "-x"}),
        (["--guest", "Ann", "--guest=Bob"], {"guest": ["Ann", "Bob"]}),
        (["--icing"], {"icing": True}),
        (["--no-candles"], {"candles": False}),
        (["--icing", "--no-icing"], {"icing": False}),
        (["--icing", "plum", "--eggs", "1", "--eggs=2"], {"icing": True, "cake": "plum", "eggs": 2}),
    ],
    ids=lambda x: " ".join(x)[:40],
)
def test_what_can_be_typed(argv: list[str], expected: dict[str, Any]) -> None:
    found = values(*argv)
    assert found == expected
    assert {name: type(value) for name, value in found.items()} == {n: type(v) for n, v in expected.items()}


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--eggs", "2.5"], "--eggs 2.5: is not a whole number"),
        (["--sugar-cups", "much"], "--sugar-cups much: is not a number"),
        (["--eggs"], "--eggs: needs a value"),
        (["--icing=yes"], "--icing yes: takes no value; it is given, or left out"),
        (["apple", "--icing", "yes"], "--icing yes: takes no value; it is given, or left out"),
        (["apple", "plum"], "plum: belongs to no flag"),
        (["pear"], "CAKE pear: must be one of apple, plum"),
        (["--egs", "4"], "--egs: no such flag; perhaps --eggs was meant"),
        (["--cups", "4"], "--cups: no such flag; --help"),
        (["--kitchen.eggs", "4"], "--kitchen.eggs: no such flag; perhaps --eggs was meant"),
        (["--cake", "apple"], "--cake: no such flag"),
    ],
    ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else "",
)
def test_what_is_wrong_is_said_in_one_sentence(argv: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        values(*argv)
    assert str(error.value).startswith(sentence)


def test_what_must_be_given() -> None:
    with pytest.raises(ConfigError, match="CAKE: must be given, one of apple, plum"):
        require(arguments_of(Bake), read(list(arguments_of(Bake)), ["--eggs", "1"]))
    assert Bake.parse(["plum", "--guest", "Ann"]) == Bake("plum", guest=["Ann"])


def test_help_says_what_stands_below_each_field(capsys: pytest.CaptureFixture[str]) -> None:
    print_help(Bake, "bake", [])
    printed = " ".join(capsys.readouterr().out.split())
    assert "usage: bake [CAKE] [--flag VALUE ...] Bake a cake." in printed
    for line in (
        "CAKE What to bake. [apple, plum; must be given]",
        "--eggs N How many eggs, 100 % of them fresh. [default 3]",
        "--sugar-cups X Cups of sugar. [default 0.5]",
        "--step N Where to begin.",
        "--guest TEXT Who comes. [may be repeated]",
        "--icing, --no-icing Put icing on it. [default off]",
        "--candles, --no-candles Light candles. [default on]",
    ):
        assert line in printed


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from moe_jax.cli.help import field_docs

    for a in command(name).arguments():
        assert field_docs(a.owner).get(a.name), f"{name}: {a.flag}"
