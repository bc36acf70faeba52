"""Every key is fold_in(fold_in(key(seed), purpose), step), and purposes keep their numbers."""

import itertools

from moe_jax.system.random_keys import Purpose, purpose_key
from tests.support import system_checks


def test_purposes_keep_their_numbers() -> None:
    """A run that was saved by an earlier version goes on with the same random numbers."""
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "INITIAL_PARAMETERS": 0,
        "DROPOUT": 1,
        "SAMPLE": 2,
        "ROUND_MOMENTS": 3,
        "ROUND_WEIGHTS": 4,
        "ADAPTERS": 5,
    }


def test_no_two_uses_share_a_key() -> None:
    uses = itertools.product((0, 1, 2), Purpose, (None, 0, 1, 2, 3))
    keys = {system_checks.bits(purpose_key(*use)).tobytes() for use in uses}
    assert len(keys) == 3 * len(Purpose) * 5
