"""The end of a command's output: the next command for a person, and JSON for a program."""

import sys
from typing import Any

from moe_jax.system.files import json_text


def print_json(result: dict[str, Any], asked: bool) -> None:
    """Print the result as one line of JSON if it was asked for, or if the output is a file or a pipe."""
    if asked or not sys.stdout.isatty():
        print(json_text(result))


def print_next(text: str) -> None:
    """Tell a person at a terminal what to do next."""
    if sys.stdout.isatty():
        print(f"next: {text}")
