"""Answers command lines, one JSON list a line: status and what was printed. jax cannot be imported here.

A list is the arguments of train.py, which is not started then, or of `moe-jax` where it begins with this name.
"""

import contextlib
import io
import json
import sys

sys.modules["jax"] = None  # type: ignore[assignment]

from moe_jax.cli import main  # noqa: E402
from moe_jax.cli.train import Train  # noqa: E402


def accept(argv: list[str]) -> int:
    if argv[:1] == ["moe-jax"]:
        return main.run_command(argv[1:])
    Train.parse(argv)
    return 0


def answer(argv: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main.main(accept, argv)
        except SystemExit as stop:  # --help
            status = int(stop.code or 0)
    return status, out.getvalue(), err.getvalue()


for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), flush=True)
