"""On moe_jax without a planted bug, every check passes. `test_planted.py` plants the bugs."""

import inspect

import pytest

from tests.support import checks, kernel_checks, system_checks, training_checks

CHECKS = [
    check
    for module in (checks, kernel_checks, system_checks, training_checks)
    for name, check in inspect.getmembers(module, inspect.isfunction)
    if name.startswith("check_")
]
PROVED_TWICE = {
    "check_accumulation",
    "check_accumulation_with_dropout",
    "check_cached_decoding",
    "check_cached_decoding_of_grouped_heads",
    "check_cross_entropy_of_a_prime",
    "check_filters_of_many_tokens",
    "check_grouped_matmul",
    "check_long_attention",
    "check_muon",
}
"""Slow checks of what another test of the default suite compares too. They pass in the suite of planted bugs."""


@pytest.mark.parametrize(
    "check",
    [pytest.param(check, marks=pytest.mark.planted) if check.__name__ in PROVED_TWICE else check for check in CHECKS],
    ids=lambda check: check.__name__,
)
def test_passes(check) -> None:
    check()
