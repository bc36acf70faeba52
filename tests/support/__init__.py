"""What tests share: oracles, planted bugs, tiny models, a saved run, and which cases are for the night."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def short_form(cases: Iterable[Any], short: Collection[Any]) -> list[Any]:
    """The cases of a parametrised test. Those that are not in `short` are marked `slow`: they run in `make night` only.

    A tuple holds the values of several arguments.
    """
    return [
        case if case in short else pytest.param(*(case if type(case) is tuple else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]
