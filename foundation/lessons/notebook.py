"""What a notebook begins with: jax in float64, pictures, checks that print what they find, and `shown`, the code that a
chapter derives."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from foundation.exercises import check
from foundation.lessons import pictures
from foundation.parity import Check, max_relative_error, run

__all__ = ["Check", "agree", "check", "checked", "jax", "jnp", "max_relative_error", "np", "pictures", "run", "shown"]

jax.config.update("jax_enable_x64", True)  # 16 digits: a check needs them


def agree(what: str, ours: Any, theirs: Any, within: float) -> None:
    """Prints how far two results differ, relative to the largest entry; stops where it is more than `within`."""
    error = max_relative_error(ours, theirs)
    print(f"{what}: relative difference {error:.1e}")
    assert error <= within


def checked(name: str, forward: Callable[..., Any], backward: Callable[..., Any], arguments: tuple) -> None:
    """Holds a backward pass against autodiff and finite differences; stops where it is wrong."""
    found = run(Check(name, "", forward, backward, arguments))
    print(f"{name}: {found.autodiff:.1e} from autodiff, {found.finite_difference:.1e} from finite differences")
    assert found.passed


class Code:
    """Python that a notebook sets as code, and a terminal as text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text

    def _repr_markdown_(self) -> str:
        return f"```python\n{self.text}\n```"


def shown(*functions: Callable[..., Any]) -> Code:
    """The functions as they are in their modules, without their annotations and docstrings."""
    return Code("\n\n\n".join(map(_bare, functions)))


def _bare(function: Callable[..., Any]) -> str:
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    tree = ast.parse(source).body[0]
    assert isinstance(tree, ast.FunctionDef)
    first = tree.body[1 if ast.get_docstring(tree) else 0]
    for argument in tree.args.args:
        argument.annotation = None
    return "\n".join([f"def {tree.name}({ast.unparse(tree.args)}):", *source.rstrip().splitlines()[first.lineno - 1 :]])
