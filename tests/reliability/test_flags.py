"""Every flag of every program against values that it cannot have: status 2, one line with its name, nothing written."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_jax.cli.arguments import arguments_of
from moe_jax.cli.command import COMMANDS, command

from moe_jax.config import SECTIONS
from moe_jax.config.presets import preset
from moe_jax.config.section import SHORT_FLAGS, flag_of
from tests.reliability import runs

pytestmark = pytest.mark.reliability
HUGE = "9" * 400
"""Too large for a float."""
ANY_NUMBER = {"routing.capacity_factor", "routing.device_capacity_factor"}  # every positive number means something
WORDS = st.text(st.characters(codec="ascii", categories=["L"]), min_size=1, max_size=8).filter(
    lambda word: word.lower() not in ("nan", "inf", "infinity")
)
NAMES = ("run", "data", "file", "gpu", "config", "upcycle", "init_from", "execution.mesh", "execution.memory")
NAMES += ("model.rope_scaling",)
"""Texts that must name something, or have a form of their own."""


def bad_values(name: str, kind: Any, setting: bool) -> st.SearchStrategy[str]:
    """Values that a field of a command or of the configuration cannot have, as typed."""
    if get_origin(kind) is Literal:
        return WORDS.filter(lambda word: word not in get_args(kind))
    if kind in (int, int | None):
        number = st.integers(max_value=-1) | st.integers(min_value=2**33 if setting else 2**40)
        return number.map(str) | WORDS | st.floats(0.1, 0.9).map(str)
    if kind is float:
        number = st.floats(max_value=-1e-3, allow_infinity=False).map(str) | st.sampled_from(["nan", "inf", "-inf"])
        large = st.floats(min_value=1e10, allow_infinity=False).map(str)
        return number | WORDS | (large if setting and name not in ANY_NUMBER else st.nothing())
    if kind is bool or name in NAMES:
        return WORDS
    return st.just("") if name == "data.source" else st.nothing()


class Case(NamedTuple):
    """A flag, what is typed before it, and values that it cannot have."""

    program: str
    argv: list[str]
    flag: str
    kind: Any
    values: st.SearchStrategy[str]


def settings_of_a_run() -> dict[str, Any]:
    """ "section.name" -> type, of every field of the configuration."""
    kinds: dict[str, Any] = {}
    for section in ("", *SECTIONS):
        owner = preset("nano").section(section)
        for f in dataclasses.fields(owner):
            if not dataclasses.is_dataclass(getattr(owner, f.name)):
                kinds[f"{section}.{f.name}".lstrip(".")] = f.type
    return kinds


NEEDED = {
    "import": ["hf"],
    "export": ["--out", "exported"],
    "quantize": ["--to", "int8"],
    "sft": ["--data", "chats.jsonl"],
}
"""What a command must have beside --run."""


def cases() -> dict[str, Case]:
    made = {}
    for name, kind in settings_of_a_run().items():
        section, _, field = name.rpartition(".")
        made[name] = Case("train", ["parse"], flag_of(section, field), kind, bad_values(name, kind, setting=True))
    for name in COMMANDS:
        for a in arguments_of(command(name)):
            if not a.positional:
                needed = NEEDED.get(name, [])
                argv = ["-m", "moe_jax", name, *(needed if a.flag not in needed else [])]
                made[f"{name} {a.flag}"] = Case(
                    name, argv, a.flag, a.annotation, bad_values(a.name, a.annotation, False)
                )
    return {name: case for name, case in made.items() if not case.values.is_empty}


CASES = cases()


@pytest.fixture(scope="module")
def refuses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[list[str], str], None]]:
    """`refuses(argv, flag)`: status 2, one line with the flag, nothing written, and jax not imported."""
    folder = tmp_path_factory.mktemp("flags")
    with runs.Commands(tmp_path_factory.mktemp("cache"), "--no-jax") as commands:

        def check(argv: list[str], flag: str) -> None:
            answer = commands.run(argv, folder)
            assert (answer.returncode, answer.stdout) == (2, ""), (argv, answer.stderr)
            assert answer.stderr.startswith("error: ")
            assert answer.stderr.count("\n") == 1
            assert flag in answer.stderr, answer.stderr
            assert list(folder.iterdir()) == []

        for argv in ([], ["--steps", "3"], ["--capacity-factor", "1e9"], ["--lr", "1e-3", "--set", "model.bias=true"]):
            accepted = commands.run(["parse", *argv], folder)
            assert (accepted.returncode, accepted.stdout, accepted.stderr) == (0, "", ""), argv
        yield check


def test_there_is_a_case_for_every_flag_that_can_be_wrong() -> None:
    """Two settings have no case. Any text can name the folder of a run (`out`). `base` is the `--run` of `sft`."""
    assert set(settings_of_a_run()) - set(CASES) == {"out", "base"}
    assert len(CASES) > 100
    assert {long.removeprefix("--").replace("-", "_") for long in SHORT_FLAGS.values()} <= set(CASES)


def check_case(case: Case, argv: list[str], refuses: Callable[[list[str], str], None]) -> None:
    @settings(max_examples=3)
    @given(case.values)
    def check_value(value: str) -> None:
        refuses([*argv, *f"{case.flag}={value}".split(" ")], case.flag)

    check_value()
    if case.kind in (int, int | None):
        refuses([*argv, *f"{case.flag}={HUGE}".split(" ")], case.flag)


@pytest.mark.parametrize("program", sorted({case.program for case in CASES.values()}))
def test_bad_values(program: str, refuses: Callable[[list[str], str], None], saved: Path) -> None:
    for case in (case for case in CASES.values() if case.program == program):
        takes_run = f"{program} --run" in CASES and case.flag != "--run"
        check_case(case, [*case.argv, *(["--run", str(saved)] if takes_run else [])], refuses)
