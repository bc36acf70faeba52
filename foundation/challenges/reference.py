"""The functions of foundation that a challenge is about, and the cases in which an answer is judged."""

import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import numpy as np

from foundation.challenges.catalogue import Challenge
from foundation.challenges.diagnosis import Finding, Named, judge
from foundation.challenges.mistakes import made_on_purpose
from foundation.checks import checks_of
from foundation.parity import Check, gradient_by_autodiff, random_like

GIVES_AWAY = {"_rotate"}
"""Helpers whose name in the stub would be the answer."""


@dataclass(frozen=True)
class Reference:
    """Both functions of one operation, and the module that they are in."""

    module: Any
    forward: Callable[..., Any]
    backward: Callable[..., Any]

    @classmethod
    def of(cls, challenge: Challenge) -> "Reference":
        """Found by name."""
        module = importlib.import_module(f"foundation.{challenge.module}")
        forward = inspect.unwrap(getattr(module, f"{challenge.name}_forward"))
        return cls(module, forward, inspect.unwrap(getattr(module, challenge.backward)))

    def inputs(self, operation: str) -> list[str]:
        """Names of what is differentiated: the first parameters of the forward pass."""
        count = len(next(gradient_checks_of(operation)).inputs)
        return list(inspect.signature(self.forward).parameters)[:count]

    def unpacking(self) -> list[str]:
        """The lines of the backward pass that take the cache apart: they are given."""
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


@dataclass(frozen=True)
class Case:
    """One check of an operation, as the learner's function meets it."""

    name: str
    arguments: tuple
    judge: Callable[[Any], Finding]
    """Looks at the function's answer."""


def cases_of(operation: str, challenge: Challenge) -> Iterator[Case]:
    """The cases of an operation, made one at a time."""
    reference = Reference.of(challenge)
    inputs = reference.inputs(operation)
    names = [f"d_{name}" for name in inputs]
    for check in gradient_checks_of(operation):
        arguments, right = _arguments_and_right(check)
        known = [Named(name, np.asarray(value)) for name, value in zip(inputs, check.inputs, strict=True)
                 if value is not None]  # fmt: skip
        known += _given(reference, arguments)
        mistakes = cache(partial(_mistakes, reference.backward, arguments))
        yield Case(check.case, arguments, partial(judge, names, right=right, known=known, mistakes=mistakes))


def _mistakes(function: Callable[..., Any], arguments: tuple) -> list[tuple[str, Any]]:
    return list(made_on_purpose(function, arguments))


def gradient_checks_of(operation: str) -> Iterator[Check]:
    """Its checks but those of the forward pass, which have an oracle."""
    return (check for check in checks_of(operation) if isinstance(check, Check))


def _arguments_and_right(check: Check) -> tuple[tuple, tuple]:
    out, cache = check.forward(*check.inputs)
    d_out = random_like(0, out)
    return (*d_out, cache) if isinstance(d_out, tuple) else (d_out, cache), gradient_by_autodiff(check, d_out)


def _given(reference: Reference, arguments: tuple) -> list[Named]:
    """The arrays that the function is given, by the names that its stub has for them."""
    names = list(inspect.signature(reference.backward).parameters)
    given = dict(zip(names, arguments, strict=False))
    cache = given.pop("cache", ())
    if lines := reference.unpacking():
        given |= zip((name.strip(" (),") for name in lines[0].removesuffix("= cache").split(",")), cache, strict=False)
    leaves = ((name, leaf) for name, value in given.items() for leaf in jax.tree.leaves(value))
    return [Named(name, np.asarray(leaf)) for name, leaf in leaves if getattr(leaf, "dtype", None) == np.float64]
