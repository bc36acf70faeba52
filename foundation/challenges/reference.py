"""The functions of foundation that a challenge is about."""

import importlib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from foundation.challenges.challenge import Challenge
from foundation.checks import checks_of
from foundation.parity import OracleCheck

GIVES_AWAY = {"_rotate"}
"""Helpers whose name in the stub would be the answer."""


@dataclass(frozen=True)
class Reference:
    """Both functions of one operation, and the module that they are in. A function with a task has no other."""

    module: Any
    forward: Callable[..., Any] | None
    backward: Callable[..., Any]

    @classmethod
    def of(cls, challenge: Challenge) -> "Reference":
        """Found by name."""
        module = importlib.import_module(f"foundation.{challenge.module}")
        backward = inspect.unwrap(getattr(module, challenge.backward))
        return cls(module, None if challenge.task else inspect.unwrap(getattr(module, challenge.forward)), backward)

    def inputs(self, operation: str) -> list[str]:
        """Names of what is differentiated: the first parameters of the forward pass."""
        count = len(next(checks_of(operation)).inputs)
        return list(inspect.signature(self.forward or self.backward).parameters)[:count]

    def unpacking(self, operation: str) -> list[str]:
        """The lines of the backward pass that take the cache apart, or the names of its parts: they are given."""
        check = next(checks_of(operation))
        if isinstance(check, OracleCheck):
            return []
        _, cache = check.forward(*check.inputs)
        if hasattr(cache, "_fields"):
            return [f"# the cache: {', '.join(f'cache.{name}' for name in cache._fields)}"]
        source = textwrap.dedent(inspect.getsource(self.backward)).splitlines()
        return [line.strip() for line in source if line.strip().endswith("= cache")]

    def imports(self) -> list[str]:
        """Import lines for what the answer may use: helpers and constants, and not the answer itself."""
        names = {"jnp"} | set(self.backward.__code__.co_names)
        lines = ["import jax.numpy as jnp"] + (["import math"] if "math" in names else [])
        by_module: dict[str, list[str]] = {}
        for name in sorted(names - GIVES_AWAY):
            value = getattr(self.module, name, None)
            source = getattr(value, "__module__", self.module.__name__)
            if isinstance(value, float) or (callable(value) and str(source).startswith("foundation.")):
                by_module.setdefault(source, []).append(name)
        lines = sorted(lines, key=lambda line: "jax" in line)
        if by_module:
            lines.append("")
        return lines + [f"from {source} import {', '.join(found)}" for source, found in sorted(by_module.items())]
