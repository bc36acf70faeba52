"""Answers command lines, one JSON list a line: status and what was printed. jax cannot be imported here.

A list is the arguments of train.py, or of `python -m moe_jax` or benchmark.py where it begins with their name.
"""

import contextlib
import io
import json
import sys

sys.modules["jax"] = None  # type: ignore[assignment]

from moe_jax import cli  # noqa: E402
from moe_jax.commands.benchmark import Benchmark  # noqa: E402


def accept(argv: list[str]) -> int:
    if argv[:1] == ["moe_jax"]:
        return cli.run_command(argv[1:])
    if argv[:1] == ["benchmark.py"]:
        return cli.parse(Benchmark, argv[1:], prog="benchmark.py").execute()
    cli.parse_run(argv)
    return 0


def answer(argv: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(accept, argv)
        except SystemExit as stop:  # --help
            status = int(stop.code or 0)
    return status, out.getvalue(), err.getvalue()


for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), flush=True)
