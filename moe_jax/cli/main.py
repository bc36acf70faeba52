"""The start of every program: argv becomes a command, an error becomes one line and an exit status.

The exit status is 2 for a wrong argument, and 1 for any other failure that the user can mend. Each error is one line on
stderr, without a traceback. Nothing here imports jax before the arguments of the command are accepted.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from moe_jax.cli.arguments import HINT
from moe_jax.cli.command import COMMANDS, Command, command
from moe_jax.config import ConfigError, UserError

HELP = {"-h", "--help"}
LONGEST_WORD = 400
"""Characters of a word that an error shows whole, such as a value or a path."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 + SIGINT."""


def run_command(argv: Sequence[str]) -> int:
    """`moe-jax COMMAND ...`, and `python -m moe_jax COMMAND ...`."""
    here = Path(sys.argv[0]).name
    prog = "python -m moe_jax" if here == "__main__.py" else here
    if not argv or argv[0] in HELP:
        from moe_jax.cli.help import print_commands

        print_commands(prog)
        return 0 if argv else 2
    if argv[0] == "--version":
        from importlib.metadata import version

        print("moe-jax", version("moe-jax"))
        return 0
    if argv[0].startswith("-"):
        raise ConfigError(f"{argv[0]}: no such flag; a command comes first, one of {', '.join(COMMANDS)}; {HINT}")
    return run_as(command(argv[0]), argv[1:], f"{prog} {argv[0]}")


def run_as(kind: type[Command], argv: Sequence[str], prog: str) -> int:
    """Run one command. With --help anywhere in argv, only print its help."""
    if not HELP.isdisjoint(argv):
        from moe_jax.cli.help import print_help

        print_help(kind, prog, argv)
        return 0
    return kind.parse(argv).execute()


def console() -> int:
    """The console script `moe-jax`."""
    return main(run_command)


def main(program: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a program on the arguments, by default those of this process. An error that the user can fix becomes one line
    and an exit status."""
    try:
        status = program(sys.argv[1:] if argv is None else argv) or 0
        sys.stdout.flush()  # an error of the last write must be found here, and not while Python shuts down
        return status
    except ConfigError as error:
        return _fail(str(error), 2)
    except UserError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # `generate | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it again at its end
        return _fail("the reader of the standard output has left", 1)
    except OSError as error:
        return _fail(f"{error.filename or 'file system'}: {error.strerror or error}; mend this and try again", 1)
    except RuntimeError as error:
        message = _of_jax(str(error))
        if message is None:
            raise
        return _fail(message, 1)


def _of_jax(error: str) -> str | None:
    """What the user can do about an error of jax. None if the error is a defect of this program."""
    if "RESOURCE_EXHAUSTED" in error:
        return (
            "the device is out of memory: close what else uses it, or give less with --memory, such as --memory 2.5GB; "
            "--fit any may also take a leaner optimizer"
        )
    if "nable to initialize backend" in error or "nknown backend" in error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        return f"JAX_PLATFORMS={platforms}: JAX cannot start this platform; unset the variable, or set it to cpu"
    return None


def _fail(message: str, status: int) -> int:
    words = [w if len(w) <= LONGEST_WORD else f"{w[:150]}...{w[-100:]}" for w in message.split()]
    print("error:", *words, file=sys.stderr)
    return status
