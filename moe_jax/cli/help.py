"""Help and completion: the arguments of a command, as argparse shows them and as shells complete them.

The help of a field is the string literal below it in the source. The source is read only for help, so other starts are
not slower.
"""

import argparse
import ast
import inspect
import itertools
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

from moe_jax.cli.arguments import PATHS, POSITIONAL, Argument
from moe_jax.cli.command import COMMANDS, Command, Group, command

WIDEST = 120
_FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
"""What each shell calls to complete a path, in the form of `shtab.FILE`."""


@dataclass(frozen=True)
class Completion(Command):
    """Print a script that completes the commands and flags of `moe-jax` in a shell.

    For bash. The first line is for this shell only, the second for all later ones:

        source <(moe-jax completion bash)
        moe-jax completion bash > ~/.local/share/bash-completion/completions/moe-jax
    """

    shell: Literal["bash", "zsh", "tcsh"] = field(metadata=POSITIONAL)
    """The shell that reads the script."""

    def execute(self) -> int:
        import shtab

        parser = argparse.ArgumentParser("moe-jax")
        commands = parser.add_subparsers()
        for name, (_, _, line) in COMMANDS.items():
            _add_arguments(commands.add_parser(name, help=line, description=line), command(name).groups())
        print(shtab.complete(parser, self.shell))
        return 0


def print_commands(prog: str) -> None:
    """All commands, one line each."""
    print(f"usage: {prog} COMMAND [--flag VALUE ...]\n\ncommands:")
    for name, (_, _, line) in COMMANDS.items():
        print(f"  {name:<14} {line}")
    print(f"\n`{prog} COMMAND --help` lists the flags of a command.")


def print_help(kind: type[Command], prog: str, argv: Sequence[str]) -> None:
    """The help of one command. Rare flags are shown for `--help all` only."""
    groups = kind.groups(argv)
    shown = groups if "all" in argv else [group for group in groups if not group.rare]
    brief, width = len(shown) < len(groups), _width()
    places = "".join(f" [{a.name.upper()}]" for a in kind.arguments() if a.positional)
    paragraphs = (inspect.getdoc(kind) or "").split("\n\n")
    parser = argparse.ArgumentParser(
        usage=f"{prog}{places} [--flag VALUE ...]",
        description="\n\n".join(p if p.startswith(" ") else _filled(p, width) for p in paragraphs),
        formatter_class=lambda prog: _Formatter(prog, 2, 30, width),
        add_help=False,
    )
    _add_arguments(parser, shown, brief)
    if brief:
        hidden = sum(len(group.arguments) for group in groups if group.rare)
        parser.epilog = f"{hidden} more flags set the model, the training and the devices: see --help all."
    parser.print_help()


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help whose lines break at spaces only: argparse would break `story-cpu` after its hyphen."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flags = _filled(super()._format_action_invocation(action), self._width - self._current_indent)
        return flags.replace("\n", "\n" + " " * self._current_indent)


def _width() -> int:
    return min(shutil.get_terminal_size().columns, WIDEST) - 2


def _filled(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_on_hyphens=False)


def _add_arguments(parser: argparse.ArgumentParser, groups: Sequence[Group], brief: bool = False) -> None:
    """Add the arguments of the groups. `brief`: by their short names only."""
    docs: dict[type, dict[str, str]] = {}
    for title, above, arguments, _ in groups:
        group = parser.add_argument_group(title, _filled(above, _width() - 2) or None)
        for a in arguments:
            about = docs.setdefault(a.owner, field_docs(a.owner)).get(a.name, "")
            options: dict[str, Any] = {"help": f"{about} {_choices_and_default(a)}".strip().replace("%", "%%")}
            names = a.flags
            if a.positional:
                names, options["nargs"] = [a.name], "?"
            elif a.kind is bool:
                options["action"] = "store_true"
                names = [name for pair in zip(a.flags, a.off_flags, strict=True) for name in pair]
            if a.kind is not bool:
                options |= {"metavar": _metavar(a), "choices": a.choices or None}
            added = group.add_argument(*(names[:1] if brief else names), **options)
            if a.name in PATHS:
                added.complete = _FILES  # pyright: ignore[reportAttributeAccessIssue], where shtab looks for it


def _metavar(a: Argument) -> str:
    if a.positional:
        return a.name.upper()
    if a.choices:
        return "NAME"
    return "PATH" if a.name in PATHS else {int: "N", float: "X", str: "TEXT"}[a.kind]


def _choices_and_default(a: Argument) -> str:
    """The choices and the default: "[adamw, muon; default muon]"."""
    facts = [", ".join(a.choices)] if a.choices else []
    if a.repeated:
        facts.append("may be repeated")
    if a.default is MISSING:
        facts.append("must be given")
    elif a.kind is bool:
        facts.append("default on" if a.default else "default off")
    elif a.default not in ("", None, []):
        facts.append(f"default {a.default:g}" if a.kind is float else f"default {a.default}")
    return f"[{'; '.join(facts)}]" if facts else ""


def field_docs(kind: type) -> dict[str, str]:
    """Field -> the string literal below it, on one line, for a dataclass and those that it inherits from."""
    docs: dict[str, str] = {}
    for owner in reversed(kind.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for statement, below in itertools.pairwise(statements):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                match below:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        docs[statement.target.id] = " ".join(text.split())
    return docs
