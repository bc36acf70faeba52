"""Runs command lines in one process, one after the other. Most commands take less time than a start of Python and jax.

A request is a line of JSON: the words after `python`, the folder to work in, and what is typed. The answer is the
status, and what was printed. `parse` as the first word stands for train.py, whose arguments are read and not used.
With the argument `--no-jax`, jax cannot be imported.
"""

import contextlib
import io
import json
import os
import runpy
import sys
import traceback
from collections.abc import Sequence

from moe_jax.cli import main
from moe_jax.cli.train import parse


def accept(argv: Sequence[str]) -> int:
    parse(argv)
    return 0


def run(words: list[str]) -> int:
    """The exit status of a command."""
    kind, *rest = words
    if kind == "parse":
        return main.main(accept, rest)
    try:
        if kind == "-c":
            exec(compile(rest[0], "-c", "exec"), {"__name__": "__main__"})
        elif kind == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, os.path.dirname(kind))
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def answer(words: list[str], folder: str, typed: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    os.chdir(folder)
    sys.stdin = io.StringIO(typed)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run(words)
    return status, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    if "--no-jax" in sys.argv:
        sys.modules["jax"] = None  # type: ignore[assignment]
    requests, answers = sys.stdin, sys.stdout
    for line in requests:
        print(json.dumps(answer(*json.loads(line))), file=answers, flush=True)
