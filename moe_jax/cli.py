"""The command line: arguments into configurations, errors into one line and an exit status.

tyro makes flags and help of the dataclasses. Here are the short names, the presets, the settings that a resumed
run starts from, and the promise about errors: 2 for a wrong value, 1 for any other failure that the user can mend,
one line each, no traceback. Nothing here imports jax before a command's arguments are accepted.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moe_jax.commands import COMMANDS, command
from moe_jax.compatibility import check_resumable, check_upcyclable, dense_run, upcycled
from moe_jax.config import (
    ConfigError,
    RunConfig,
    UserError,
    holds_run,
    load_config,
)
from moe_jax.flags import SHORT_FLAGS, flag_of
from moe_jax.presets import preset


def parse[T](
    kind: type[T],
    argv: Sequence[str],
    default: T | None = None,
    prog: str | None = None,
    description: str | None = None,
) -> T:
    """Arguments into a dataclass. Help goes to stdout and exits 0; a wrong argument raises ConfigError."""
    import tyro

    options: dict[str, Any] = {"prog": prog, "description": description}
    if default is not None:
        options["default"] = default
    printed = io.StringIO()
    columns = os.environ.get("COLUMNS")
    wants_help = any(a in ("-h", "--help") for a in argv)
    _check_switches(kind, argv)
    try:
        if not wants_help:
            os.environ["COLUMNS"] = "10000"  # so that the box around an error does not break its sentence
            with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
                return tyro.cli(kind, args=list(argv), **options)
        return tyro.cli(kind, args=list(argv), **options)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ConfigError(_one_line(printed.getvalue())) from None
    finally:
        if columns is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = columns


def _one_line(report: str) -> str:
    """The sentence in tyro's error report, with its suggestions where it has some.

    Away from a terminal the report is a title, a rule, the sentence, and further sections between rules.
    """
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    sections: list[list[str]] = [[]]
    for line in lines:
        if set(line) <= {"-", "─"}:
            sections.append([])
        else:
            sections[-1].append(line)
    sentence = " ".join(sections[1] if len(sections) > 1 else lines)
    # "Error parsing --a/--b: ..." names a flag; "Error parsing model: --top-k 9: ..." a section of ours.
    sentence = re.sub(r"^Error parsing (?:(--[^\s/:]+)\S*|\S+): ", lambda m: f"{m[1]}: " if m[1] else "", sentence)
    sentence = re.sub(r"no type matching \{None\}\|INT .*? from \[(.*?)\].*", r"\1 is not a whole number", sentence)
    sentence = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number", sentence)
    sentence = re.sub(r"could not convert string to float: (.*)", r"\1 is not a number", sentence)
    near: list[str] = []
    if "nrecognized" in sentence:
        for typed in re.findall(r"--[a-z][a-z0-9.-]*", sentence):
            near += difflib.get_close_matches(typed, SHORT_FLAGS, n=1)  # tyro knows the long names only
        short_of = {long: short for short, long in SHORT_FLAGS.items()}
        suggested = (re.match(r"--[a-z][a-z0-9.-]+", line) for line in lines)
        near += [short_of.get(m[0], m[0]) for m in suggested if m]
    if near:
        sentence += "; perhaps " + " or ".join(list(dict.fromkeys(near))[:2]) + " was meant"
    for short, long in SHORT_FLAGS.items():
        sentence = sentence.replace(long, short)
    return sentence.rstrip(".") + "; --help lists every flag"


def expand_short(argv: Sequence[str]) -> list[str]:
    """Short flags by their long names: `--steps 3` and `--steps=3` to `--train.steps`."""
    expanded = []
    for arg in argv:
        name, equals, value = arg.partition("=")
        expanded.append(SHORT_FLAGS.get(name, name) + equals + value)
    return expanded


def parse_run(argv: Sequence[str]) -> tuple[RunConfig, RunConfig | None]:
    """The configuration that `train.py` was asked for, and the saved one where it resumes a run.

    Settings start from the preset, or from the run that is resumed or upcycled; flags override them. So the flags
    that say where they start from are read by themselves first: the others need only fit what they override.
    """
    argv = expand_short(argv)
    describe = "Train a sparse mixture-of-experts language model. Short names: " + ", ".join(SHORT_FLAGS) + "."

    def read(args: Sequence[str], default: RunConfig) -> RunConfig:
        return parse(RunConfig, args, default, prog="train.py", description=describe)

    name, origin = _value_of(argv, "--preset"), _origin_flags(argv)
    start = preset(name) if name is not None else preset("nano")
    asked = read(origin, start)
    dense = dense_run(asked.upcycle) if asked.upcycle else None
    if dense is not None:
        start = upcycled(dense, asked.upcycle)
        asked = read(origin, start)
    saved = load_config(Path(asked.run_dir)) if asked.resume else None
    if saved is not None:
        # A folder that was copied or renamed is where it is now, not where its config.json says.
        start = saved = dataclasses.replace(saved, out=asked.run_dir)
    config = read(argv, start)
    if saved is not None:
        check_resumable(saved, config)
    elif dense is not None:
        check_upcyclable(dense, config)
    check_run(config)
    return config, saved


def _origin_flags(argv: Sequence[str]) -> list[str]:
    """The arguments that say where settings start from: the preset, and what names the folder of a run (see
    `RunConfig.run_dir`). And --help, which is answered whatever the others are."""
    found: list[str] = []
    for i, arg in enumerate(argv):
        name, equals, _ = arg.partition("=")
        if name in ("--preset", "--out", "--upcycle", "--model.dense"):
            found += [arg] if equals else argv[i : i + 2]
        elif name in ("--resume", "--no-resume", "--help", "-h"):
            found.append(arg)
    return found


def _check_switches(kind: type[Any], argv: Sequence[str], section: str = "") -> None:
    """Refuse `--resume=yes`: tyro would call the value an unknown option and not name the flag. Raises ConfigError."""
    for f in dataclasses.fields(kind):
        if isinstance(f.type, type) and dataclasses.is_dataclass(f.type):
            _check_switches(f.type, argv, f.name)
        elif f.type is bool:
            flag = "--" + f"{section}.{f.name}".lstrip(".").replace("_", "-")
            value = _value_of([a for a in argv if "=" in a], flag)
            if value is not None:
                raise ConfigError(f"{flag_of(section, f.name)} {value}: takes no value; it is given, or left out")


def _value_of(argv: Sequence[str], flag: str) -> str | None:
    """The value that a flag is given, the last one where it is given twice, as tyro reads it."""
    value = None
    for i, arg in enumerate(argv):
        if arg == flag:
            value = argv[i + 1] if i + 1 < len(argv) else None
        elif arg.startswith(flag + "="):
            value = arg.partition("=")[2]
    return value


def check_run(config: RunConfig) -> None:
    """What needs the file system: the data and the trackers are there, and the folder is free, or resumed.

    Raises ConfigError.
    """
    from moe_jax.data.corpora import check_source

    check_source(config.data.source)
    if config.verify_resume:
        return  # works in folders of its own, without trackers
    for flag, module in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        if getattr(config, flag) and importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"--{flag}: {module} is not installed; run `uv run --extra {flag} train.py ...`, or give --no-{flag}"
            )
    run = Path(config.run_dir)
    if run.exists() and not run.is_dir():
        raise ConfigError(f"--out {run}: is a file; name a folder")
    if holds_run(run) and not config.resume:
        raise ConfigError(f"--out {run}: already holds a run; add --resume to go on with it, or name another folder")


def main(program: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a program on the arguments; the errors that the user can mend become one line and a status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a story may have characters that the terminal's encoding lacks
    try:
        return program(sys.argv[1:] if argv is None else argv) or 0
    except ConfigError as error:
        return _fail(str(error), 2)
    except UserError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted; training goes on from its last checkpoint with --resume", 130)
    except BrokenPipeError:  # `generate | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(f"{error.filename or 'file system'}: {error.strerror or error}; mend that and try again", 1)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _fail(
            "the device is out of memory; use --train.remat, a leaner --optimizer, or a smaller --batch-size; "
            "`uv run --extra gpu-plan python -m moe_jax plan` says which settings of a preset fit which card",
            1,
        )


def _fail(message: str, status: int) -> int:
    sys.stdout.flush()
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return status


def run_command(argv: Sequence[str]) -> int:
    """`python -m moe_jax COMMAND ...`."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m moe_jax COMMAND [--help]\n")
        for name, (_, line) in COMMANDS.items():
            print(f"  {name:<10} {line}")
        return 0 if argv else 2
    kind, prog = command(argv[0]), f"python -m moe_jax {argv[0]}"
    return parse(kind, argv[1:], prog=prog, description=COMMANDS[argv[0]][1]).execute()
