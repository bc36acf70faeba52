"""The checker of moe_jax's annotations during tests: beartype, where `float` accepts `int`, as in PEP 484."""

import inspect
from collections.abc import Callable

from beartype import BeartypeConf, beartype

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))
_made: dict[tuple[str, str, str], Callable] = {}


def check(function: Callable) -> Callable:
    """The checked function. jaxtyping calls this with functions that have a signature and do nothing. It does so again
    each time that a function within a function is defined; the first one serves all."""
    key = (function.__module__, function.__qualname__, str(inspect.signature(function)))
    if key not in _made:
        _made[key] = _beartype(function)
    return _made[key]
