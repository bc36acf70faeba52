"""Commands in tests: argv parsed as a program parses it, and what a refusal says."""

import contextlib
import functools
import importlib
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tyro

from moe_jax.cli import sft, train
from moe_jax.cli.main import main, run_command
from moe_jax.config import ConfigError, RunConfig, UserError
from moe_jax.training.start import Start


def train_settings(*argv: str) -> tuple[RunConfig, Start]:
    """The settings that `train.py` takes from these arguments, and what the run starts from."""
    arguments, start = train.parse(argv)
    return arguments.config, start


def sft_settings(*argv: str) -> tuple[RunConfig, Start]:
    """The same of `moe-jax sft`."""
    arguments, start = sft.parse(argv)
    return arguments.config, start


def refusal(call: Callable[..., Any], *arguments: Any) -> str:
    """What a call says that refuses its arguments, on one line: the text of our error, or what tyro prints."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.raises((ConfigError, UserError, SystemExit)) as error:
        call(*arguments)
    if isinstance(error.value, SystemExit):
        assert error.value.code == 2
        return plain(stderr.getvalue())
    return str(error.value)


def refused(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What `moe-jax` says to arguments that it refuses with status 2, on one line."""
    try:
        status = main(run_command, argv)
    except SystemExit as leaving:
        status = leaving.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, ""), err
    assert "Traceback" not in err
    return plain(err)


def plain(box: str) -> str:
    """A box of tyro's as a line of text."""
    return " ".join(re.sub("[╭╮╰╯│─]|-{9,}", " ", box).split())


def accept(name: str, argv: Sequence[str]) -> None:
    """Parse the arguments of a command of `moe-jax`, and do nothing."""
    if name in ("train", "sft"):
        {"train": train, "sft": sft}[name].parse(argv)
        return
    module = "import_model" if name == "import" else name
    command = getattr(importlib.import_module(f"moe_jax.cli.{module}"), module)
    tyro.cli(functools.wraps(command)(lambda *values, **named: 0), args=argv)
