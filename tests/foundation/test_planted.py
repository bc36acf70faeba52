"""Every planted bug is caught by the check that it names; a check that can't fail would be found here."""

import inspect
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from foundation import parity
from foundation.challenges.planting import BUGS, Bug, planted
from foundation.chapters import OPERATIONS
from foundation.checks import checks_of
from tests.foundation import test_foundation_forward
from tests.support import short_form

pytestmark = pytest.mark.planted


def fails(caught_by: str) -> bool:
    """Whether the named test, or any parity check of the named operation, fails."""
    if caught_by.startswith("test:"):
        return any(raises(test) for test in runs_of(caught_by.removeprefix("test:")))
    return any(refuses(check) for check in checks_of(caught_by))


def refuses(check: parity.Check) -> bool:
    try:
        return not parity.run(check).passed
    except (ValueError, TypeError):  # a gradient whose shape is wrong
        return True


def runs_of(test_name: str) -> Iterator[Callable[[], None]]:
    """The test with each set of its parameters."""
    test = getattr(test_foundation_forward, test_name)
    marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    if not marks:
        yield test
    for mark in marks:
        for values in mark.args[1]:
            arguments = values if isinstance(values, tuple) else (values,)
            yield lambda arguments=arguments: test(*arguments)


def raises(test: Callable[[], None]) -> bool:
    try:
        test()
    except AssertionError:
        return True
    return False


def one_bug_a_check() -> list[Any]:
    """All bugs. Those after the first of a check are for the night."""
    firsts = {bug.caught_by: bug for bug in reversed(BUGS)}.values()
    return short_form(BUGS, firsts)


@pytest.mark.parametrize("bug", one_bug_a_check(), ids=lambda bug: bug.name)
def test_planted_bug_is_caught(bug: Bug) -> None:
    with planted(bug):
        assert fails(bug.caught_by), f"{bug.caught_by} did not notice: {bug.name}"


def test_no_two_bugs_are_one() -> None:
    assert not [1 for a, b in itertools.combinations(BUGS, 2) if a.name == b.name or a[1:4] == b[1:4]]
    assert {bug.caught_by for bug in BUGS if bug.seen_in_the_table} <= set(OPERATIONS)


def test_a_stale_bug_is_noticed() -> None:
    bug = Bug("stale", "linear.linear_backward", "no such text", "")
    with pytest.raises(ValueError, match="occurs 0 times"), planted(bug):
        pass


def test_planting_reaches_functions_imported_elsewhere_and_is_undone() -> None:
    from foundation import attention, softmax

    bug = next(bug for bug in BUGS if bug.place == "softmax.softmax_backward")
    here, there = inspect.unwrap(softmax.softmax_backward), inspect.unwrap(attention.softmax_backward)
    before = here.__code__
    assert isinstance(before, types.CodeType)
    with planted(bug):
        assert there.__code__ is not before
    assert there.__code__ is before
