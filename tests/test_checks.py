"""On moe_jax without a planted bug, every check passes. `test_planted.py` plants the bugs."""

import inspect

import pytest

from tests.support import checks, kernel_checks, system_checks, training_checks

pytestmark = pytest.mark.planted

CHECKS = [
    check
    for module in (checks, kernel_checks, system_checks, training_checks)
    for name, check in inspect.getmembers(module, inspect.isfunction)
    if name.startswith("check_")
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_passes(check) -> None:
    check()
