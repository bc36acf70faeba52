"""The start of every program: argv becomes a command, an error becomes one line and an exit status.

The exit status is 2 for a wrong argument, and 1 for any other failure that the user can fix. Nothing here imports jax
before the arguments of the command are accepted.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro

from moe_jax.config import ConfigError, UserError
from moe_jax.system.errors import is_out_of_memory

COMMANDS = {
    "train": "train a sparse mixture-of-experts language model",
    "sft": "fine-tune a trained model on conversations, whole or by LoRA",
    "import": "bring a public mixture here as a run of 4, 8 or 16 bits",
    "quantize": "write a run with 8 or 4 bits a weight",
    "generate": "continue a text with a trained model",
    "chat": "talk with a trained model: type a beginning, and it goes on",
    "serve": "serve a trained model: OpenAI's API, and a page",
    "evaluate": "measure loss, bits per byte and drops of a model on a text",
    "inspect": "write an HTML page that shows where every token went",
    "runs": "list the trained runs, and the models that come with moe-jax",
    "plan": "find settings that fit a GPU, without the GPU",
    "export": "write a model for transformers, llama.cpp, ollama, or as a page",
    "doctor": "verify every checkpoint of a run, or look at the NVIDIA card",
    "certify": "test causality and compiled arithmetic of a model",
    "plot": "draw pictures of one run, or of several compared",
}
"""Name -> one line of help. `NAME.py` has a function of that name; of `import`, `import_model`."""
TAKES_SETTINGS = ("train", "sft")
"""Commands that take every setting of a run. Their functions parse argv by `settings.parse_settings`."""


def run_command(argv: Sequence[str]) -> int:
    """`moe-jax COMMAND ...`, and `python -m moe_jax COMMAND ...`."""
    here = Path(sys.argv[0]).name
    prog = "python -m moe_jax" if here == "__main__.py" else here
    name = argv[0] if argv else ""
    if name == "--version":
        from importlib.metadata import version

        print("moe-jax", version("moe-jax"))
        return 0
    if name in COMMANDS:
        return run_as(name, argv[1:], f"{prog} {name}")
    if name not in ("", "-h", "--help"):
        raise ConfigError(f"{name}: must be one of {', '.join(COMMANDS)}")
    print(f"usage: {prog} COMMAND [--flag VALUE ...]\n\ncommands:")
    for command, line in COMMANDS.items():
        print(f"  {command:<14} {line}")
    print(f"\n`{prog} COMMAND --help` lists the flags of a command.")
    return 0 if name else 2


def run_as(name: str, argv: Sequence[str], prog: str) -> int:
    """Run one command."""
    if argv and not argv[0].startswith("-") and name != "import":
        raise ConfigError(
            f"{argv[0]}: belongs to no flag; did you mean --run {argv[0]}? `{prog} --help` lists the flags"
        )
    module = "import_model" if name == "import" else name
    command = getattr(importlib.import_module(f"moe_jax.cli.{module}"), module)
    if name in TAKES_SETTINGS:
        return command(argv, prog)
    return tyro.cli(command, prog=prog, args=argv)


def console() -> int:
    """The console script `moe-jax`."""
    return main(run_command)


def main(program: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a program on the arguments, by default those of this process. An error that the user can fix becomes one line
    and an exit status."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the stream is closed: `moe-jax chat <&-`
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115, to the end of the process
    try:
        status = program(sys.argv[1:] if argv is None else argv) or 0
        sys.stdout.flush()  # an error of the last write is found here, and not while Python shuts down
        return status
    except ConfigError as error:
        return _fail(error, 2)
    except UserError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)  # as shells have it: 128 + SIGINT
    except BrokenPipeError:  # `generate | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        return _fail(f"{error.filename or 'file system'}: {error.strerror or error}; fix this and try again", 1)
    except RuntimeError as error:
        message = _of_jax(error)
        if message is None:
            raise
        return _fail(message, 1)


def _of_jax(error: RuntimeError) -> str | None:
    """What the user can do about an error of jax. None if the error is a defect of this program."""
    if is_out_of_memory(error):
        return (
            "the device is out of memory: close what else uses it, or give less with --memory, such as --memory 2.5GB; "
            "--fit any may also take a leaner optimizer"
        )
    if "nable to initialize backend" in str(error) or "nknown backend" in str(error):
        platforms = os.environ.get("JAX_PLATFORMS", "")
        return f"JAX_PLATFORMS={platforms}: JAX cannot start this platform; unset the variable, or set it to cpu"
    return None


def _fail(message: object, status: int) -> int:
    print("error:", *str(message).split(), file=sys.stderr)
    return status
