"""Every flag of every program against values that it cannot have: status 2, one line with its name, nothing written."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.cli.arguments import arguments_of
from moe_jax.cli.benchmark import Benchmark
from moe_jax.cli.command import COMMANDS, command
from moe_jax.config import SECTIONS
from moe_jax.config.presets import preset
from moe_jax.config.section import SHORT_FLAGS, flag_of
from tests.reliability import runs

pytestmark = pytest.mark.reliability
NANO = preset("nano")
HUGE = "9" * 400
"""Too large for a float."""
ANY_NUMBER = {"routing.capacity_factor", "routing.device_capacity_factor"}  # every positive number means something


def fields() -> dict[str, Any]:
    """ "section.name" -> type, of every field."""
    kinds: dict[str, Any] = {}
    for section in ("", *SECTIONS):
        owner = NANO.section(section)
        for f in dataclasses.fields(owner):
            if not dataclasses.is_dataclass(getattr(owner, f.name)):
                kinds[f"{section}.{f.name}".lstrip(".")] = f.type
    return kinds


WORDS = st.text(st.characters(codec="ascii", categories=["L"]), min_size=1, max_size=8).filter(
    lambda word: word.lower() not in ("nan", "inf", "infinity")
)


def bad_values(name: str, kind: Any) -> st.SearchStrategy[str]:
    """Values that the field cannot have, as typed."""
    if get_origin(kind) is Literal:
        return WORDS.filter(lambda word: word not in (*get_args(kind), "auto"))  # --preset auto is chosen later
    if kind is int:
        number = st.integers(max_value=-1) | st.integers(min_value=2**33)
        if name == "data.stories_seed":
            number = st.integers(max_value=-1) | st.integers(min_value=2**63)
        return number.map(str) | WORDS | st.floats(0.1, 0.9).map(str)
    if kind is float:
        number = st.floats(max_value=-1e-3, allow_infinity=False).map(str) | st.sampled_from(["nan", "inf", "-inf"])
        large = st.floats(min_value=1e10, allow_infinity=False).map(str)
        return number | WORDS | (large if name not in ANY_NUMBER else st.nothing())
    if kind is bool:
        return WORDS
    words = {"data.source": st.just(""), "upcycle": WORDS, "init_from": WORDS, "execution.mesh": WORDS}
    return words.get(name, st.nothing())


CASES = {name: kind for name, kind in fields().items() if not bad_values(name, kind).is_empty}


class Server:
    """The program, started once; each command line costs it a tenth of a second."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, str(runs.ROOT / "tests" / "reliability" / "flag_server.py")]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, cwd=folder, env=runs.environment(folder / "cache")
        )

    def ask(self, argv: list[str]) -> tuple[int, str, str]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(argv) + "\n")
        self.process.stdin.flush()
        return tuple(json.loads(self.process.stdout.readline()))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("flags"))
    yield server
    server.process.kill()
    server.process.wait()


def refused(server: Server, argv: list[str], flag: str) -> None:
    status, out, err = server.ask(argv)
    assert (status, out) == (2, ""), (argv, err)
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert flag in err, err
    assert list(server.folder.iterdir()) == []


def test_there_is_a_case_for_every_flag_that_can_be_wrong() -> None:
    """Two flags have no case. Any text can name the folder of a run (`out`). `base` is the `--run` of `sft`."""
    assert set(fields()) - set(CASES) == {"out", "base"}
    assert len(CASES) > 50
    assert {long.removeprefix("--").replace("-", "_") for long in SHORT_FLAGS.values()} <= set(CASES)


def hammer(name: str, examples: int, server: Server) -> None:
    asked = []
    section, _, field = name.rpartition(".")
    flag = flag_of(section, field)

    @settings(max_examples=examples)
    @given(bad_values(name, CASES[name]))
    def check(value: str) -> None:
        asked.append(value)
        refused(server, f"{flag}={value}".split(" "), flag)

    check()
    if CASES[name] is int:
        refused(server, f"{flag}={HUGE}".split(" "), flag)


@pytest.mark.parametrize("name", CASES)
def test_bad_values(name: str, server: Server) -> None:
    hammer(name, 5, server)


def test_good_flags_are_accepted(server: Server) -> None:
    """The server itself: what it answers with 0, and that jax cannot be imported in it."""
    for argv in (
        [],
        ["--steps", "3"],
        ["--capacity-factor", "1e9"],
        ["--dry-run"],
        ["--lr", "1e-3", "--set", "model.bias=true", "--lr=0.5"],
    ):
        assert server.ask(argv) == (0, "", ""), argv


def flags_of_commands() -> dict[str, tuple[list[str], str, st.SearchStrategy[str]]]:
    """ "command --flag" -> the program and command, the flag, and values that it cannot have."""
    programs = {name: (["moe-jax", name], command(name)) for name in COMMANDS}
    programs["benchmark.py"] = (["benchmark.py"], Benchmark)
    found = {}
    for name, (argv, kind) in programs.items():
        for a in arguments_of(kind):
            if not a.positional:
                found[f"{name} {a.flag}"] = (argv, a.flag, bad_command_values(a.name, a.annotation))
    return {name: case for name, case in found.items() if not case[2].is_empty}


def bad_command_values(name: str, kind: Any) -> st.SearchStrategy[str]:
    if kind is int or kind == int | None:
        number = st.integers(max_value=-1) | st.integers(min_value=2**40)
        return number.map(str) | WORDS | st.floats(0.1, 0.9).map(str)
    if kind is float:
        number = st.floats(max_value=-1e-3, allow_infinity=False).map(str) | st.sampled_from(["nan", "inf", "-inf"])
        return number | WORDS
    if get_origin(kind) is Literal:
        return WORDS.filter(lambda word: word not in get_args(kind))
    if kind is bool:
        return WORDS
    return WORDS if name in ("run", "data", "file", "gpu", "config") else st.nothing()


COMMAND_CASES = flags_of_commands()


def hammer_command(case: str, examples: int, server: Server, run: Path) -> None:
    argv, flag, values = COMMAND_CASES[case]
    given_run = (
        ["--run", str(run)] if any(name.startswith(f"{case.split()[0]} --run") for name in COMMAND_CASES) else []
    )
    if argv[-1] in ("export", "merge") and flag != "--out":
        given_run += ["--out", "exported"]
    if argv[-1] == "quantize" and flag != "--to":
        given_run += ["--to", "int8"]
    if argv[-1] == "sft" and flag != "--data":
        given_run += ["--data", "chats.jsonl"]
    asked = []

    @settings(max_examples=examples)
    @given(values)
    def check(value: str) -> None:
        asked.append(value)
        refused(server, [*argv, *given_run, f"{flag}={value}"], flag)

    check()
    if "integers" in repr(values):
        refused(server, [*argv, *given_run, f"{flag}={HUGE}"], flag)


@pytest.mark.parametrize("case", COMMAND_CASES)
def test_bad_values_of_commands(case: str, server: Server, whole: tuple[Path, dict[str, Any]]) -> None:
    hammer_command(case, 5, server, whole[0])
