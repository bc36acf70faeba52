"""The start of every program: what becomes of errors and interrupts."""

import sys
from collections.abc import Sequence
from unittest.mock import Mock

import pytest

from moe_jax.cli import chat, main


def test_an_interrupt_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(argv: Sequence[str]) -> int:
        raise KeyboardInterrupt

    assert main.main(interrupted, []) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize("error", ["Unable to initialize backend 'nonsense'", "Unknown backend nonsense"])
def test_a_platform_that_does_not_exist(error: str, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")

    def program(argv: Sequence[str]) -> int:
        raise RuntimeError(error)

    assert main.main(program, []) == 1
    assert capsys.readouterr().err == (
        "error: JAX_PLATFORMS=nonsense: JAX cannot start this platform; unset the variable, or set it to cpu\n"
    )


def test_closed_streams_are_empty_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `moe-jax chat <&- >&-`: Python has None in their place."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)

    def program(argv: Sequence[str]) -> int:
        print("nobody reads this")
        return 0 if (sys.stdin.isatty(), sys.stdin.read()) == (False, "") else 1

    assert main.main(program, []) == 0


def test_a_defect_keeps_its_traceback(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["moe-jax"])

    def program(argv: Sequence[str]) -> int:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        main.main(program, [])


def test_the_end_of_a_chat_ends_its_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At a terminal only: in a pipe every line is an answer."""

    def ended(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", ended)
    for person, printed in ((True, "\n"), (False, "")):
        assert chat._next_line(person) is None
        assert capsys.readouterr().out == printed
    monkeypatch.setattr("builtins.input", lambda prompt: prompt + "a cat")
    assert (chat._next_line(True), chat._next_line(False)) == ("\n> a cat", "a cat")
    monkeypatch.setattr("builtins.input", Mock(side_effect=[KeyboardInterrupt, "exit", "exit"]))
    assert (chat._next_line(True), chat._next_line(False)) == (None, "exit")
    assert "Ctrl-D or /bye leaves" in capsys.readouterr().out
