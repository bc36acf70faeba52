"""The cases in which an answer to a challenge is judged: the checks of its operation."""

import inspect
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np

from foundation.challenges.catalogue import Challenge
from foundation.challenges.diagnosis import Finding, Named, judge
from foundation.challenges.mistakes import made_on_purpose
from foundation.checks import checks_of
from foundation.parity import Check, answers, random_like


class Case(NamedTuple):
    """One check of an operation, as the learner's function meets it."""

    name: str
    arguments: tuple
    judge: Callable[[Any], Finding]
    """Looks at the function's answer."""


def gradient_checks_of(operation: str) -> Iterator[Check]:
    """Its checks but those of the forward pass, which have an oracle."""
    return (check for check in checks_of(operation) if isinstance(check, Check))


def inputs_of(operation: str, forward: Callable[..., Any]) -> list[str]:
    """Names of what is differentiated: the first parameters of the forward pass."""
    count = len(next(gradient_checks_of(operation)).inputs)
    return list(inspect.signature(forward).parameters)[:count]


def cases_of(operation: str, challenge: Challenge) -> Iterator[Case]:
    """The cases of an operation, made one at a time."""
    forward, backward = challenge.functions
    inputs = inputs_of(operation, forward)
    names = [f"d_{name}" for name in inputs]
    for check in gradient_checks_of(operation):
        out, kept = check.forward(*check.inputs)
        d_out = random_like(0, out)
        arguments = (*d_out, kept) if isinstance(d_out, tuple) else (d_out, kept)
        _, right, _ = answers(check, differences=False)
        known = [Named(name, np.asarray(value)) for name, value in zip(inputs, check.inputs, strict=True)
                 if value is not None]  # fmt: skip
        known += _given(challenge, backward, arguments)
        mistakes = cache(lambda arguments=arguments: list(made_on_purpose(backward, arguments)))
        yield Case(check.case, arguments, partial(judge, names, right=right, known=known, mistakes=mistakes))


def _given(challenge: Challenge, backward: Callable[..., Any], arguments: tuple) -> list[Named]:
    """The arrays that the function is given, by the names that its stub has for them."""
    given = dict(zip(inspect.signature(backward).parameters, arguments, strict=False))
    cache = given.pop("cache", ())
    if lines := challenge.unpacking():
        given |= zip((name.strip(" (),") for name in lines[0].removesuffix("= cache").split(",")), cache, strict=False)
    leaves = ((name, leaf) for name, value in given.items() for leaf in jax.tree.leaves(value))
    return [Named(name, np.asarray(leaf)) for name, leaf in leaves if getattr(leaf, "dtype", None) == np.float64]
