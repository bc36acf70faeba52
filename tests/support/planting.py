"""Planting a bug into moe_jax: one edit of the source of a function.

The text to replace must occur exactly once. So a bug whose place has changed raises an error, and is not silently left
out.
"""

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import pytest


@dataclass(frozen=True)
class Bug:
    """A wrong function or method, and the check that must catch it. `edit` says what is wrong."""

    name: str
    where: Callable[..., Any]
    check: Callable[[], None]
    old: str = ""
    new: str = ""

    def edit(self, old: str, new: str) -> "Bug":
        """The bug that has `new` in the place of `old`."""
        return replace(self, old=old, new=new)

    def plant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = sys.modules[self.where.__module__]
        owner: Any = module
        *path, name = self.where.__qualname__.split(".")
        for part in path:
            owner = getattr(owner, part)
        original = getattr(owner, name)
        source = textwrap.dedent(inspect.getsource(original))
        assert source.count(self.old) == 1, (
            f"{self.name}: {self.where.__qualname__} has {source.count(self.old)} x {self.old!r}"
        )
        tree = ast.parse(source.replace(self.old, self.new))
        namespace: dict[str, Any] = dict(vars(module))
        # The edited function has the globals of its module, so that other patches affect it too.
        exec(compile(tree, f"<planted: {self.name}>", "exec"), vars(module), namespace)
        edited = namespace[name]
        if isinstance(original, jax.custom_vjp):
            edited.defvjp(original.fwd, original.bwd)
        if path:
            monkeypatch.setattr(owner, name, edited)
            return
        for other in [m for key, m in sys.modules.items() if key.startswith(("moe_jax", "tests."))]:
            for attribute, value in list(vars(other).items()):
                if value is original:
                    monkeypatch.setattr(other, attribute, edited)
        for differentiable in [value for value in vars(module).values() if isinstance(value, jax.custom_vjp)]:
            for rule in ("fwd", "bwd"):  # jax keeps its own references to the gradient functions
                if getattr(differentiable, rule) is original:
                    monkeypatch.setattr(differentiable, rule, edited)
