"""Help: the commands, and the arguments of one.

The help of a field is the string literal below it in the source. The source is read only for help, so other starts are
not slower.
"""

import ast
import inspect
import itertools
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING
from functools import cache

from moe_jax.cli.arguments import Argument
from moe_jax.cli.command import COMMANDS, Command
from moe_jax.config import SECTIONS

WIDEST = 120
INDENT = 26
"""Columns before the help of a flag."""


def print_commands(prog: str) -> None:
    """All commands, one line each."""
    print(f"usage: {prog} COMMAND [--flag VALUE ...]\n\ncommands:")
    for name, (_, _, line) in COMMANDS.items():
        print(f"  {name:<14} {line}")
    print(f"\n`{prog} COMMAND --help` lists the flags of a command.")


def print_help(kind: type[Command], prog: str, argv: Sequence[str]) -> None:
    """The help of one command: its usual flags by one name; with `--help all` every flag by all names, and with
    `--help SECTION` those of one section."""
    arguments = {a.flag: a for a in kind.arguments() if a.is_flag}
    usual = [arguments[flag] for flag in kind.usual if flag in arguments] or list(arguments.values())
    rest = [a for a in arguments.values() if a not in usual]
    topic = next((word for word in argv if word in ("all", *SECTIONS)), "")
    groups = {"common flags" if rest else "arguments": usual}
    if rest and topic in SECTIONS:
        groups = {topic: [a for a in arguments.values() if a.section == topic]}
    elif topic == "all":
        for a in rest:
            groups.setdefault(a.section or "other", []).append(a)
    places = "".join(f" [{a.name.upper()}]" for a in usual if a.positional)
    print(f"usage: {prog}{places} [--flag VALUE ...]")
    for paragraph in (inspect.getdoc(kind) or "").split("\n\n"):
        print("", paragraph if paragraph.startswith(" ") else _filled(paragraph), sep="\n")
    brief = bool(rest) and not topic
    for title, members in groups.items():
        print(f"\n{title}:")
        for a in members:
            print(_entry(a, f"{field_docs(a.owner).get(a.name, '')} {_choices_and_default(a)}".strip(), brief))
    if brief:
        print(
            "",
            _filled(f"{len(rest)} more flags: see --help all, or --help with a section: {', '.join(SECTIONS)}."),
            sep="\n",
        )


def _entry(a: Argument, about: str, brief: bool) -> str:
    """The names of an argument, and its help beside them, or below them if they are long."""
    names = [name for pair in itertools.zip_longest(a.flags, a.off_flags) for name in pair if name]
    names = [a.flag] if a.positional or brief else names
    value = "" if a.positional or a.kind is bool else {int: " N", float: " X", str: " TEXT"}[a.kind]
    head = f"  {', '.join(names)}{value}"
    if len(head) < INDENT - 1:
        return _filled(f"{head:<{INDENT}}{about}", after=" " * INDENT)
    return f"{_filled(head, after='  ')}\n{_filled(about, ' ' * INDENT)}"


def _filled(text: str, before: str = "", after: str = "") -> str:
    """The text in lines that fit the terminal, behind `before`, and from the second line on behind `before` and
    `after`. Lines break at spaces only, and not within `story-cpu`."""
    width = min(shutil.get_terminal_size().columns, WIDEST) - 2
    wrap = textwrap.TextWrapper(width, before, before + after, break_on_hyphens=False, break_long_words=False)
    return wrap.fill(text)


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


@cache
def field_docs(kind: type) -> dict[str, str]:
    """Field -> the string literal below it, on one line, for a dataclass and those that it inherits from."""
    docs: dict[str, str] = {}
    for owner in reversed(kind.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        for statement, below in itertools.pairwise(getattr(body, "body", [])):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                match below:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        docs[statement.target.id] = " ".join(text.split())
    return docs
