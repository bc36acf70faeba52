"""Every planted bug is caught by its check."""

import pytest

from tests.support import planted, planted_certify, planted_kernels, planted_training
from tests.support.planting import Bug

pytestmark = pytest.mark.planted

BUGS = [*planted.BUGS, *planted_kernels.BUGS, *planted_training.BUGS, *planted_certify.BUGS]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_caught(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    bug.plant(monkeypatch)
    with pytest.raises(AssertionError):
        bug.check()


def test_names_are_distinct() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS)
