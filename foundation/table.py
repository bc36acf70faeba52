"""The table of `python -m foundation`: a row per check, each gradient by hand against autodiff and differences.

What has no gradient is held against an oracle: an answer that is found in another way.
"""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice

import jax
import numpy as np

from foundation.checks import all_checks, checks_of
from foundation.parity import (
    AUTODIFF_TOLERANCE,
    FINITE_DIFFERENCE_TOLERANCE,
    ORACLE_TOLERANCE,
    AnyCheck,
    Outcome,
    run,
)

_AHEAD = 4
"""Checks that are under way at once: two threads, and two in waiting."""
NAME = 44
"""Columns of a row's name. A whole row then has 80."""


def show(operations: tuple[str, ...]) -> int:
    """Runs the checks of these operations, or all without any, prints the table, returns the exit status."""
    jax.config.update("jax_enable_x64", True)
    if not operations:
        print("The whole table takes one to two minutes on two free cores, most of it compiling.")
        print("A part of it: uv run python -m foundation softmax attention\n")
    outcomes = rows(chain.from_iterable(map(checks_of, operations)) if operations else all_checks())
    failed, zeros = sum(not o.passed for o in outcomes), sum(o.zeros for o in outcomes)
    print(f"\n{len(outcomes)} checks, {failed} failed")
    if zeros:
        print(f"{len(outcomes) - zeros} would fail with a wrong factor; the right numbers of {zeros} are all 0")
    print("largest relative error")
    for against, errors, allowed in (
        ("autodiff", [o.autodiff for o in outcomes], AUTODIFF_TOLERANCE),
        ("finite differences", [o.finite_difference for o in outcomes], FINITE_DIFFERENCE_TOLERANCE),
        ("an oracle", [o.oracle for o in outcomes], ORACLE_TOLERANCE),
    ):
        if found := [error for error in errors if error is not None]:
            largest = np.max(found)  # Python's max would pass over a NaN
            print(f"  {largest:.1e} against {against} (allowed {allowed:.0e})")
    return 1 if failed else 0


def rows(checks: Iterable[AnyCheck], run: Callable[[AnyCheck], Outcome] = run) -> list[Outcome]:
    """Prints a row for each check, in their order."""
    print(f"{'operation: input':<{NAME}} {'autodiff':>8} {'differences':>11} {'oracle':>7}", flush=True)
    outcomes, left = [], iter(checks)
    # Compiling takes most of the time, and does not hold Python's lock. `pool.map` would make the inputs of all checks
    # before the first row.
    with ThreadPoolExecutor(2) as pool:
        waiting = deque(pool.submit(run, check) for check in islice(left, _AHEAD))
        while waiting:
            outcome = waiting.popleft().result()
            waiting.extend(pool.submit(run, check) for check in islice(left, 1))
            print(row(outcome), flush=True)
            outcomes.append(outcome)
    return outcomes


def row(outcome: Outcome) -> str:
    """One line of the table."""
    autodiff, finite, oracle = ("" if error is None else f"{error:.1e}" for error in outcome[1:4])
    if not finite and not oracle:
        finite = "at a tie"
    verdict = "FAILED" if not outcome.passed else "0 = 0" if outcome.zeros else "ok"
    return f"{outcome.name:<{NAME}} {autodiff:>8} {finite:>11} {oracle:>7} {verdict}"
