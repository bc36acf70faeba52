"""The table of all gradients, a part of it, and the challenges.

    python -m foundation [NAME ...]         the table: each gradient by hand,
                                            by autodiff and by differences
    python -m foundation derive OPERATION   write a file in which you derive
                                            one backward pass
    python -m foundation check OPERATION    what is wrong with it; with --hint,
                                            what to try next
    python -m foundation hunt               plant a bug in the gradients, for
                                            you to find
    python -m foundation run FOLDER         a trained model, by the
                                            hand-derived code alone

NAME is an operation (softmax, attention) or the number of a chapter. The table
exits 1 where a check fails, and 2 for a name that it does not know.
"""

import argparse
import importlib
import os
import sys

from foundation.chapters import UnknownName, selected

COMMANDS = {
    "derive": "foundation.challenges.derive",
    "check": "foundation.challenges.check",
    "hunt": "foundation.challenges.hunt",
    "run": "foundation.trained.run",
}
"""Each command's module; its `main` takes the arguments after the command. jax is loaded only there."""


def main(argv: list[str] | None = None) -> int:
    """Runs a command, or the table. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    # All of it is small and in float64, which a GPU multiplies slowly. So jax need not look for one.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if argv and argv[0] in COMMANDS:
        return importlib.import_module(COMMANDS[argv[0]]).main(argv[1:])
    parser = argparse.ArgumentParser(
        prog="python -m foundation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these operations or chapters")
    arguments = parser.parse_args(argv)
    try:
        operations = selected(arguments.names)
    except UnknownName as error:
        print(error, file=sys.stderr)
        return 2
    return importlib.import_module("foundation.table").show(operations)


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has left, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it closes it
        status = 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
